"""Weights as they are stored: the headers of safetensors files, and whether they are those of a network."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel

from reelbatch.outside_json import parse
from reelbatch.wording import shown_line

MOST_HEADER_BYTES = 100_000_000
"""What the safetensors library reads at most."""
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
"""Dtypes of weights that are numbers as they are, with no scale that belongs to them."""
PREFIXES = re.compile(
    r"(?:model\.)?((?:language_model|vision_tower)\.)?(?:model\.)?(?:text_model\.)?(?:vision_model\.)?"
)
"""Before the names of an encoder that was stored as a part of a larger network, or by an earlier transformers; what is
in the group stays."""
UNUSED = re.compile(r"(language_model\.)?lm_head\.weight|(.+\.)?position_ids|(.+\.)?rotary_emb\.inv_freq")
"""Stored beside encoders, and not of their weights: the head for next words, and numbers computed from the
configuration, which earlier versions of transformers stored."""
SHOWN = 3


class StoredTensor(NamedTuple):
    """dtype: in safetensors' names. size: in bytes."""

    dtype: str
    shape: tuple[int, ...]
    size: int

    @property
    def parameters(self) -> int:
        return math.prod(self.shape)


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file by name, of which none is read.

    Format: eight bytes with the header's length, the header (JSON), the data.

    Raises:
        ValueError: if the file is not whole.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        if start == b"version ":
            raise ValueError("is a Git LFS pointer, not the weights (git lfs pull gets them)")
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > size - 8:
            raise ValueError(f"is cut short: {size} bytes, less than its header says")
        if length > MOST_HEADER_BYTES:
            raise ValueError(f"has a damaged header (of {length} bytes)")
        try:
            header = parse(stream.read(length))
            header.pop("__metadata__", None)
            tensors = {
                name: StoredTensor(entry["dtype"], tuple(entry["shape"]), end - begin)
                for name, entry in header.items()
                for begin, end in [entry["data_offsets"]]
            }
            expected = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        except (ValueError, TypeError, AttributeError, LookupError) as error:
            raise _damaged(error) from None
    if size < expected:
        raise ValueError(f"is cut short: {size} of {expected} bytes")
    try:
        with safe_open(file, "pt"):  # it checks types, sizes and places of all tensors
            return tensors
    except (SafetensorError, OSError) as error:
        raise _damaged(error) from None


def _damaged(error: Exception) -> ValueError:
    return ValueError(f"has a damaged header ({shown_line(str(error))})")


def differences(stored: Mapping[str, StoredTensor], network: nn.Module) -> list[str]:
    """What keeps stored weights from being those of a network: names, shapes, dtypes."""
    weights = network.state_dict(keep_vars=True)
    plain = dict(stored)
    if isinstance(network, PreTrainedModel):
        weights = {plain_name(name): weight for name, weight in weights.items()}
        plain = {plain_name(name): tensor for name, tensor in stored.items() if not UNUSED.fullmatch(name)}
    own = {name: tuple(weight.shape) for name, weight in weights.items()}
    faults = []
    there = {id(weights[name]) for name in own.keys() & plain.keys()}  # a weight of two names is stored by one of them
    if missing := sorted(name for name, weight in weights.items() if id(weight) not in there):
        faults.append(f"lacks {len(missing)} weights that the network needs, such as {missing[0]}; download it again")
    if unexpected := sorted(plain.keys() - own.keys()):
        faults.append(
            f"has {len(unexpected)} weights that the network of its config.json does not have, such as "
            f"{_listed(unexpected)}; get config.json and weights of one model"
        )
    shared = sorted(own.keys() & plain.keys())
    if other := [name for name in shared if own[name] != plain[name].shape]:
        faults.append(
            f"has {len(other)} weights of other shapes than its config.json says, such as {other[0]} of "
            f"{list(plain[other[0]].shape)} for {list(own[other[0]])}; get config.json and weights of one model"
        )
    if whole := [name for name in shared if plain[name].dtype not in FLOATS]:
        faults.append(
            f"has {len(whole)} weights of a dtype that is not read, such as {whole[0]} in {plain[whole[0]].dtype}; get "
            f"weights in one of {', '.join(FLOATS[:4])}"
        )
    return faults


def plain_name(name: str) -> str:
    """An encoder's weight by the name that it has in the encoder itself."""
    return PREFIXES.sub(r"\1", name, count=1)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(name if len(name) <= 100 else f"{name[:97]}..." for name in list(names)[:SHOWN])
