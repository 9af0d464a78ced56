"""The whole of `reelbatch tune`: every workload in every dtype, and the advice put where `generate` finds it."""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date, datetime

import torch

from reelbatch.device import choose_device, device_memory_bytes, free_memory, gibibytes, held_bytes
from reelbatch.engine.config import EngineConfig
from reelbatch.loading.hub import ModelFolderError
from reelbatch.loading.identity import identity
from reelbatch.loading.inspection import ModelInfo
from reelbatch.loading.load import load
from reelbatch.loading.lora import lora_label
from reelbatch.loading.model import Model
from reelbatch.loading.precision import Precision
from reelbatch.loading.skeleton import from_folder
from reelbatch.memory.estimate import Estimator
from reelbatch.memory.identity import Identity
from reelbatch.memory.placement import Offload, check_offload, offloads
from reelbatch.tune.choose import NO_LIMITS, Limits
from reelbatch.tune.gauges import Neighbours
from reelbatch.tune.measure import DoesNotFit
from reelbatch.tune.profiles import Profile, store
from reelbatch.tune.quality import Alone
from reelbatch.tune.report import Report
from reelbatch.tune.results import SweepResult, Update
from reelbatch.tune.sweep import Sweep
from reelbatch.tune.workload import Workload

BUSY_CORES = 0.2
"""Cores in use by other programs from which a person is warned."""
REFERENCE_SHARE = 0.15
"""The share of the budget for the fp32 videos alone, where fp32 itself is not measured."""


@dataclass
class Tuning:
    """Measures, chooses, and stores the advice.

    Args:
        config: of the engine: device, attention and LoRAs.
        dtypes: in the order in which they are shown; "auto" is the device's own.
        against_fp32: whether quality is against fp32 alone, rather than against each dtype's own videos alone.
        offload: which weights are on the device; None takes the first that is estimated to fit one video of the
            largest shape: none, component, block.
        budget: seconds for all of it, loading included.
        limits: of the choice.
        largest: batch size tried.
        memory_limit: bytes not to be passed; None asks the device.
        keep: whether profiles are stored. Those of a run that was stopped never are.
        command: the command that measures the same anew, without its budget.
        on_update: called with what is going on.
        stopping: asked between steps.

    Raises:
        ValueError: for a device, a dtype or an offload that cannot be here.
    """

    info: ModelInfo
    workloads: Sequence[Workload]
    config: EngineConfig = EngineConfig()  # noqa: RUF009  (frozen)
    dtypes: Sequence[str] = ("auto",)
    against_fp32: bool = False
    offload: Offload | None = None
    budget: float = 90.0
    limits: Limits = NO_LIMITS
    largest: int = 32
    memory_limit: int | None = None
    keep: bool = True
    command: str = "reelbatch tune"
    on_update: Callable[[Update], None] = lambda _: None
    stopping: Callable[[], bool] = lambda: False

    def __post_init__(self) -> None:
        self._started, self._neighbours = time.perf_counter(), Neighbours()
        self.device = choose_device(self.config.device)
        self._dtypes = list(dict.fromkeys(Precision.parse(dtype, self.device) for dtype in self.dtypes))
        self._fp32 = Precision.parse("float32", self.device)
        for dtype in self._dtypes:
            check_offload(self.offload or "none", self.device, dtype.int8)
        self._results: dict[tuple[str, Precision], SweepResult] = {}
        self._references: dict[str, Alone | None] = {}
        self._notes: list[str] = []

    def run(self) -> Report:
        """Raises MemoryError if not even one video fits."""
        if self.against_fp32 and self._fp32 not in self._dtypes:
            self._generate_references()
        order = sorted(self._dtypes, key=lambda dtype: self.against_fp32 and dtype != self._fp32)
        runs = [(dtype, workload) for dtype in order for workload in self.workloads]
        model: Model | None = None
        for number, (dtype, workload) in enumerate(runs):
            if self.stopping():
                break
            if model is None or model.precision != dtype:
                model = None  # the one before is let go first
                free_memory(whole=True)
                model = self._load(dtype)
            left = max(self.budget - self._seconds(), 0.0)
            self._sweep(model, workload, left / (len(runs) - number), len(runs))
        if self.device.type == "cpu" and self._neighbours.cores() > BUSY_CORES:
            self._notes.append(
                f"Other programs used {self._neighbours.cores():.1f} of {os.cpu_count()} cores meanwhile: on a quiet "
                "machine it is faster, and another batch size may be best. Measure again when it is quiet."
            )
        return self._report(interrupted=len(self._results) < len(runs))

    def _seconds(self) -> float:
        return time.perf_counter() - self._started

    def _load(self, dtype: Precision, why: str = "") -> Model:
        self.on_update(Update(f"loading {self.info.name} in {dtype}{why}"))
        kind, note = self.offload, None
        if kind is None:
            kind, note = first_that_fits(self.info, self.workloads, self.device, dtype, self.limits)
        self._notes += [note] if note and not why else []
        return load(self.info.folder, self.device, dtype, kind, self.config.loras)

    def _sweep(self, model: Model, workload: Workload, budget: float, sweeps: int) -> None:
        sweep = Sweep(
            model,
            workload,
            budget,
            self.limits,
            self.config,
            command=lambda seconds: self._again(seconds * sweeps),
            reference=self._references.get(workload.name),
            largest=self.largest,
            memory_limit=self.memory_limit,
            on_update=self._titled(workload, model.precision),
            stopping=self.stopping,
        )
        self._results[workload.name, model.precision] = sweep.run()
        if self.against_fp32 and model.precision == self._fp32:
            self._references[workload.name] = sweep.alone

    def _again(self, seconds: float) -> str:
        """The command that measures the same in so much time, at least twice as much as now."""
        return f"{self.command} --budget {math.ceil(max(seconds, 2 * self.budget) / 60)}m"

    def _generate_references(self) -> None:
        """Videos alone in fp32, for the quality of other dtypes; a note, where fp32 does not fit."""
        budget = REFERENCE_SHARE * self.budget / len(self.workloads)
        try:
            model = self._load(self._fp32, ", to compare with")
            for workload in self.workloads:
                on_update = self._titled(workload, self._fp32)
                sweep = Sweep(model, workload, budget, config=self.config, on_update=on_update, stopping=self.stopping)
                self._references[workload.name] = sweep.run_alone()
        except (ModelFolderError, DoesNotFit, MemoryError, torch.OutOfMemoryError) as error:
            self._references.clear()
            self._notes.append(f"quality is against each dtype's own videos alone, as float32 does not fit: {error}")

    def _titled(self, workload: Workload, dtype: Precision) -> Callable[[Update], None]:
        """Updates that say which sweep they are of, where there is more than one."""
        if len(self.workloads) == 1 and self._dtypes == [dtype]:
            return self.on_update
        return lambda update: self.on_update(update._replace(text=f"{workload.name}, {dtype}: {update.text}"))

    # -- what comes out ----------------------------------------------------------------------------

    def _report(self, interrupted: bool) -> Report:
        keys = [(workload.name, dtype) for workload in self.workloads for dtype in self._dtypes]
        sweeps = [self._results[key] for key in keys if key in self._results]
        interrupted |= any(sweep.interrupted for sweep in sweeps)
        about = self._identity("", self._dtypes[0])
        stored = [] if interrupted or not self.keep else [self._store(sweep) for sweep in sweeps if sweep.chosen]
        return Report(
            model=" + ".join([self.info.name, *(lora_label(path, scale) for path, scale in self.config.loras)]),
            weights=about.weights,
            device=about.device,
            versions=about.versions,
            attention=self.config.attention,
            when=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
            budget=self.budget,
            seconds=self._seconds(),
            sweeps=tuple(sweeps),
            interrupted=interrupted,
            limits=self.limits,
            notes=tuple(self._notes),
            profiles=tuple(stored),
        )

    def _identity(self, shapes: str, dtype: Precision | str) -> Identity:
        folder, name, config = self.info.folder, self.info.name, self.config
        return identity(
            folder, name, shapes, device=self.device, dtype=dtype, attention=config.attention, loras=config.loras
        )

    def _store(self, sweep: SweepResult) -> str:
        """Stores the advice of a sweep; returns its file."""
        point, choice = sweep.chosen, sweep.choice
        assert point is not None and choice is not None
        profile = Profile(
            identity=self._identity(sweep.shapes, sweep.dtype),
            batch_size=choice.batch,
            isolation=choice.isolation,
            exact_batch_size=choice.exact_batch,
            packed_batch_size=choice.packed_batch,
            videos_per_hour=point.videos_per_hour,
            last_video_seconds=point.last_video_seconds,
            peak_bytes=point.memory.peak,
            offload=sweep.offload,
            why=choice.why,
            measured=date.today(),
        )
        return str(store(profile))


def first_that_fits(
    info: ModelInfo, workloads: Sequence[Workload], device: torch.device, dtype: Precision, limits: Limits
) -> tuple[Offload, str | None]:
    """The first offload with which one video of the largest shape is estimated to fit, and why (None: nothing waits).

    "none" too where nothing fits: the estimate may err, and measuring says the rest.
    """
    requests = [request for workload in workloads for request in workload.requests]
    largest = max(requests, key=lambda request: request.pixels)
    available = device_memory_bytes(device) if limits.max_memory is None else limits.max_memory
    held = held_bytes(device) if device.type == "cpu" else 0
    estimator = Estimator(from_folder(info.folder, dtype, device), "exact", device)
    need: dict[Offload, int] = {}
    for kind in offloads(device, dtype.int8):
        need[kind] = held + estimator.plan([largest], kind).peak
        if need[kind] <= available:
            break
    takes = ", ".join(f"{gibibytes(size)} with --offload {kind}" for kind, size in need.items())
    estimate = f"one video is estimated to take {takes}, and there are {gibibytes(available)}."
    if need[kind] > available:
        return "none", f"O{estimate[1:]}"
    return kind, None if kind == "none" else f"Measured with --offload {kind} ({dtype}): {estimate}"


# -- what a person types ---------------------------------------------------------------------------


def parse_seconds(text: str, option: str) -> float:
    """Seconds of 90, 90s, 5m or 1h30m. Raises ValueError, naming the option, for anything else."""
    match = re.fullmatch(
        r"\s*(?:(\d+(?:\.\d+)?)\s*h)?\s*(?:(\d+(?:\.\d+)?)\s*m(?:in)?)?\s*(?:(\d+(?:\.\d+)?)\s*s?)?\s*", text
    )
    parts = zip(match.groups(), (3600, 60, 1), strict=True) if match else ()
    seconds = sum(float(part) * unit for part, unit in parts if part)
    if not seconds:
        raise ValueError(f"{option} {text!r}: expected a time above 0, such as 90s, 5m or 1h30m")
    return seconds


def parse_dtypes(text: str) -> list[str]:
    """Names of dtypes between commas. Raises ValueError if there is none, or for one said part by part."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names or "=" in text:
        raise ValueError(f"--dtypes {text!r}: expected names between commas, such as fp32,bf16 (--dtype takes parts)")
    return names
