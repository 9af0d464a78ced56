"""Which products change in their last bits when an operand moves in memory.

python benchmarks/bits.py --threads 2

Each product `linear(input, weight, bias)` is computed with all operands at addresses that are multiples of 64 bytes,
and again with one of them moved. Listed are the numbers of rows for which any move changes any bit. What
`models/linear.py` pads, and from how many rows on it does not, follows from this table.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from reelbatch.device import device_name

FEATURES = ((192, 192), (192, 1152), (960, 192), (64, 192), (16, 24), (192, 8), (192, 4), (4, 192), (8, 8))
"""Of the inputs and of the outputs: those of the bundled model, odd ones, and few."""
OFFSETS = (4, 8, 16, 20, 24, 32, 40, 60)
"""Bytes beyond a multiple of 64."""
OPERANDS = ("input", "weight", "bias")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def placed(tensor: Tensor, offset: int) -> Tensor:
    """A contiguous copy at an address that is `offset` modulo 64."""
    raw = torch.empty(tensor.nbytes + 128, dtype=torch.uint8)
    start = -raw.data_ptr() % 64 + offset
    return raw[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)


def moved_bits(rows: int, features: tuple[int, int], dtype: torch.dtype) -> list[str]:
    """The operands that change a product of so many rows when they move."""
    generator, (inputs, outputs) = torch.Generator().manual_seed(rows), features
    shapes = ((rows, inputs), (outputs, inputs), (outputs,))
    operands = [placed(torch.randn(shape, generator=generator).to(dtype), 0) for shape in shapes]
    expected = F.linear(*operands)
    changing = []
    for number, name in enumerate(OPERANDS):
        for offset in (offset for offset in OFFSETS if offset % dtype.itemsize == 0):
            moved = [*operands]
            moved[number] = placed(operands[number], offset)
            if not torch.equal(F.linear(*moved), expected):
                changing.append(name)
                break
    return changing


def spans(numbers: Iterable[int]) -> str:
    """1, 2, 3, 5 as "1-3, 5"."""
    runs = [[number for _, number in run] for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs) or "none"


def main(
    threads: Annotated[int, typer.Option(min=1, help="Threads that share a product.")] = 1,
    rows: Annotated[int, typer.Option(min=1, help="Products of 1 to so many rows.")] = 40,
    dtype: Annotated[list[str] | None, typer.Option(help="Only these, such as float32.")] = None,
) -> None:
    """Prints the table, in Markdown."""
    torch.set_num_threads(threads)
    print(f"{device_name('cpu')}, torch {torch.__version__}")
    print(f"Of products of 1 to {rows} rows, those whose bits change when an operand moves:")
    print(f"\n| dtype | features in, out | {' | '.join(OPERANDS)} |\n|---|---|{'---|' * len(OPERANDS)}")
    for kind in DTYPES:
        name = str(kind).removeprefix("torch.")
        if dtype and name not in dtype:
            continue
        for features in FEATURES:
            changing = {count: moved_bits(count, features, kind) for count in range(1, rows + 1)}
            cells = [spans(count for count, names in changing.items() if operand in names) for operand in OPERANDS]
            print(f"| {name} | {features[0]}, {features[1]} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    typer.run(main)
