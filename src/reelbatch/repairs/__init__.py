"""Repairs for Diffusers pipelines that are already loaded: in place, around the same parameters, undoable."""
