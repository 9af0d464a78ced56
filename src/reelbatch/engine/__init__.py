"""Turns requests into videos: samples in progress, the schedule they follow, and the loop that moves them."""
