"""The memory plan: calibrations, the command, and what it proposes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from reelbatch.cli import app
from reelbatch.device import parse_bytes
from reelbatch.engine.calibrate import calibrate, small_videos
from reelbatch.loading.precision import Precision
from reelbatch.memory.calibration import SCALES, Calibration, Correction, fit, store
from reelbatch.request import ModelLimits, VideoRequest
from reelbatch.tune.plan import LARGEST_BATCH, Setup, answer, open_model, remedies

MIB, GIB = 2**20, 2**30
PHASES = ("step", "decode")
CUDA = torch.device("cuda")


# -- calibration -----------------------------------------------------------------------------------


def test_a_line_through_what_was_measured() -> None:
    assert fit([(100, 120), (200, 230), (300, 340)]) == Correction(scale=1.1, offset=10)
    assert fit([(100, 70)]) == Correction(scale=1.0, offset=-30)
    steep = fit([(1000, 1000), (1200, 2000)])
    assert steep.scale == SCALES[1]
    assert steep.of(1000) >= 1000 and steep.of(1200) == 2000  # nothing that was measured is underestimated
    assert Correction(scale=1.0, offset=-50).of(20) == 0


def test_small_videos_are_those_of_the_model() -> None:
    sizes = [request.size for request in small_videos(ModelLimits())]
    assert sizes == [(128, 128, 9), (192, 192, 17), (256, 256, 17)]
    assert small_videos(ModelLimits(spatial_stride=300, temporal_stride=12))[0].size == (300, 300, 1)


def test_a_calibration_is_measured_stored_used_and_refused(tiny_folder: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("REELBATCH_CACHE", str(tmp_path))
    words = ("--model", tiny_folder, "--device", "cpu", "--height", 128, "--width", 128, "--frames", 9)
    before = asked(*words)
    assert before["calibrated"] is None
    after = asked(*words, "--calibrate")
    assert "corrected by 3 small videos measured here" in after["calibrated"]
    assert after["estimated"]["step"]["weights"] == before["estimated"]["step"]["weights"]
    assert after["estimated"]["text"] == before["estimated"]["text"]

    (file,) = (tmp_path / "calibrations").glob("*.json")
    kept = Calibration.model_validate_json(file.read_text())
    for phase in PHASES:
        estimated = before["estimated"][phase]["activations"]
        assert after["estimated"][phase]["activations"] == getattr(kept, phase).of(estimated)
        assert len(kept.errors[phase]) == 3
    assert asked(*words)["calibrated"] == after["calibrated"]
    assert "corrected by" in call(*words)[1]
    assert asked(*words, "--dtype", "bf16")["calibrated"] is None  # measured in float32

    making = ("generate", "a cat", "--model", str(tiny_folder), "--device", "cpu", "--steps", "1", "--frames", "1")
    made = CliRunner().invoke(app, [*making, "--out", str(tmp_path / "o"), "--max-memory", "40GiB"])
    assert "estimates of steps and decodes are corrected by 3 small videos measured here" in made.stderr

    versions = {**kept.identity.versions, "torch": "1.0"}
    store(kept.model_copy(update={"identity": kept.identity.model_copy(update={"versions": versions})}))
    stale = asked(*words)
    assert "measured with torch 1.0" in stale["calibrated"] and "--calibrate" in stale["calibrated"]
    assert stale["estimated"] == before["estimated"]
    file.write_text("{}")
    assert "damaged" in asked(*words)["calibrated"]


def test_only_what_is_here_is_calibrated() -> None:
    with pytest.raises(ValueError, match="Calibrating runs the model"):
        calibrate("hunyuanvideo-13b", device="cpu")


# -- sizes as people write them --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("20GiB", 20 * GIB),
        ("20GB", 20 * 10**9),
        ("20480MiB", 20 * GIB),
        (" 1.5 gib ", 3 * GIB // 2),
        ("1048576", MIB),
        ("0.5TiB", 512 * GIB),
    ],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "text", ["", "GiB", "20 bananas", "-5GiB", "0GiB", "1,5GiB", "nan", "20GiB left", "1e3GB", "24G", "5 4GB"]
)
def test_sizes_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="20GiB, 20GB or 20480MiB") as caught:
        parse_bytes(text)
    assert repr(text) in str(caught.value)


# -- the command -----------------------------------------------------------------------------------


def call(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["plan", *map(str, words)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout


def asked(*words: object) -> dict[str, Any]:
    code, out = call(*words, "--json")
    record: dict[str, Any] = json.loads(out)
    assert code == (0 if record["fits"] else 1)
    return record


BIG = ("--model", "hunyuanvideo-13b", "--device", "cuda")


def test_the_13b_without_a_folder() -> None:
    record = asked(*BIG, "--max-memory", "400GiB")
    assert record["parameters"]["transformer"] == 12_821_012_544
    assert (record["height"], record["width"], record["frames"]) == (720, 1280, 129)
    assert record["dtype"] == "bfloat16"
    assert record["fits"] and record["remedies"] == [] and record["largest_batch"] >= 2
    for phase in record["estimated"].values():
        assert phase["total"] == phase["weights"] + phase["activations"]
    assert record["peak"] == max(phase["total"] for phase in record["estimated"].values())


@pytest.mark.parametrize(
    ("available", "first"),
    [
        ("50GiB", ["--batch-size 1"]),
        ("45GiB", ["--offload component"]),
        ("38GiB", ["--offload component", "--batch-size 3"]),
        ("24GiB", ["--offload block"]),
        ("16GiB", ["--offload block", "--batch-size 3"]),
    ],
)
def test_every_remedy_is_one_and_the_cheapest_is_first(available: str, first: list[str]) -> None:
    words = [*BIG, "--max-memory", available]
    record = asked(*words, "--batch-size", 4)
    assert not record["fits"]
    assert record["remedies"][0]["changes"] == first
    for remedy in record["remedies"]:
        assert remedy["peak"] <= parse_bytes(available)
        options = dict(change.split() for change in remedy["changes"])
        assert asked(*words, *(word for option in {"--batch-size": 4, **options}.items() for word in option))["fits"]


def test_smaller_tiles_are_a_remedy_for_a_decode_that_does_not_fit() -> None:
    words = (*BIG, "--height", 544, "--width", 960, "--frames", 61)
    record = asked(*words, "--max-memory", "42GiB")
    assert record["estimated"]["decode"]["total"] == record["peak"] > 42 * GIB
    assert record["remedies"][0]["changes"] == ["--vae-tiling 128"]
    assert asked(*words, "--max-memory", "42GiB", "--vae-tiling", 128)["fits"]


def test_the_largest_batch_is_the_largest() -> None:
    request = VideoRequest(prompt="-", height=544, width=960, frames=61, vae_tiling=256)
    setup = Setup(open_model("hunyuanvideo-13b", CUDA), request, 1, Precision.parse("bf16", CUDA))
    largest = setup.largest_batch(80 * GIB)
    peaks = {size: Setup(**{**vars(setup), "batch_size": size}).peak() for size in (largest, largest + 1)}
    assert peaks[largest] <= 80 * GIB < peaks[largest + 1]
    assert setup.largest_batch(30 * GIB) == 0
    assert setup.largest_batch(10**15) == LARGEST_BATCH


def test_where_nothing_helps() -> None:
    request = VideoRequest(prompt="-", height=720, width=1280, frames=129)
    setup = Setup(open_model("hunyuanvideo-13b", CUDA), request, 2, Precision.parse("bf16", CUDA))
    assert remedies(setup, 2 * GIB) == []
    code, out = call(*BIG, "--max-memory", "2GiB")
    assert code == 1
    assert "make it smaller or shorter" in out
    assert "largest batch that fits as it is set: none" in out


def test_the_demo_and_a_folder_here(tiny_folder: Path) -> None:
    code, out = call("--height", 128, "--width", 192, "--frames", 17, "--batch-size", 4, "--device", "cpu")
    assert code == 0
    for part in ("demo: 4 × 192×128, 17 frames", "float32", "decoding", "should fit", "256 or more", "estimates"):
        assert part in " ".join(out.split())
    words = ("--model", tiny_folder, "--device", "cpu", "--isolation", "packed", "--dtype", "bf16")
    record = asked(*words, "--true-cfg", 3)
    assert (record["height"], record["frames"], record["true_cfg"]) == (32, 9, True)
    assert record["held_before"] > 0
    alone = asked(*words)
    assert record["estimated"]["step"]["activations"] > alone["estimated"]["step"]["activations"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--model", "somebody/some-model"), "A plan downloads nothing"),
        (("--max-memory", "lots"), "20GiB"),
        (("--height", 65), "height=65"),
        (("--device", "warp", "--max-memory", "1GiB"), "device 'warp' is unknown"),
        (("--device", "cuda:77"), "--max-memory"),
        (("--dtype", "float64"), "float64"),
    ],
)
def test_what_cannot_be_planned_is_said(words: tuple[object, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        call(*words)


def test_estimates_are_called_so_on_every_device() -> None:
    for words in (("--device", "cpu"), (*BIG, "--max-memory", "500GiB")):
        assert "These are estimates" in call(*words)[1]
    assert "not yet compared with a GPU" in asked(*BIG, "--max-memory", "500GiB")["estimates"]


def test_answer_needs_no_command() -> None:
    found = answer("demo", device="cpu", max_memory=100 * GIB)
    assert found.fits and "should fit" in found.verdict
