"""Noise: a request's own, drawn on the CPU in fp32, so that a seed means the same on every device."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

GENERATOR_BITS = 32
"""Bits of a seed that PyTorch's CPU generator reads."""


class Noise:
    """The normal numbers of a seed. What is drawn second follows what was drawn first, as from one generator.

    Seeds of 32 bits give PyTorch's noise, as in Diffusers. For that generator 5 and 5 + 2³² are one seed; noise of
    larger seeds is drawn by NumPy's Philox, whose key has all 64 bits.
    """

    def __init__(self, seed: int) -> None:
        self._generator: torch.Generator | np.random.Generator
        if seed >> GENERATOR_BITS == 0:
            self._generator = torch.Generator("cpu").manual_seed(seed)
        else:
            self._generator = np.random.Generator(np.random.Philox(key=seed))

    def draw(self, shape: tuple[int, ...]) -> Tensor:
        """fp32, of this shape."""
        if isinstance(self._generator, torch.Generator):
            return torch.randn(shape, generator=self._generator, dtype=torch.float32)
        return torch.from_numpy(self._generator.standard_normal(shape, dtype=np.float32))


def draw_noise(seed: int, shape: tuple[int, ...]) -> Tensor:
    """The first numbers of a seed."""
    return Noise(seed).draw(shape)
