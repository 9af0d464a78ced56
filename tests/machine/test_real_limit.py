"""A limit that is real: a job whose batch dies of it is finished by the engine, in a process of its own."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

ABOVE_MIB, VIDEOS, SIDE = 110, 16, 256


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS is Linux's")
def test_a_job_whose_batch_does_not_fit_is_finished_under_the_same_limit() -> None:
    from real_limit import measure

    assert measure("at once", ABOVE_MIB, VIDEOS, SIDE) == ("out of memory", [])
    result, said = measure("engine", ABOVE_MIB, VIDEOS, SIDE)
    assert result == f"{VIDEOS} of {VIDEOS} videos made"
    assert said[0] == f"out of memory in a step of {VIDEOS} videos: it is done in parts"
