"""`reelbatch tune` from the command line."""

from __future__ import annotations

import json
import weakref
from pathlib import Path

import pytest
from tuning import AMPLE, CPU, call, profile, small
from typer.testing import CliRunner

from reelbatch.cli import app
from reelbatch.loading.inspection import ModelInfo
from reelbatch.tune import bench, profiles, run


def test_tune_measures_keeps_and_generate_takes_it(tiny_folder: Path, here: Path) -> None:
    words = ("--model", tiny_folder, "--shape", "32x32x5", "--budget", f"{AMPLE}s", "--max-batch", "2", "--out", "t")
    result = call("tune", *words, "--json")
    assert result.exit_code == 0, result.output
    (found,) = json.loads(result.stdout)["sweeps"]
    assert found["workload"] == "32×32, 5 frames, 3 steps"
    assert "left)" in result.stderr
    assert (here / "t" / "tune.html").is_file()
    asked = ("generate", "a cat", "a dog", "--model", tiny_folder, "--frames", "5", "--out", "o", "--json")
    made = call(*asked)
    assert made.exit_code == 0
    size = found["choice"]["exact_batch"]
    assert f"batch size {size}: as tuned for 32×32×5 on" in made.stderr
    largest = {json.loads(line)["batch"]["largest"] for line in made.stdout.splitlines()}
    assert max(largest) == min(size, 2)
    other = call(*asked[:-3], "--out", "o2", "--json", "--width", "48")
    assert "batch size 8: the stored profile is not used: it is of 32×32×5, and this is 48×32×5" in other.stderr
    own = call(*asked[:-3], "--out", "o3", "--json", "--batch-size", "1")
    assert "batch size" not in own.stderr
    listed = call("tune", "--show")
    assert "32×32×5" in listed.stdout
    assert "usable" in listed.stdout
    (stored,) = json.loads(call("tune", "--show", "--json").stdout)
    assert stored["profile"]["exact_batch_size"] == size
    assert stored["problem"] is None


def test_tune_takes_a_prompt_file_and_several_dtypes(tiny_folder: Path, here: Path) -> None:
    (here / "p.csv").write_text("prompt,frames,width\na cat,1,32\na dog,1,48\n", encoding="utf-8")
    words = (
        "--model",
        tiny_folder,
        "--prompts",
        "p.csv",
        "--dtypes",
        "bf16,fp32",
        "--budget",
        f"{AMPLE}s",
        "--max-batch",
        "2",
    )
    result = call("tune", *words)
    assert result.exit_code == 0, result.output
    assert "p.csv: 2 videos of 2 shapes" in result.stdout
    assert "bfloat16" in result.stdout
    saved = json.loads((here / "out" / "tune" / "tune.json").read_text(encoding="utf-8"))
    assert [s["dtype"] for s in saved["sweeps"]] == ["bfloat16", "float32"]
    compared = [p["quality"] for p in saved["sweeps"][0]["points"] if p["quality"]]
    assert {quality["against"] for quality in compared} == {"float32 alone"}
    assert any(quality["largest"] > 0 for quality in compared)


def test_other_dtypes_alone_are_compared_with_fp32_all_the_same_one_model_after_the_other(
    info: ModelInfo, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, loaded = run.load, []

    def watched(*given, **options):
        assert [model() for model in loaded] == [None] * len(loaded)  # no two are there at once
        model = load(*given, **options)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(run, "load", watched)
    found = run.Tuning(
        info, [small(info, 1)], CPU, dtypes=["bf16"], against_fp32=True, budget=AMPLE, largest=1, keep=False
    ).run()
    assert len(loaded) == 2
    (point,) = found.sweeps[0].points
    assert point.quality.against == "float32 alone"
    assert not profiles.stored()


def test_ctrl_c_leaves_what_was_measured_and_stores_nothing(
    tiny_folder: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import signal

    say = bench.Bench.say

    def stopping(self, text, left=None, at_most=False, done=False):
        say(self, text, left, at_most, done)
        if done:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(bench.Bench, "say", stopping)
    result = call("tune", "--model", tiny_folder, "--shape", "32x32x1", "--budget", f"{AMPLE}s", "--out", "t")
    assert result.exit_code == 130
    assert "stopped; this is what was measured until then, and no profile was stored" in result.stderr
    saved = json.loads((here / "t" / "tune.json").read_text(encoding="utf-8"))
    assert saved["interrupted"]
    assert [p["batch"] for p in saved["sweeps"][0]["points"]] == [1]
    assert not profiles.stored()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--shape", "64"), "expected WIDTHxHEIGHTxFRAMES"),
        (("--shape", "50x64x9"), "width=50 must be a multiple of 16"),
        (("--budget", "soon"), "--budget 'soon': expected a time above 0, such as 90s, 5m or 1h30m"),
        (("--max-latency", "0s"), "--max-latency '0s': expected a time above 0"),
        (("--max-memory", "much"), "memory size 'much' cannot be read"),
        (("--dtypes", ","), "names between commas"),
        (("--dtypes", "fp32,fp31"), "'fp31'"),
        (("--dtypes", "fp32", "--dtype", "bf16"), "give one of them"),
        (("--shape", "64x64x9", "--prompts", "p.txt"), "give one of them"),
        (("--steps", "0"), "steps=0 must be a whole number"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_a_model_is_loaded(
    tiny_folder: Path, here: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], told: str
) -> None:
    monkeypatch.setattr("reelbatch.tune.run.load", lambda *_, **__: pytest.fail("the model was loaded"))
    result = call("tune", "--model", tiny_folder, *words)
    assert result.exit_code != 0
    assert told in str(result.exception)


def test_no_profile_is_listed_as_none_and_a_damaged_one_as_damaged(cache: Path, about: profiles.Identity) -> None:
    assert "no profile is stored in" in call("tune", "--show").stderr
    profiles.store(profile(about)).write_text("{")
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["tune", "--show"])
    assert "is damaged" in result.stdout


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("90s", 90), ("5m", 300), ("1h30m", 5400), ("1.5 h", 5400)])
def test_times_are_read_as_people_write_them(text: str, seconds: float) -> None:
    assert run.parse_seconds(text, "--budget") == seconds
