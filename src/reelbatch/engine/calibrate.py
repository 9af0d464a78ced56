"""Measures what a calibration of the memory estimates is fitted to: a few small videos, in a fresh process."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import torch

from reelbatch.device import choose_device, free_memory, held_bytes
from reelbatch.loading.hub import model_name, resolve_here
from reelbatch.loading.identity import any_shape
from reelbatch.loading.precision import Precision
from reelbatch.loading.skeleton import from_folder
from reelbatch.memory.calibration import CORRECTED, ESTIMATES, Calibration, CorrectedPhase, fit, store
from reelbatch.memory.estimate import LONGEST_PROMPT, Estimator, any_image, margin
from reelbatch.request import ModelLimits, VideoRequest

SIDES, FRAMES, STEPS = (128, 192, 256), (9, 17, 17), 2
"""About what is measured, from the smallest on: pixels, frames and steps."""
Peaks = dict[CorrectedPhase, int]
"""The most bytes that a video took in each phase, with the weights, above what the process held before."""


def small_videos(limits: ModelLimits) -> list[VideoRequest]:
    """Requests that a model can make, near to `SIDES` and `FRAMES`. Their prompt is as long as is read, which is also
    what estimates are for."""
    space, time = limits.spatial_stride, limits.temporal_stride
    sizes = [
        (max(side // space, 1) * space, (frames - 1) // time * time + 1)
        for side, frames in zip(SIDES, FRAMES, strict=True)
    ]
    return [
        VideoRequest(
            prompt=LONGEST_PROMPT,
            seed=0,
            steps=STEPS,
            frames=frames,
            **any_image(limits) | {"height": side, "width": side},
        )
        for side, frames in sizes
    ]


def measure(folder: Path, device: torch.device, dtype: str) -> list[Peaks]:
    """Peaks of each of the small videos; to be called in a fresh process, as memory that was used before is not seen to
    grow.

    Raises:
        Exception: whatever making a video fails with.
    """
    from reelbatch.engine.engine import Engine
    from reelbatch.engine.events import Event, Worked
    from reelbatch.loading.load import load
    from reelbatch.memory.gauge import memory_of

    # what was imported so far takes memory that is none of the model's
    before = held_bytes(device)
    engine = Engine(load(folder, device, dtype), gauge=memory_of(device))
    peaks: Peaks = {}

    def listen(event: Event) -> None:
        if isinstance(event, Worked) and event.peak_bytes is not None and event.phase != "text":
            peaks[event.phase] = max(peaks.get(event.phase, 0), event.peak_bytes - before)

    engine.subscribe(listen)
    videos = small_videos(engine.limits)
    results: list[Peaks] = []
    for request in [videos[0], *videos]:  # the first time, libraries are brought in
        free_memory(whole=True)
        peaks.clear()
        engine.generate([request.model_copy(update={"id": f"{request.id}-{len(results)}"})])
        results.append(dict(peaks))
    return results[1:]


def corrections(folder: Path, device: torch.device, dtype: str, measured: Sequence[Peaks]) -> Calibration:
    """What measured peaks say of the estimates for the same videos."""
    precision = Precision.parse(dtype, device)
    family = from_folder(folder, precision, device)
    estimator = Estimator(family, "exact", device)
    pairs: dict[CorrectedPhase, list[tuple[int, int]]] = {phase: [] for phase in CORRECTED}
    errors: dict[CorrectedPhase, list[float]] = {phase: [] for phase in CORRECTED}
    # PyTorch's allocator on a GPU does not see the context and the libraries: there these stay as assumed
    unseen = 0 if device.type == "cpu" else margin(device).bytes
    for request, peaks in zip(small_videos(family.limits), measured, strict=True):
        estimated = estimator.plan([request.for_model(family.limits)])
        for phase in CORRECTED:
            peak = peaks[phase] + unseen
            pairs[phase].append((getattr(estimated, phase), peak - estimated.weights[phase]))
            errors[phase].append(estimated.phases[phase] / peak - 1)
    return Calibration(
        identity=any_shape(folder, model_name(folder), device, dtype),
        estimates=ESTIMATES,
        step=fit(pairs["step"]),
        decode=fit(pairs["decode"]),
        errors={phase: tuple(errors[phase]) for phase in CORRECTED},
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
    folder = resolve_here(model)
    if not folder.is_dir():
        raise ValueError(f"model {model!r}: no such folder. Calibrating runs the model: give a model folder, or demo")
    chosen = choose_device(device)
    asked = json.dumps([str(folder), str(chosen), dtype, torch.get_num_threads()])
    child = subprocess.run([sys.executable, "-m", __name__, asked], capture_output=True, text=True)
    if child.returncode:
        raise RuntimeError(f"calibrating on {chosen} failed:\n{child.stderr[-2000:]}")
    calibration = corrections(folder, chosen, dtype, json.loads(child.stdout.splitlines()[-1]))
    store(calibration)
    return calibration


def _child(asked: str) -> None:
    folder, device, dtype, threads = json.loads(asked)
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")  # of prompts that are cut
    print(json.dumps(measure(Path(folder), torch.device(device), dtype)))


if __name__ == "__main__":
    _child(sys.argv[1])
