"""How far the memory plan is off: estimated and measured peaks of the denoising steps and of decoding.

    python benchmarks/memory_plan.py                 # the 20 cases, about ten minutes on two cores
    python benchmarks/memory_plan.py --repeat 3      # each three times, to see how far the measured peak itself varies
    python benchmarks/memory_plan.py --held-out      # ten others, which nothing was fitted to

Every case is a process of its own: an engine is opened and makes a batch of videos in three steps. Measured is the peak
resident set of the process, less what was resident once everything was imported: weights, activations, and what the
libraries and the C allocator take. No more than two videos are decoded, as one follows the other.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from reelbatch.device import device_name
from reelbatch.loading.hub import DEMO_FOLDER
from reelbatch.loading.precision import DTYPES
from reelbatch.memory.estimate import Network, Plan, VideoShape, plan

RESULTS = Path(__file__).parent / "results"
STEPS, DECODED = 3, 2
PROMPT = "a large red circle moving left on a black background"
TEXT_TOKENS = 12
LOWEST, HIGHEST = -0.05, 0.15
"""How far an estimate may be off, as a part of what was measured."""

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

    def plan(self, network: Network) -> Plan:
        shapes = [VideoShape(*shape, text_tokens=TEXT_TOKENS) for shape in self.shapes]
        return plan(network, shapes, dtypes=DTYPES[self.dtype], isolation=self.isolation)  # type: ignore[arg-type]

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
HELD_OUT = (
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
"""Batches that nothing was fitted to."""


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

    from reelbatch import VideoRequest
    from reelbatch.engine.engine import Engine, Progress

    _ = transformers.LlamaModel, transformers.CLIPTextModel, transformers.PreTrainedTokenizerFast  # now imported
    before, peaks = _resident("VmRSS"), {}
    _forget_peak()

    def ended(phase: str) -> None:
        if phase not in peaks:
            peaks[phase] = _resident("VmHWM") - before
            _forget_peak()

    engine = Engine.from_pretrained(str(folder), device="cpu", dtype=case.dtype, isolation=case.isolation)  # type: ignore[arg-type]
    ended("load")
    decoder = engine.components.family.decoder
    decode, decoded = decoder.decode, []

    def decode_some(latents: torch.Tensor) -> torch.Tensor:
        if len(decoded) == DECODED:
            return torch.zeros(1, 16, 16, 3)
        decoded.append(True)
        return decode(latents)

    def watch(progress: Progress) -> None:
        if progress.phase == "decode":
            ended("step")

    decoder.decode = decode_some  # type: ignore[method-assign]
    engine.on_progress = watch
    engine.components.family.transformer.register_forward_pre_hook(lambda *_: ended("text"))
    guided = {"negative_prompt": "", "true_cfg": 2.0}
    engine.generate(
        [
            VideoRequest(
                prompt=PROMPT, height=height, width=width, frames=frames, steps=STEPS, seed=i, **(guided if cfg else {})
            )
            for i, (height, width, frames, cfg) in enumerate(case.shapes)
        ]
    )
    ended("decode")
    return peaks


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


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
    return Result(case, dict(case.plan(Network.from_folder(folder)).phases), json.loads(done.stdout.splitlines()[-1]))


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


def report(results: list[Result], repeat: int, fitted: str) -> str:
    errors = [result.error(phase) for result in results for phase in ("step", "decode")]
    outside = sum(not LOWEST <= error <= HIGHEST for error in errors)
    spread = ""
    if repeat > 1:
        groups: dict[Any, list[Result]] = {}
        for result in results:
            groups.setdefault(result.case, []).append(result)
        spans = [
            max(sizes) / min(sizes) - 1
            for found in groups.values()
            for phase in ("step", "decode")
            if (sizes := [result.measured[phase] for result in found])
        ]
        counts = {len(found) for found in groups.values()}
        times = " to ".join(map(str, sorted({min(counts), max(counts)})))
        spread = (
            f"- measured {times} times each, not always the same: the highest peak is up to {max(spans):.0%} above\n"
            "  the lowest of the same work, as the C allocator cannot always use again what was freed\n"
        )
    versions = ", ".join(f"{name} {version(name)}" for name in ("reelbatch", "torch", "diffusers", "transformers"))
    return f"""# The memory plan against what was measured, on a CPU

{date.today()}, {device_name("cpu")}, {versions}, Python {sys.version.split()[0]}

Peak resident memory of a process above what is resident once everything is imported: weights, activations, and what
libraries and the C allocator take. Estimates are from the configurations alone; what they assume of the allocator was
fitted to {fitted}. Error: estimate over measured, less 1.

- {len(errors)} peaks of {len({result.case for result in results})} batches: errors from {min(errors):+.1%} to \
{max(errors):+.1%}
- {outside} of them outside of {LOWEST:+.0%} to {HIGHEST:+.0%}
{spread}
{table(results)}
"""


def main(
    child: Annotated[str, typer.Option(hidden=True)] = "",
    only: Annotated[list[int] | None, typer.Option(help="Numbers of cases, from 1.")] = None,
    repeat: Annotated[int, typer.Option(min=1, help="Times that each case is measured.")] = 1,
    threads: Annotated[int, typer.Option(help="Of PyTorch.")] = 1,
    held_out: Annotated[bool, typer.Option(help="Ten batches that nothing was fitted to.")] = False,
    save: Annotated[bool, typer.Option(help="Keep the table under benchmarks/results/.")] = True,
) -> None:
    """Measures the cases and prints the table that is kept under benchmarks/results/."""
    torch.set_num_threads(threads)
    if child:
        fields, folder = json.loads(child)
        fields["shapes"] = tuple(tuple(shape) for shape in fields["shapes"])
        print(json.dumps(measure(Case(**fields), Path(folder))))
        return
    cases, name = (HELD_OUT, "memory_plan_held_out_cpu") if held_out else (CASES, "memory_plan_cpu")
    chosen = [cases[number - 1] for number in only] if only else list(cases)
    results = []
    with model_folders() as folders:
        for case in chosen:
            for _ in range(repeat):
                results.append(run(case, folders[case.model]))
                print(table(results[-1:]).splitlines()[-1], flush=True)
    text = report(results, repeat, "peaks of other batches" if held_out else "peaks of these same batches")
    print(text)
    if save and not only:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.md").write_text(text, encoding="utf-8")
        record = [{**asdict(result), "date": str(date.today()), "device": device_name("cpu")} for result in results]
        (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
