"""The whole of `reelbatch tune`: every workload in every dtype, and the advice put where `generate` finds it."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Sequence
from datetime import date, datetime

import torch

from reelbatch.device import choose_device, device_memory_bytes, gibibytes, held_bytes
from reelbatch.loading.hub import ModelFolderError
from reelbatch.loading.inspection import ModelInfo
from reelbatch.loading.load import load
from reelbatch.loading.model import Model
from reelbatch.loading.precision import Precision
from reelbatch.loading.skeleton import from_folder
from reelbatch.memory.estimate import Estimator
from reelbatch.memory.placement import Offload, check_offload, offloads
from reelbatch.tune import profiles
from reelbatch.tune.choose import NO_LIMITS, Limits
from reelbatch.tune.gauges import Others, tidy
from reelbatch.tune.profiles import Profile
from reelbatch.tune.quality import Alone
from reelbatch.tune.report import Report
from reelbatch.tune.sweep import News, Sweep, Swept
from reelbatch.tune.workload import Workload, pixels

BUSY_CORES = 0.2
"""Cores in use by others from which a person is told."""
REFERENCE_SHARE = 0.15
"""Of the budget, for the fp32 videos alone where fp32 itself is not measured."""


def tune(
    info: ModelInfo,
    workloads: Sequence[Workload],
    *,
    device: str = "auto",
    dtypes: Sequence[str] = ("auto",),
    against_fp32: bool = False,
    attention: str = "auto",
    budget: float = 90.0,
    limits: Limits = NO_LIMITS,
    largest: int = 32,
    keep: bool = True,
    memory_limit: int | None = None,
    offload: Offload | None = None,
    tell: Callable[[News], None] = lambda _: None,
    stopping: Callable[[], bool] = lambda: False,
) -> Report:
    """Measures, chooses, and keeps the advice.

    Args:
        dtypes: in the order in which they are shown; "auto" is the device's own.
        against_fp32: whether quality is against fp32 alone, rather than against each dtype's own videos alone.
        budget: seconds for all of it, loading included.
        largest: batch size tried.
        keep: whether profiles are stored. Those of a run that was stopped never are.
        memory_limit: bytes not to be passed; None asks the device.
        offload: which weights are on the device; None takes the first that is estimated to fit one video of the
            largest shape: none, component, block.

    Raises:
        ValueError: for an offload that cannot be here.
    """
    started = time.perf_counter()
    others = Others()
    chosen_device = choose_device(device)
    wanted = list(dict.fromkeys(Precision.parse(dtype, chosen_device) for dtype in dtypes))
    fp32 = Precision.parse("float32", chosen_device)
    for dtype in wanted:
        check_offload(offload or "none", chosen_device, dtype.int8)
    order = sorted(wanted, key=lambda dtype: dtype != fp32) if against_fp32 else wanted
    swept: dict[tuple[str, Precision], Swept] = {}
    references: dict[str, Alone | None] = {}
    notes: list[str] = []
    stopped = False

    def left() -> float:
        return budget - (time.perf_counter() - started)

    if against_fp32 and fp32 not in wanted:
        references, note = _fp32_alone(
            info, workloads, chosen_device, attention, REFERENCE_SHARE * budget, offload, tell, stopping
        )
        notes += note
    runs = [(dtype, workload) for dtype in order for workload in workloads]
    model: Model | None = None
    for number, (dtype, workload) in enumerate(runs):
        if stopping():
            stopped = True
            break
        if model is None or model.precision != dtype:
            model = None  # the one before is let go first
            tidy(chosen_device)
            tell(News(f"loading {info.name} in {dtype}"))
            kind, why = (offload, None) if offload else first_that_fits(info, workloads, chosen_device, dtype, limits)
            notes += [why] if why else []
            model = load(info.folder, chosen_device, dtype, offload=kind)
        sweep = Sweep(
            model,
            workload,
            budget=max(left(), 0.0) / (len(runs) - number),
            limits=limits,
            attention=attention,
            reference=references.get(workload.name),
            largest=largest,
            memory_limit=memory_limit,
            tell=_titled(tell, workload, dtype, len(runs) > 1),
            stopping=stopping,
        )
        found = sweep.run()
        swept[workload.name, dtype] = found
        if against_fp32 and dtype == fp32:
            references[workload.name] = sweep.alone
        stopped |= found.interrupted
    if chosen_device.type == "cpu" and others.cores() > BUSY_CORES:
        notes.append(
            f"Other programs used {others.cores():.1f} of {os.cpu_count()} cores meanwhile: on a quiet machine it is "
            "faster, and another batch size may be best. Measure again when it is quiet."
        )
    in_order = [
        swept[workload.name, dtype] for workload in workloads for dtype in wanted if (workload.name, dtype) in swept
    ]
    stored = [] if stopped or not keep else _store(info, in_order, chosen_device, attention)
    about = profiles.identity(info.folder, info.name, "", device=chosen_device, dtype=wanted[0], attention=attention)
    return Report(
        model=info.name,
        weights=about.weights,
        device=about.device,
        versions=about.versions,
        attention=attention,
        when=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        budget=budget,
        seconds=time.perf_counter() - started,
        sweeps=tuple(in_order),
        interrupted=stopped,
        limits=limits,
        notes=tuple(notes),
        profiles=tuple(stored),
    )


def first_that_fits(
    info: ModelInfo, workloads: Sequence[Workload], device: torch.device, dtype: Precision, limits: Limits
) -> tuple[Offload, str | None]:
    """The first offload with which one video of the largest shape is estimated to fit, and why (None: nothing waits).

    "none" too where nothing fits: the estimate may err, and measuring says the rest.
    """
    largest = max((request for workload in workloads for request in workload.requests), key=pixels)
    estimator = Estimator(from_folder(info.folder, dtype, device), "exact", device)
    available = device_memory_bytes(device) if limits.max_memory is None else limits.max_memory
    held = held_bytes(device) if device.type == "cpu" else 0
    need: dict[Offload, int] = {}
    for kind in offloads(device, dtype.int8):
        need[kind] = held + estimator.plan([largest], kind).peak
        if need[kind] <= available:
            break
    told = ", ".join(f"{gibibytes(size)} with --offload {kind}" for kind, size in need.items())
    if need[kind] > available:
        return "none", f"One video is estimated to take {told}, and there are {gibibytes(available)}."
    if kind == "none":
        return kind, None
    return kind, (
        f"Measured with --offload {kind} ({dtype}): one video is estimated to take {told}, and there are "
        f"{gibibytes(available)}."
    )


def _fp32_alone(
    info: ModelInfo,
    workloads: Sequence[Workload],
    device: torch.device,
    attention: str,
    budget: float,
    offload: Offload | None,
    tell: Callable[[News], None],
    stopping: Callable[[], bool],
) -> tuple[dict[str, Alone | None], list[str]]:
    """Videos alone in fp32, for the quality of other dtypes; none, and a note, where fp32 does not fit."""
    tell(News(f"loading {info.name} in float32, to compare with"))
    try:
        fp32 = Precision.parse("float32", device)
        kind = offload or first_that_fits(info, workloads, device, fp32, NO_LIMITS)[0]
        model = load(info.folder, device, fp32, offload=kind)
        found = {
            workload.name: Sweep(
                model,
                workload,
                budget=budget / len(workloads),
                attention=attention,
                tell=_titled(tell, workload, model.precision, True),
                stopping=stopping,
            ).run_alone()
            for workload in workloads
        }
    except (ModelFolderError, MemoryError, torch.OutOfMemoryError) as error:
        return {}, [f"quality is against each dtype's own videos alone, as float32 does not fit: {error}"]
    return found, []


def _store(info: ModelInfo, sweeps: Sequence[Swept], device: torch.device, attention: str) -> list[str]:
    stored = []
    for swept in sweeps:
        point, choice = swept.chosen, swept.choice
        if point is None or choice is None:
            continue
        profile = Profile(
            identity=profiles.identity(
                info.folder, info.name, swept.shapes, device=device, dtype=swept.dtype, attention=attention
            ),
            batch_size=choice.batch,
            isolation=choice.isolation,
            exact_batch_size=choice.exact_batch,
            packed_batch_size=choice.packed_batch,
            videos_per_hour=point.videos_per_hour,
            last_video_seconds=point.last_video_seconds,
            peak_bytes=point.memory.peak,
            offload=swept.offload,
            why=choice.why,
            measured=date.today(),
        )
        stored.append(str(profiles.store(profile)))
    return stored


def _titled(
    tell: Callable[[News], None], workload: Workload, dtype: Precision, several: bool
) -> Callable[[News], None]:
    """News that say which sweep they are of, where there is more than one."""
    if not several:
        return tell
    return lambda news: tell(news._replace(text=f"{workload.name}, {dtype}: {news.text}"))


# -- what a person types ---------------------------------------------------------------------------


def parse_seconds(text: str, option: str) -> float:
    """Seconds of 90, 90s, 5m or 1h30m. Raises ValueError, naming the option, for anything else."""
    found = re.fullmatch(
        r"\s*(?:(\d+(?:\.\d+)?)\s*h)?\s*(?:(\d+(?:\.\d+)?)\s*m(?:in)?)?\s*(?:(\d+(?:\.\d+)?)\s*s?)?\s*", text
    )
    seconds = (
        sum(float(part) * unit for part, unit in zip(found.groups(), (3600, 60, 1), strict=True) if part)
        if found
        else 0
    )
    if not seconds:
        raise ValueError(f"{option} {text!r}: expected a time above 0, such as 90s, 5m or 1h30m")
    return seconds


def parse_dtypes(text: str) -> list[str]:
    """Names of dtypes between commas. Raises ValueError if there is none, or for one said part by part."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names or "=" in text:
        raise ValueError(f"--dtypes {text!r}: expected names between commas, such as fp32,bf16 (--dtype takes parts)")
    return names
