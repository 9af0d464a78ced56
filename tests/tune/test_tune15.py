"""`reelbatch tune` of HunyuanVideo 1.5."""

from __future__ import annotations

import json
from pathlib import Path

import tiny15
from tuning import AMPLE, call


def test_tune_measures_a_model_of_1_5_and_generate_takes_it(tmp_path: Path, here: Path) -> None:
    folder = tiny15.make_folder(tmp_path / "tiny15")
    words = ("--model", folder, "--shape", "32x32x1", "--budget", f"{AMPLE}s", "--max-batch", "2", "--out", "t")
    result = call("tune", *words, "--json")
    assert result.exit_code == 0, result.output
    (found,) = json.loads(result.stdout)["sweeps"]
    assert {point["batch"] for point in found["points"]} == {1, 2}
    assert all(p["quality"]["equal"] for p in found["points"] if p["isolation"] == "exact" and p["quality"])
    asked = ("generate", "a cat", 'a sign, "go"', "--model", folder, "--width", "32", "--height", "32", "--frames", "1")
    made = call(*asked, "--out", "o", "--json")
    assert made.exit_code == 0, made.output
    assert f"batch size {found['choice']['exact_batch']}: as tuned for 32×32×1 cfg on" in made.stderr
