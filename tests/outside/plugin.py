"""Pytest plugin: Diffusers' own tests, judged on Diffusers' classes or on ours. `judge.py` runs them with it.

Environment:
    REELBATCH_JUDGE: whom the tests meet; see `sides.py`.
    REELBATCH_JUDGE_REPORT: the JSON file that is written, with the outcome of every test.

What else changes, changes for every side alike: the stand-ins of `hub.py`, and the tests of `added.py`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import added
import hub
import pytest
import sides
import torch

SIDE = os.environ.get("REELBATCH_JUDGE", "diffusers")

outcomes: dict[str, dict[str, Any]] = {}


def pytest_configure() -> None:
    torch.set_num_threads(1)
    hub.stay_local()
    sides.choose(SIDE)


@pytest.hookimpl(tryfirst=True)
def pytest_pycollect_makeitem(obj: object) -> None:
    if isinstance(obj, type) and isinstance(vars(obj).get("batch_params"), frozenset | list):  # a pipeline's tests
        added.add_to(obj)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    decided = outcomes.get(report.nodeid, {}).get("outcome") == "failed"
    if decided or (report.when != "call" and report.passed):
        return
    outcomes[report.nodeid] = {"outcome": report.outcome, "reason": _reason(report)}


def _reason(report: pytest.TestReport) -> str:
    if report.skipped and isinstance(report.longrepr, tuple):
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    return crash.message if crash else ""


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed:
        outcomes[report.nodeid] = {"outcome": "failed", "reason": str(report.longrepr)[-500:]}


def pytest_sessionfinish() -> None:
    if target := os.environ.get("REELBATCH_JUDGE_REPORT"):
        report = {"side": SIDE, "tests": outcomes, "differences": added.differences}
        Path(target).write_text(json.dumps(report, indent=1), encoding="utf-8")
