"""A hash that identifies the weights of a model folder."""

from __future__ import annotations

import hashlib
from pathlib import Path

from reelbatch.loading.families import components_of

PIECES, PIECE_BYTES = 16, 2**16
"""A weight file's hash is of so many of its pieces, of so many bytes each: whole files would take minutes."""


def weights_hash(folder: Path) -> str:
    """SHA-256 over all configurations, and over the names, sizes, first and evenly spread bytes of the weight files.

    Other weights of the same shape differ almost everywhere, so the pieces differ.
    """
    digest = hashlib.sha256()
    for component in sorted(components_of(folder)):
        for file in sorted((folder / component).glob("*")):
            if not file.is_file():
                continue
            if file.suffix == ".safetensors":
                size = file.stat().st_size
                digest.update(f"{component}/{file.name}:{size}".encode())
                with file.open("rb") as stream:
                    for piece in range(PIECES):
                        stream.seek(piece * max(size - PIECE_BYTES, 0) // (PIECES - 1))
                        digest.update(stream.read(PIECE_BYTES))
            elif file.name.endswith("config.json"):
                digest.update(file.read_bytes())
    return digest.hexdigest()
