"""A memory plan held against a few small measured videos: corrections of its estimates, for one model on one device.

They are kept in the user's cache directory, and hold for the same weights, device, dtype and versions only.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field

from reelbatch.device import cache_folder, choose_device, held_bytes, trim_heap
from reelbatch.loading.hub import DEMO_FOLDER
from reelbatch.loading.precision import Precision
from reelbatch.memory.estimate import Network, Plan, VideoShape, plan, runtime_bytes
from reelbatch.request import ModelLimits, VideoRequest
from reelbatch.tune.gauges import memory_of
from reelbatch.tune.profiles import Identity, identity

if TYPE_CHECKING:
    from reelbatch.engine.engine import Engine

CorrectedPhase = Literal["step", "decode"]
PHASES: tuple[CorrectedPhase, ...] = ("step", "decode")
SIDES, FRAMES, STEPS = (128, 192, 256), (9, 17, 17), 2
"""About what is measured, from the smallest on: pixels, frames and steps."""
SCALES = (0.8, 1.25)
"""What a scale is kept within: the videos measured are small, and those planned for are not."""


class Correction(BaseModel):
    """Activations of a phase are `scale` × the estimate + `offset` bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    scale: float = Field(gt=0)
    offset: int

    def of(self, estimated: int) -> int:
        return max(int(self.scale * estimated) + self.offset, 0)


class Calibration(BaseModel):
    """Corrections for an identity, and the errors of the uncorrected estimates (over measured, less 1)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    identity: Identity
    step: Correction
    decode: Correction
    errors: dict[CorrectedPhase, tuple[float, ...]]
    measured: date

    def corrected(self, estimated: Plan) -> Plan:
        """The plan with its steps and its decoding corrected; weights and text stay."""
        return replace(estimated, step=self.step.of(estimated.step), decode=self.decode.of(estimated.decode))

    @property
    def line(self) -> str:
        return f"corrected by {len(self.errors['step'])} small videos measured here on {self.measured}"


class Peaks(NamedTuple):
    """Of one video, in bytes: peaks of a phase with the weights, and the tokens of its text."""

    shape: tuple[int, int, int]
    text_tokens: int
    step: int
    decode: int


def small_shapes(limits: ModelLimits) -> list[tuple[int, int, int]]:
    """Heights, widths and frames that a model can make, near to `SIDES` and `FRAMES`."""
    space, time = limits.spatial_stride, limits.temporal_stride
    return [
        (max(side // space, 1) * space, max(side // space, 1) * space, (frames - 1) // time * time + 1)
        for side, frames in zip(SIDES, FRAMES, strict=True)
    ]


def measure(engine: Engine, held_before: int = 0, shapes: Sequence[tuple[int, int, int]] | None = None) -> list[Peaks]:
    """Makes a small video of each shape, one after the other, and takes the peaks of a step; then those of decoding.

    Args:
        engine: idle; on a CPU it is best opened in a fresh process, as memory that was used before is not seen to grow.
        held_before: bytes that the process held before the model was loaded; they are taken off.
        shapes: heights, widths and frames, ascending; `small_shapes` if not given.

    Raises:
        Exception: whatever making a video fails with.
    """
    model = engine.model
    memory, decoder = memory_of(model.device), model.family.decoder
    text: list[int] = []
    steps: list[int] = []
    kept: list[torch.Tensor] = []
    decode = decoder.decode

    def starts(_: torch.nn.Module, __: object, given: dict[str, Any]) -> None:
        if len(text) == len(steps):
            text.append(len(given["packs"][0][0].text))
            memory.reset()  # what encoding the text took is not the step's

    def keep(latents: torch.Tensor) -> torch.Tensor:
        steps.append(memory.peak())
        kept.append(latents)
        return torch.zeros(1, 16, 16, 3)

    hook = model.family.transformer.register_forward_pre_hook(starts, with_kwargs=True)
    decoder.decode = keep  # type: ignore[method-assign]
    sizes = list(shapes or small_shapes(engine.limits))
    try:
        for height, width, frames in sizes:
            trim_heap()
            engine.generate([VideoRequest(prompt="a", height=height, width=width, frames=frames, steps=STEPS, seed=0)])
    finally:
        hook.remove()
        decoder.decode = decode  # type: ignore[method-assign]
    decodes = []
    for latents in kept:  # after all steps, which would else be counted with the libraries that decoding brings in
        trim_heap()
        memory.reset()
        decode(latents)
        decodes.append(memory.peak())
    return [
        Peaks(size, tokens, step - held_before, decoded - held_before)
        for size, tokens, step, decoded in zip(sizes, text, steps, decodes, strict=True)
    ]


def fit(pairs: Sequence[tuple[int, int]]) -> Correction:
    """Of pairs of estimated and measured bytes: their least-squares line, raised to where none is underestimated."""
    count = len(pairs)
    middle, level = sum(x for x, _ in pairs) / count, sum(y for _, y in pairs) / count
    spread = sum((x - middle) ** 2 for x, _ in pairs)
    slope = sum((x - middle) * (y - level) for x, y in pairs) / spread if spread else 1.0
    scale = min(max(slope, SCALES[0]), SCALES[1])
    return Correction(scale=scale, offset=round(max(y - scale * x for x, y in pairs)))


def corrections(wanted: Identity, network: Network, peaks: Sequence[Peaks], precision: Precision) -> Calibration:
    """What peaks say of the plan's estimates for videos of their shapes."""
    device = torch.device(wanted.device.partition(":")[0])
    pairs: dict[CorrectedPhase, list[tuple[int, int]]] = {phase: [] for phase in PHASES}
    errors: dict[CorrectedPhase, list[float]] = {phase: [] for phase in PHASES}
    for peak in peaks:
        shape = VideoShape(*peak.shape, text_tokens=peak.text_tokens)
        estimated = plan(network, [shape], dtypes=precision, device=device)
        for phase in PHASES:
            # PyTorch's allocator on a GPU does not see the context and the libraries: there these stay as assumed
            besides = 0 if device.type == "cpu" else runtime_bytes(phase, torch.float32, device)
            measured = getattr(peak, phase) + besides
            activations = getattr(estimated, phase)
            pairs[phase].append((activations, measured - estimated.weights[phase]))
            errors[phase].append(estimated.phases[phase] / measured - 1)
    return Calibration(
        identity=wanted,
        step=fit(pairs["step"]),
        decode=fit(pairs["decode"]),
        errors={phase: tuple(errors[phase]) for phase in PHASES},
        measured=date.today(),
    )


def calibrate(model: str, *, device: str = "auto", dtype: str = "auto") -> Calibration:
    """Measures in a fresh process, fits, and stores.

    Args:
        model: "demo" or a folder in the Diffusers layout.

    Raises:
        ValueError: for a model that is no folder here, and for a device that is not here.
        RuntimeError: if the process failed, with the end of what it said.
    """
    folder = _folder(model)
    chosen, network = choose_device(device), Network.from_folder(folder)
    wanted = _identity(folder, network.name, chosen, dtype)
    asked = json.dumps([str(folder), str(chosen), dtype, torch.get_num_threads()])
    done = subprocess.run([sys.executable, "-m", __name__, asked], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"calibrating on {chosen} failed:\n{done.stderr[-2000:]}")
    peaks = [
        Peaks((height, width, frames), *rest)
        for (height, width, frames), *rest in json.loads(done.stdout.splitlines()[-1])
    ]
    found = corrections(wanted, network, peaks, Precision.parse(dtype, chosen))
    store(found)
    return found


def store(calibration: Calibration) -> Path:
    """Writes a calibration, in the place of one of the same model, device and dtype; returns its file."""
    path = _path(calibration.identity)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_text(calibration.model_dump_json(indent=2) + "\n", encoding="utf-8")
    part.replace(path)
    return path


class Found(NamedTuple):
    """A stored calibration that fits, or None and why the one that is there does not."""

    calibration: Calibration | None = None
    refused: str | None = None


def find(folder: Path, model: str, device: torch.device, dtype: Precision | str) -> Found:
    """The stored calibration of a model on a device that is here."""
    wanted = _identity(folder, model, device, dtype)
    try:
        text = _path(wanted).read_text(encoding="utf-8")
    except OSError:
        return Found()
    try:
        calibration = Calibration.model_validate_json(text)
    except ValueError:
        return Found(None, f"{_path(wanted).name} is damaged or of another version")
    differences = calibration.identity.differences(wanted)
    return Found(None, "; ".join(differences)) if differences else Found(calibration)


def _folder(model: str) -> Path:
    folder = DEMO_FOLDER if model == "demo" else Path(model).expanduser()
    if not folder.is_dir():
        raise ValueError(f"model {model!r}: no such folder. Calibrating runs the model: give a model folder, or demo")
    return folder


def _identity(folder: Path, model: str, device: torch.device, dtype: Precision | str) -> Identity:
    return identity(folder, model, "any shape", device=device, dtype=dtype)


def _path(wanted: Identity) -> Path:
    key = hashlib.sha256(json.dumps([wanted.model, wanted.device, wanted.dtype]).encode()).hexdigest()[:16]
    return cache_folder() / "calibrations" / f"{key}.json"


def _child(asked: str) -> None:
    import transformers

    from reelbatch.engine.engine import Engine

    folder, device, dtype, threads = json.loads(asked)
    torch.set_num_threads(threads)
    # importing these takes memory that is none of the model's
    _ = transformers.LlamaModel, transformers.CLIPTextModel, transformers.PreTrainedTokenizerFast
    before = held_bytes(device)
    print(json.dumps(measure(Engine.from_pretrained(folder, device=device, dtype=dtype), before)))


if __name__ == "__main__":
    _child(sys.argv[1])
