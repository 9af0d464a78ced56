"""What work costs in memory, and which weights are where."""
