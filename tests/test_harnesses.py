"""Fast versions of the harnesses under `benchmarks/`: kills, races and interrupts lose, double and alter nothing."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from reelbatch.loading.load import load

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def harness(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_jobs_that_are_killed_stopped_and_started_together_are_the_undisturbed_ones(tiny_folder: Path) -> None:
    words = ["--kills", "4", "--races", "1", "--processes", "2", "--copies", "1", "--seed", "3"]
    command = [sys.executable, str(BENCHMARKS / "kills.py"), *words, "--longest", "0.8", "--model", str(tiny_folder)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("lost 0, doubled 0, wrong 0, crashed 0") == 2


@pytest.mark.parametrize("jobs", [False, True])
def test_whatever_raises_loses_no_request(tiny_folder: Path, jobs: bool) -> None:
    counts = harness("interrupts").run(load(tiny_folder, "cpu", torch.float32), 30, 5, jobs)
    assert counts.total == 30
    assert (counts.lost, counts.doubled, counts.wrong) == (0, 0, 0)
