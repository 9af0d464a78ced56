"""Turns requests into videos: samples on their way, the schedule they follow, and the loop that moves them."""

import reelbatch.models  # noqa: F401  # before anything of Diffusers: it imports torchao quietly
