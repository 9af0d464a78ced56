"""Diffusers' own HunyuanVideo tests, run against our classes. `judge.py` says what is run."""

from __future__ import annotations

import os
from pathlib import Path

import judge
import pytest


@pytest.mark.skipif(
    judge.SOURCE not in os.environ,
    reason=f"{judge.SOURCE} is not set. Set it to a folder with Diffusers' source tree (git clone of "
    "huggingface/diffusers at the installed version's tag) to run Diffusers' own tests on our classes.",
)
def test_what_passes_for_diffusers_passes_for_ours() -> None:
    runs = judge.run_all(Path(os.environ[judge.SOURCE]).resolve())
    print(judge.table(runs))
    complaints = judge.unexplained(runs)
    assert not complaints, "\n".join(complaints)
