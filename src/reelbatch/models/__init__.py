"""Networks, and how they are opened."""

from reelbatch.models import precision as _first  # noqa: F401  # before anything of Diffusers: it imports torchao quietly
