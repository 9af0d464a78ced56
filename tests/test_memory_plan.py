"""The memory plan: calibrations, the command, and what it proposes."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny15
import torch
from typer.testing import CliRunner

from reelbatch import Engine
from reelbatch.cli import app
from reelbatch.device import parse_bytes
from reelbatch.engine.calibrate import calibrate, small_videos
from reelbatch.engine.decoder import smaller_tiles, tile_words
from reelbatch.loading.load import load
from reelbatch.loading.precision import Precision
from reelbatch.loading.published import BY_NAME, published
from reelbatch.loading.skeleton import from_folder, from_published
from reelbatch.memory.calibration import SCALES, Calibration, Correction, fit, store
from reelbatch.memory.cards import BY_SIZE, CARDS, USABLE, card
from reelbatch.memory.estimate import any_image
from reelbatch.memory.placement import Offload
from reelbatch.memory.streaming import network_bytes
from reelbatch.models.family import PHASES as PHASE_NAMES
from reelbatch.request import ModelLimits, VideoRequest
from reelbatch.tune import plan as planning
from reelbatch.tune.fitting import shapes_of
from reelbatch.tune.plan import answer
from reelbatch.tune.reliefs import Outcome, outcomes, tries
from reelbatch.tune.remedies import remedies
from reelbatch.tune.setup import LARGEST_BATCH, Planned, Setup, open_model

MIB, GIB = 2**20, 2**30
PHASES = ("step", "decode")
CUDA = torch.device("cuda")
OPENED = cache(open_model)


@pytest.fixture(autouse=True)
def _models_are_opened_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command traces a model anew, which takes seconds; what it estimates is the same each time."""
    monkeypatch.setattr(planning, "open_model", OPENED)


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
"""On a machine without a GPU, only `--max-memory` says what there is."""


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
    ("model", "size", "cfg", "transformer"),
    [
        ("hunyuanvideo-1.5", (480, 848, 121), True, 8_326_608_160),
        (
            "HunyuanVideo-community/HunyuanVideo-1.5-Diffusers-720p_i2v_distilled",
            (720, 1280, 121),
            False,
            8_326_608_160,
        ),
        ("hunyuanvideo-i2v", (720, 1280, 129), False, 12_821_012_544),
        ("skyreels-v1-t2v", (544, 960, 97), True, 12_821_012_544),
    ],
)
def test_other_published_models_without_a_folder(
    model: str, size: tuple[int, int, int], cfg: bool, transformer: int
) -> None:
    """Names and hub ids, in any case; images are encoded where the model takes one."""
    known = published(model)
    assert known is not None and BY_NAME[known.name] is known
    where = Planned(known.name, lambda precision: from_published(known, precision, CUDA), CUDA)
    family = where.family(Precision.parse("bfloat16", CUDA))
    assert sum(weight.numel() for weight in family.parts["transformer"].parameters()) == transformer
    request = VideoRequest(prompt="-", **any_image(family.limits)).for_model(family.limits)
    assert (request.size, request.uses_cfg) == (size, cfg)
    assert (request.image is not None) == ("i2v" in known.name) == ("vae" in family.also)


def test_a_weight_of_two_names_is_counted_once(tmp_path: Path) -> None:
    """ByT5's embedding is."""
    cpu, fp32 = torch.device("cpu"), Precision.parse("float32", torch.device("cpu"))
    folder = tiny15.make_folder(tmp_path)
    skeleton, loaded = from_folder(folder, fp32, cpu), load(folder, "cpu", "float32").family
    sizes = [{name: network_bytes(part) for name, part in family.parts.items()} for family in (skeleton, loaded)]
    assert sizes[0] == sizes[1]


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
    assert not record["fits_as_set"]
    assert record["remedies"][0]["changes"] == first
    for remedy in record["remedies"]:
        assert remedy["peak"] <= parse_bytes(available)
        options = dict(change.split() for change in remedy["changes"])
        set_so = (word for option in {"--batch-size": 4, **options}.items() for word in option)
        assert asked(*words, *set_so)["fits_as_set"]


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
        (("--device", "cuda:77"), "name it with --on"),
        (("--on", "rtx9999"), "no such card; give a size, as 24GiB, or one of rtx3060"),
        (("--on", "h100", "--calibrate"), "measures on this machine"),
        (("--cards", "--width", 960), "give --width, --height and --frames"),
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


# -- cards, and what the engine does by itself -----------------------------------------------------

GPU = ("--model", "hunyuanvideo-13b", "--on")


def test_the_plan_of_the_readme_works_on_any_machine() -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    lines = re.findall(r"^reelbatch plan (.*?)(?: +#.*)?$", readme, re.MULTILINE)
    assert lines
    for line in lines:
        record = asked(*shlex.split(line))
        assert record["fits"] and record["card"] and record["dtype"] == "bfloat16"


def test_cards_have_names_sizes_and_dtypes() -> None:
    assert card("RTX 4090").usable < 24 * GIB and card("rtx4090").dtype == "bfloat16"
    assert card("t4").dtype == "float16"
    assert card("24GiB").usable == int(24 * GIB * USABLE)
    assert all(USABLE * 0.98 < one.usable / GIB / one.nominal <= 1 for one in CARDS)
    assert [card(name).nominal for name in BY_SIZE] == [12, 16, 24, 48, 80, 141]


@pytest.mark.parametrize(
    ("words", "fits", "reliefs"),
    [
        (("h100",), True, {}),
        (("rtx4090",), False, {}),  # the weights alone do not fit: it is not even loaded
        (("rtx4070", "--offload", "block"), False, {}),
        (("rtx5090", "--offload", "component"), True, {"step": "with weights that come block by block"}),
        (("16GiB", "--offload", "block", "--batch-size", 6), True, {"step": "in parts of 2 videos"}),
        (
            ("a100-40gb", "--batch-size", 2),
            True,
            {
                "text": "with the other networks moved to the CPU",
                "step": "in parts of 1 video, with the other networks moved to the CPU",
                "decode": "with the other networks moved to the CPU",
            },
        ),
    ],
)
def test_the_answer_is_what_the_engine_does(words: tuple[object, ...], fits: bool, reliefs: dict[str, str]) -> None:
    record = asked(*GPU, *words)
    assert record["fits"] == fits
    for relief in record["reliefs"]:
        assert relief["relief"].startswith(reliefs.pop(relief["phase"]))
        assert relief["peak"] <= record["available"] < record["estimated"][relief["phase"]]["total"]
        assert relief["relief"] in record["verdict"]
    assert not reliefs
    if fits:
        assert "does not fit" not in " ".join(call(*GPU, *words)[1].split())


def test_what_only_tiles_let_fit_does_not_contradict_itself(tiny_folder: Path) -> None:
    """Tiles were proposed as the only remedy for what "does not fit", and the engine takes them by itself."""
    words = {"height": 96, "width": 96, "frames": 9}
    cpu = torch.device("cpu")
    setup = Setup(open_model(str(tiny_folder), cpu), VideoRequest(prompt="-", **words), 1, Precision.parse("fp32", cpu))
    setup = replace(setup, offload="block", request=setup.request.model_copy(update={"vae_tiling": 0}))
    whole, tiled = (
        replace(setup, request=setup.request.model_copy(update={"vae_tiling": side})).phase_bytes("decode")
        for side in (0, 64)
    )
    assert tiled < whole
    *_, decode = outcomes(setup, tiled, limited=False)
    assert decode == Outcome("decode", tiled, True, "in VAE tiles of 64 pixels", exact=False)
    *_, refused = outcomes(setup, tiled, limited=True)
    assert refused == Outcome("decode", whole, False)


@pytest.mark.parametrize("offload", ["none", "block"])
def test_reliefs_are_those_of_the_engine_in_its_order(tiny_folder: Path, offload: Offload) -> None:
    engine = Engine.from_pretrained(str(tiny_folder), device="cpu", dtype="float32", offload=offload)
    family, placement = engine.model.family, engine.model.placement
    cpu = torch.device("cpu")
    request = VideoRequest(prompt="-", height=192, width=192, frames=1, vae_tiling=0)
    setup = Setup(open_model(str(tiny_folder), cpu), request, 1, Precision.parse("fp32", cpu), offload=offload)
    for phase in PHASE_NAMES:
        expected = [relief.what for relief in placement.reliefs(phase)]
        if phase == "decode":
            expected += [tile_words(side) for side in smaller_tiles(family.tile_side(request))]
        assert [one.relief for one in tries(setup, phase)] == [None, *expected]


def test_with_a_limit_videos_wait_and_no_fallback_is_taken() -> None:
    words = (*GPU, "h200", "--batch-size", 4, "--max-memory")
    record = asked(*words, "50GiB")
    assert record["fits"] and not record["fits_as_set"]
    assert [(one["phase"], one["relief"]) for one in record["reliefs"]] == [
        ("step", "with 1 at a time, while the others wait")
    ]
    assert record["reliefs"][0]["peak"] <= 50 * GIB
    refused = asked(*words, "45GiB")
    assert not refused["fits"] and not refused["reliefs"] and "of --max-memory" in refused["verdict"]
    assert asked(*words, "400GiB")["available"] == card("h200").usable  # no more than there is


@pytest.mark.parametrize(
    ("model", "shape", "offloads"),
    [
        ("hunyuanvideo-13b", (1280, 720, 129), [None, "block", "block", "component", "none", "none"]),
        ("hunyuanvideo-1.5", (848, 480, 121), [None, None, "component", "component", "none", "none"]),
    ],
)
def test_the_tables_of_the_documentation_are_what_the_command_prints(
    model: str, shape: tuple[int, int, int], offloads: list[str | None]
) -> None:
    """One of the columns for one shape, as all of it takes a minute; the other lines must be there."""
    text = (Path(__file__).parents[1] / "docs" / "memory.md").read_text(encoding="utf-8")
    text = text.split("## HunyuanVideo 1.5")[model == "hunyuanvideo-1.5"]
    written = [line.strip("|").split(" | ") for line in text.splitlines() if line.startswith("|")]
    words = ("--cards", "--model", model, "--width", shape[0], "--height", shape[1], "--frames", shape[2])
    out = call(*words, "--dtype", "bfloat16")[1]
    assert "These are estimates" in out
    size = f"{shape[0]}×{shape[1]}"
    printed = [line.strip("|").split(" | ") for line in out.splitlines() if line.startswith("|")]
    assert printed[2:] == [[*cells[:3], f"{cells[3]} "] for cells in written if cells[1:3] == [size, str(shape[2])]]
    known = published(model)
    assert known is not None
    limits = known.limits
    assert written[0][:4] == [*printed[0][:3], "bfloat16"]
    assert [(c[0].split()[-1].strip("()"), c[1], c[2]) for c in written[2:]] == [
        (name, f"{width}×{height}", str(frames)) for name in BY_SIZE for width, height, frames in shapes_of(limits)
    ]
    rows = json.loads(call(*words, "--dtype", "bfloat16", "--json")[1])["rows"]
    assert [row["card"] for row in rows] == list(BY_SIZE)
    assert [row["offload"] for row in rows] == offloads


def test_answer_needs_no_command() -> None:
    found = answer("demo", device="cpu", max_memory=100 * GIB)
    assert found.fits and "should fit" in found.verdict
