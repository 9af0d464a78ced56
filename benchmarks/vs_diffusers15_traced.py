"""What a step of HunyuanVideo 1.5's published configuration (8.3B) takes of a GPU, for Diffusers and for reelbatch.

    python benchmarks/vs_diffusers15_traced.py       # needs a C++ compiler, and no GPU

One step with guidance, text to video, in bfloat16, on fake CUDA tensors: nothing is computed. Kernels are those that
PyTorch's CUDA build launches; "read and written" are all tensors that they are given and return, so what caches save is
not seen; the peak is of live tensors besides weights, so workspaces are not seen. Diffusers' two forwards follow each
other; its trace leaves out how valid tokens are moved before the padding of each sample, which reads from the device.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import torch
import typer
from diffusers import HunyuanVideo15Transformer3DModel as Reference
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from vs_diffusers15 import IMAGE, RESULTS, TESTS, binary, branches_of, keep, latent_shape, padded

from reelbatch.models.hunyuan_video15.transformer import HunyuanVideo15Transformer3DModel

SHAPES = ((480, 848, 121), (720, 1280, 121))
HEADER = "| shape | tokens | batch | | kernels | read and written | peak besides weights |\n" + "|---" * 7 + "|"


class Traffic(TorchDispatchMode):
    """Bytes that kernels read and write: of all tensors that an operator is given and returns, views aside."""

    supports_higher_order_operators = True

    def __init__(self, is_view: Callable[..., bool]) -> None:
        super().__init__()
        self.bytes, self._is_view = 0, is_view

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs, outputs = (
            [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.device.type == "cuda"]
            for tree in ((args, kwargs or {}), result)
        )
        if outputs and not self._is_view(func, func._schema.name.partition("::")[2], inputs, outputs):
            self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in (*inputs, *outputs))
        return result


def blocks_of_diffusers(model: Reference, batches: list[dict[str, Tensor]]) -> list[Tensor]:
    return [forward_of_diffusers(model, inputs) for inputs in batches]


def forward_of_diffusers(model: Reference, inputs: dict[str, Tensor]) -> Tensor:
    """Diffusers' forward without what cannot be traced: valid tokens are not moved before the padding of each sample,
    and nothing reads from the device whether there is an image."""
    batch = len(inputs["hidden_states"])
    temb = model.time_embed(inputs["timestep"])
    rotary = model.rope(inputs["hidden_states"])
    video = model.x_embedder(inputs["hidden_states"])
    mask = inputs["encoder_attention_mask"]
    kinds = [
        model.image_embedder(inputs["image_embeds"]) * 0.0,
        model.context_embedder_2(inputs["encoder_hidden_states_2"]),
        model.context_embedder(inputs["encoder_hidden_states"], inputs["timestep"], mask),
    ]
    index = torch.zeros(batch, 1, dtype=torch.long, device=video.device)
    text = torch.cat([rows + model.cond_type_embed(index) for rows in kinds], dim=1)
    masks = [mask.new_zeros(batch, IMAGE), inputs["encoder_attention_mask_2"], mask]
    joint = torch.cat(masks, dim=1).bool()
    for block in model.transformer_blocks:
        video, text = block(video, text, temb, joint, rotary)
    return model.proj_out(model.norm_out(video, temb))


@contextmanager
def fake_cuda() -> Iterator[Any]:
    """The tests' fake CUDA device: tensors of a shape and no values."""
    sys.path.append(str(TESTS))
    import fake_cuda as module

    with module.fake_cuda() as trace:
        yield SimpleNamespace(trace=trace, is_view=module.is_view, weightless=module.weightless)


def rows(batches: list[int]) -> Iterator[dict[str, Any]]:
    """One step of the 8.3B configuration in bfloat16: kernels, bytes they read and write, peak besides weights."""
    to = {"device": torch.device("cuda"), "dtype": torch.bfloat16}
    for who in ("diffusers", "exact", "packed"):
        with fake_cuda() as cuda:
            kind = Reference if who == "diffusers" else HunyuanVideo15Transformer3DModel
            model = cuda.weightless(kind).eval().requires_grad_(False)
            for height, width, frames in SHAPES:
                shape = latent_shape(height, width, frames)
                for batch in batches:
                    branches = branches_of(model.config, shape, batch, **to)
                    packs = [[branch] for branch in branches] if who == "exact" else [branches]
                    two = [padded(branches[of::2], model.config) for of in (0, 1)] if who == "diffusers" else []

                    step = partial(blocks_of_diffusers, model, two) if two else partial(model, packs=packs)
                    step()  # what is kept from step to step is there the second time
                    cuda.trace.reset()
                    before = cuda.trace.live
                    with Traffic(cuda.is_view) as traffic:
                        step()
                    yield {
                        "who": who,
                        "shape": f"{height}×{width}×{frames}",
                        "tokens": shape[0] * shape[1] * shape[2],
                        "batch": batch,
                        "kernels": cuda.trace.launches,
                        "bytes": traffic.bytes,
                        "peak": cuda.trace.peak_bytes - before,
                    }


def row(entry: dict[str, Any]) -> str:
    sizes = f"{binary(entry['bytes'])} | {binary(entry['peak'])}"
    head = f"{entry['shape']} | {entry['tokens']} | {entry['batch']} | {entry['who']}"
    return f"| {head} | {entry['kernels']} | {sizes} |"


def main(
    batch: Annotated[list[int], typer.Option(help="Batch sizes.")] = [1, 2],  # noqa: B006
    out: Annotated[Path, typer.Option(help="Where the table and its figures go.")] = RESULTS,
) -> None:
    """Traces the steps, prints their table and keeps it under benchmarks/results/."""
    print(HEADER)
    entries: list[dict[str, Any]] = []
    with torch.no_grad():
        for entry in rows(batch):
            print(row(entry), flush=True)
            entries.append(entry)
    entries.sort(key=lambda entry: (entry["tokens"], entry["batch"]))
    keep(out / "vs_diffusers15_traced", __doc__, [HEADER, *map(row, entries)], entries)


if __name__ == "__main__":
    typer.run(main)
