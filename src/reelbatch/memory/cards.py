"""Cards: graphics cards that can be planned for on any machine, and what of their memory a program can have."""

from __future__ import annotations

from typing import NamedTuple

from reelbatch.device import parse_bytes

GIB = 2**30
USABLE = 0.92
"""The share of a card's nominal memory that CUDA shows at the least, for a card of which only the size is known: those
with error correction in ordinary memory (T4, L4, A10, L40S) keep the rest. What a process's CUDA context takes of it is
in the margin of every estimate (`estimate.GPU_MARGIN`)."""


class Card(NamedTuple):
    """A card.

    Attributes:
        name: as `--on` takes it.
        nominal: GB that it is sold with.
        usable: bytes that CUDA shows to programs.
        bfloat16: whether it computes in bfloat16 (compute capability 8.0 and above). int8 weights and float16 all can.
    """

    name: str
    nominal: float
    usable: int
    bfloat16: bool = True

    @property
    def dtype(self) -> str:
        """What is planned for if nothing is said."""
        return "bfloat16" if self.bfloat16 else "float16"


CARDS = tuple(
    Card(name, nominal, int(usable * GIB), name not in ("t4", "v100-16gb", "v100-32gb"))
    for name, nominal, usable in (
        ("rtx3060", 12, 11.6),
        ("rtx4070", 12, 11.6),
        ("t4", 16, 14.5),
        ("v100-16gb", 16, 15.7),
        ("rtx4080", 16, 15.6),
        ("rtx5080", 16, 15.4),
        ("l4", 24, 21.9),
        ("a10", 24, 21.9),
        ("rtx3090", 24, 23.5),
        ("rtx4090", 24, 23.5),
        ("rtx5090", 32, 31.3),
        ("v100-32gb", 32, 31.7),
        ("a100-40gb", 40, 39.3),
        ("a40", 48, 44.3),
        ("l40s", 48, 44.3),
        ("a6000", 48, 47.4),
        ("a100-80gb", 80, 79.1),
        ("h100", 80, 79.0),
        ("h200", 141, 139.7),
        ("b200", 180, 178.3),
    )
)
"""GiB as PyTorch names them in errors of such cards ("total capacity of 23.52 GiB"), rounded down. Drivers and ECC
settings move them by some tenths."""
BY_SIZE = ("rtx4070", "rtx4080", "rtx4090", "l40s", "a100-80gb", "h200")
"""One card each of 12, 16, 24, 48, 80 and 141 GB."""


def card(text: str) -> Card:
    """A card by its name, or one of a size such as 24GiB, of which CUDA is taken to show `USABLE`.

    Raises:
        ValueError: for anything else, with the names that there are.
    """
    plain = text.lower().replace(" ", "").replace("_", "-")
    known = {card.name: card for card in CARDS}
    if plain in known:
        return known[plain]
    try:
        size = parse_bytes(text)
    except ValueError:
        raise ValueError(f"--on {text!r}: no such card; give a size, as 24GiB, or one of {', '.join(known)}") from None
    return Card(text, size / GIB, int(size * USABLE))
