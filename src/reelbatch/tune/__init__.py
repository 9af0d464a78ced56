"""What a batch costs: estimated before a run, measured, and the size that is best."""
