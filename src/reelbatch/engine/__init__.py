"""Turns requests into videos: samples on their way, the schedule they follow, and the loop that moves them."""
