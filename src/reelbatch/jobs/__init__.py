"""From prompts on disk to videos on disk: prompt files, and a run that writes what an engine makes."""
