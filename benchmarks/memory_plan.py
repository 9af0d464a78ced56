"""How far estimates of memory are off: estimated and measured peaks of the denoising steps and of decoding.

    python benchmarks/memory_plan.py                 # the 30 cases, about twenty minutes on two cores
    python benchmarks/memory_plan.py --every 3       # every third of them
    python benchmarks/memory_plan.py --repeat 3      # each three times, to see how far measured peaks vary

Every case is a process of its own: an engine is opened and makes a batch of videos in two steps, with prompts as long
as are read, which is what estimates are for. Measured is the peak resident set of the process in each phase, less what
was resident once everything was imported: weights, activations, and what the libraries and the C allocator take.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from reelbatch.device import device_name, held_bytes
from reelbatch.loading.hub import DEMO_FOLDER
from reelbatch.loading.precision import Precision
from reelbatch.loading.skeleton import from_folder
from reelbatch.memory.estimate import LONGEST_PROMPT, Estimator
from reelbatch.request import VideoRequest

RESULTS = Path(__file__).parent / "results"
STEPS = 2
CPU = torch.device("cpu")

NETWORKS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "wide": (
        {"num_attention_heads": 8, "attention_head_dim": 64, "num_layers": 2, "num_single_layers": 3},
        {"block_out_channels": (32, 32, 64, 64), "layers_per_block": 1},
    ),
    "heavy": (
        {"num_attention_heads": 12, "attention_head_dim": 64, "num_layers": 3, "num_single_layers": 6},
        {"block_out_channels": (16, 32, 32, 64), "layers_per_block": 2},
    ),
}
"""Transformer and VAE of models with random weights, beside the bundled one: `wide` has larger activations, `heavy`
more weights."""


@dataclass(frozen=True)
class Case:
    """A batch: `shapes` are height, width, frames and whether a second branch runs."""

    model: str
    dtype: str
    isolation: str
    shapes: tuple[tuple[int, int, int, bool], ...]

    @property
    def requests(self) -> list[VideoRequest]:
        guided: dict[str, Any] = {"negative_prompt": LONGEST_PROMPT, "true_cfg": 2.0}
        return [
            VideoRequest(
                prompt=LONGEST_PROMPT, height=h, width=w, frames=n, steps=STEPS, seed=i, **(guided if cfg else {})
            )
            for i, (h, w, n, cfg) in enumerate(self.shapes)
        ]

    def estimated(self, folder: Path) -> dict[str, int]:
        family = from_folder(folder, Precision.parse(self.dtype, CPU), CPU)
        requests = [request.for_model(family.limits) for request in self.requests]
        plan = Estimator(family, self.isolation, CPU).plan(requests)  # type: ignore[arg-type]
        return dict(plan.phases)

    def __str__(self) -> str:
        height, width, frames, cfg = self.shapes[0]
        size = f"{width}×{height}×{frames}{' cfg' if cfg else ''}"
        if len(set(self.shapes)) > 1:
            size = "mixed, up to " + max((f"{w}×{h}×{n}" for h, w, n, _ in self.shapes), key=len)
        return f"{self.model} | {self.dtype} | {self.isolation} | {size} | {len(self.shapes)}"


def _same(model: str, dtype: str, isolation: str, size: int, frames: int, batch: int, cfg: bool = False) -> Case:
    return Case(model, dtype, isolation, ((size, size, frames, cfg),) * batch)


MIXED = ((64, 64, 9, False), (192, 320, 17, False), (128, 128, 33, True))
CASES = (
    _same("demo", "fp32", "exact", 64, 9, 1),
    _same("demo", "fp32", "exact", 64, 9, 8),
    _same("demo", "bf16", "packed", 64, 9, 8, cfg=True),
    _same("demo", "fp32", "packed", 128, 17, 4),
    _same("demo", "bf16", "exact", 128, 17, 4, cfg=True),
    _same("demo", "fp32", "exact", 256, 9, 2),
    _same("demo", "fp32", "packed", 256, 9, 4, cfg=True),
    _same("demo", "bf16", "exact", 256, 17, 2),
    _same("demo", "fp32", "exact", 192, 33, 3),
    _same("demo", "fp32", "exact", 320, 17, 1),
    _same("demo", "fp32", "exact", 512, 9, 1),
    _same("demo", "bf16", "packed", 512, 9, 2),
    Case("demo", "fp32", "exact", MIXED),
    Case("demo", "bf16", "packed", MIXED),
    _same("wide", "fp32", "exact", 128, 17, 2),
    _same("wide", "fp32", "packed", 256, 9, 4),
    _same("wide", "bf16", "exact", 256, 9, 2, cfg=True),
    _same("wide", "fp32", "exact", 192, 17, 8),
    _same("heavy", "fp32", "exact", 64, 9, 1, cfg=True),
    _same("heavy", "bf16", "packed", 128, 9, 8),
)
OTHER_MIXED = ((96, 160, 9, False), (160, 160, 25, False), (224, 128, 5, True))
CASES += (
    _same("demo", "fp32", "exact", 96, 9, 6),
    _same("demo", "fp32", "packed", 160, 17, 2, cfg=True),
    _same("demo", "bf16", "exact", 224, 5, 3),
    _same("demo", "bf16", "packed", 192, 9, 5),
    _same("demo", "fp32", "exact", 288, 9, 2),
    _same("demo", "fp32", "packed", 384, 9, 1),
    Case("demo", "fp32", "packed", OTHER_MIXED),
    _same("wide", "fp32", "exact", 160, 9, 3),
    _same("wide", "bf16", "packed", 192, 9, 6),
    _same("heavy", "fp32", "exact", 96, 17, 2),
)


@dataclass(frozen=True)
class Result:
    """Bytes, of the step and of decoding."""

    case: Case
    estimated: dict[str, int]
    measured: dict[str, int]

    def error(self, phase: str) -> float:
        return self.estimated[phase] / self.measured[phase] - 1


# -- one case, in a process of its own -------------------------------------------------------------


def measure(case: Case, folder: Path) -> dict[str, int]:
    """Peaks above what is resident at the start; to be called in a fresh process."""
    import transformers

    from reelbatch.engine.engine import Engine
    from reelbatch.engine.events import Event, Worked
    from reelbatch.loading.load import load
    from reelbatch.memory.gauge import memory_of

    warnings.simplefilter("ignore")  # of prompts that are cut
    _ = transformers.LlamaModel, transformers.CLIPTextModel, transformers.PreTrainedTokenizerFast  # now imported
    before, peaks = held_bytes(CPU), dict[str, int]()
    engine = Engine(
        load(folder, CPU, case.dtype),
        gauge=memory_of(CPU),
        isolation=case.isolation,
        max_batch_size=len(case.shapes),
        decode_beside=0,
    )

    def listen(event: Event) -> None:
        if isinstance(event, Worked) and event.peak_bytes is not None:
            peaks[event.phase] = max(peaks.get(event.phase, 0), event.peak_bytes - before)

    engine.subscribe(listen)
    engine.generate(case.requests)
    return peaks


# -- all of them -----------------------------------------------------------------------------------


@contextmanager
def model_folders() -> Iterator[dict[str, Path]]:
    """The bundled model, and folders of the others with the bundled one's text encoders."""
    from diffusers import AutoencoderKLHunyuanVideo

    from reelbatch.models.hunyuan_video.transformer import HunyuanVideoTransformer3DModel

    shared = {"num_refiner_layers": 1, "text_embed_dim": 64, "pooled_projection_dim": 64, "rope_axes_dim": (16, 24, 24)}
    with tempfile.TemporaryDirectory() as root:
        folders = {"demo": DEMO_FOLDER}
        for name, (transformer, vae) in NETWORKS.items():
            folders[name] = Path(root) / name
            shutil.copytree(DEMO_FOLDER, folders[name], ignore=shutil.ignore_patterns("*.safetensors"))
            for part in ("text_encoder", "text_encoder_2"):
                shutil.copy(DEMO_FOLDER / part / "model.safetensors", folders[name] / part)
            torch.manual_seed(0)
            HunyuanVideoTransformer3DModel(**shared, **transformer).save_pretrained(folders[name] / "transformer")
            AutoencoderKLHunyuanVideo(norm_num_groups=8, **vae).save_pretrained(folders[name] / "vae")
        yield folders


def run(case: Case, folder: Path) -> Result:
    """Measures in a child process, estimates here."""
    call = [sys.executable, __file__, "--child", json.dumps([asdict(case), str(folder)])]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(call, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{case} failed:\n{done.stderr}")
    return Result(case, case.estimated(folder), json.loads(done.stdout.splitlines()[-1]))


def table(results: list[Result]) -> str:
    lines = [
        "| model | dtype | isolation | width×height×frames | batch | step est. MiB | measured | error "
        "| decode est. MiB | measured | error |",
        "|" + "---|" * 11,
    ]
    for result in results:
        cells = [str(result.case)]
        for phase in ("step", "decode"):
            sizes = (result.estimated[phase] / 2**20, result.measured[phase] / 2**20)
            cells += [f"{sizes[0]:.0f}", f"{sizes[1]:.0f}", f"{result.error(phase):+.1%}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def report(results: list[Result]) -> str:
    spans = []
    for phase in ("step", "decode"):
        errors = [result.error(phase) for result in results]
        below = sum(error < 0 for error in errors)
        spans.append(
            f"- {phase}: {len(errors)} peaks, errors from {min(errors):+.1%} to {max(errors):+.1%}, {below} below 0"
        )
    versions = ", ".join(f"{name} {version(name)}" for name in ("reelbatch", "torch", "diffusers", "transformers"))
    return f"""# Estimates of memory against what was measured, on a CPU

{date.today()}, {device_name("cpu")}, {versions}, Python {sys.version.split()[0]}

Peak resident memory of a process above what is resident once everything is imported: weights, activations, and what
libraries and the C allocator take. Estimates are traces of the networks from their configurations alone, with one
margin for all. Error: estimate over measured, less 1. {len({result.case for result in results})} batches.

{chr(10).join(spans)}

{table(results)}
"""


def main(
    child: Annotated[str, typer.Option(hidden=True)] = "",
    only: Annotated[list[int] | None, typer.Option(help="Numbers of cases, from 1.")] = None,
    every: Annotated[int, typer.Option(min=1, help="Every n-th case.")] = 1,
    repeat: Annotated[int, typer.Option(min=1, help="Times that each case is measured.")] = 1,
    threads: Annotated[int, typer.Option(help="Of PyTorch.")] = 1,
    save: Annotated[bool, typer.Option(help="Keep the table under benchmarks/results/.")] = True,
) -> None:
    """Measures the cases and prints the table that is kept under benchmarks/results/."""
    torch.set_num_threads(threads)
    if child:
        fields, folder = json.loads(child)
        fields["shapes"] = tuple(tuple(shape) for shape in fields["shapes"])
        print(json.dumps(measure(Case(**fields), Path(folder))))
        return
    chosen = [CASES[number - 1] for number in only] if only else list(CASES[::every])
    results = []
    with model_folders() as folders:
        for case in chosen:
            for _ in range(repeat):
                results.append(run(case, folders[case.model]))
                print(table(results[-1:]).splitlines()[-1], flush=True)
    text = report(results)
    print(text)
    if save and not only:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "memory_plan_cpu.md").write_text(text, encoding="utf-8")
        record = [{**asdict(result), "date": str(date.today()), "device": device_name("cpu")} for result in results]
        (RESULTS / "memory_plan_cpu.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
