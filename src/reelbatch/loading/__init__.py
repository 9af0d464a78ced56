"""Model folders and LoRA files: found, looked into, checked, loaded."""
