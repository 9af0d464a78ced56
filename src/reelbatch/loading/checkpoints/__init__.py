"""Models as people have them on disk, other than in Diffusers' layout: read, told apart by content, converted."""
