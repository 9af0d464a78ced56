"""Pytest plugin: Diffusers' own tests, judged on Diffusers' classes or on ours.

Used by `judge.py`, which says how to run it. REELBATCH_JUDGE picks whom the tests meet:

    diffusers   Diffusers' classes: the baseline
    ours        the classes of `SUBSTITUTES` in place of Diffusers' classes of those names
    repaired    Diffusers' pipelines, each given to `reelbatch.repair` once it is constructed

Everything else that this plugin changes, it changes for every side alike: the tiny tokenizers and models that the tests
would download are made here, and the batch tests that Diffusers skips are run, as are those of `batch.py`.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import batch
import diffusers
import hub
import pytest
import torch

SUBSTITUTES = {"HunyuanVideoTransformer3DModel": "reelbatch.models.hunyuan_video"}
"""Diffusers' class names, and the module that holds ours."""

PIPELINES = (
    "HunyuanVideoPipeline",
    "HunyuanVideoImageToVideoPipeline",
    "HunyuanSkyreelsImageToVideoPipeline",
    "HunyuanVideoFramepackPipeline",
    "HunyuanVideo15Pipeline",
    "HunyuanVideo15ImageToVideoPipeline",
)

SIDE = os.environ.get("REELBATCH_JUDGE", "diffusers")

outcomes: dict[str, dict[str, Any]] = {}


def substitute() -> None:
    """Our classes under Diffusers' names, wherever a test module or a pipeline looks them up."""
    for name, module in SUBSTITUTES.items():
        ours = getattr(importlib.import_module(module), name)
        theirs = getattr(diffusers, name)
        for place in (diffusers, diffusers.models, diffusers.models.transformers, inspect.getmodule(theirs)):
            setattr(place, name, ours)


def repair_when_constructed() -> None:
    repair = importlib.import_module("reelbatch").repair
    for name in PIPELINES:
        pipeline = getattr(diffusers, name)
        pipeline.__init__ = repaired_after(pipeline.__init__, repair)


def repaired_after(construct: Callable[..., None], repair: Callable[[Any], Any]) -> Callable[..., None]:
    @functools.wraps(construct)  # the signature is read by Diffusers, to know the components
    def construct_and_repair(self: Any, *args: Any, **kwargs: Any) -> None:
        construct(self, *args, **kwargs)
        repair(self)

    return construct_and_repair


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)
    hub.stay_local()
    if SIDE == "ours":
        substitute()
    elif SIDE == "repaired":
        repair_when_constructed()
    elif SIDE != "diffusers":
        raise pytest.UsageError(f"REELBATCH_JUDGE is {SIDE!r}; it is one of: diffusers, ours, repaired.")


@pytest.hookimpl(tryfirst=True)
def pytest_pycollect_makeitem(collector: pytest.Collector, name: str, obj: object) -> None:
    if isinstance(obj, type) and hasattr(vars(obj).get("batch_params"), "__iter__"):  # a pipeline's tests
        batch.unskip(obj)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    passed_a_phase = report.when != "call" and report.passed
    if passed_a_phase or outcomes.get(report.nodeid, {}).get("outcome") == "failed":
        return
    record = {"outcome": report.outcome, "seconds": round(report.duration, 2), "reason": _reason(report)}
    outcomes[report.nodeid] = {key: value for key, value in record.items() if value != ""}


def _reason(report: pytest.TestReport) -> str:
    if report.skipped and isinstance(report.longrepr, tuple):
        return report.longrepr[2].removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    return crash.message if crash else ""


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed:
        outcomes[report.nodeid] = {"outcome": "failed", "reason": str(report.longrepr)[-500:]}


def pytest_sessionfinish() -> None:
    if target := os.environ.get("REELBATCH_JUDGE_REPORT"):
        report = {"side": SIDE, "tests": outcomes, "largest_difference": batch.largest_difference}
        Path(target).write_text(json.dumps(report, indent=1), encoding="utf-8")
