"""HunyuanVideo (13B): transformer, text towers, VAE."""
