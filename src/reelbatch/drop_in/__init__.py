"""Repairs for Diffusers pipelines that are already loaded: in place, around the same parameters, undoable."""

import reelbatch.models  # noqa: F401  # before anything of Diffusers: it imports torchao quietly
