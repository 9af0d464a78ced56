"""Model folders and LoRA files: where they are, what they hold, whether they can run, and loading them."""
