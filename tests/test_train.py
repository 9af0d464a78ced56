"""Training: a run learns, is resumed bit for bit, keeps what is good, and says what went wrong."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import clips
import pytest
import torch
from diffusers import HunyuanVideoTransformer3DModel as Reference
from safetensors.torch import load_file

from reelbatch import Engine, VideoRequest
from reelbatch.train import loop, weights
from reelbatch.train.checkpoints import CheckpointError, Checkpoints, Position
from reelbatch.train.config import make_config, read_config
from reelbatch.train.data import DataError
from reelbatch.train.devices import forget_precision, make_accelerator
from reelbatch.train.loop import Run, Trained, TrainingError, train
from reelbatch.train.report import read_metrics


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clips.write_folder(tmp_path_factory.mktemp("clips"))


@pytest.fixture(scope="module")
def base(tiny_folder: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run of a few seconds; all share one cache."""
    return {
        "model": str(tiny_folder),
        "data": data,
        "device": "cpu",
        "cache": tmp_path_factory.getbasetemp() / "encoded",
        "steps": 4,
        "batch_tokens": 60,
        "rank": 2,
        "learning_rate": 1e-2,
        "log_every": 1,
        "save_every": 2,
    }


@pytest.fixture(autouse=True)
def _any_precision() -> Iterator[None]:
    yield
    forget_precision()


def run(base: dict[str, Any], out: Path, stop_at: int | None = None, **changes: Any) -> Trained:
    asked = 0

    def should_stop() -> bool:
        nonlocal asked
        asked += 1
        return asked == stop_at

    return train(make_config(base | {"out": out} | changes), should_stop=should_stop)


@pytest.fixture(scope="module")
def plain_losses(base: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """The loss of the second step in fp32, by method."""
    changes = {"steps": 2, "learning_rate": 1e-3}
    out = tmp_path_factory.mktemp("plain")
    return {method: run(base, out / method, method=method, **changes).loss for method in ("lora", "full")}


def tensors_of(found: Trained) -> dict[str, torch.Tensor]:
    assert found.weights is not None
    return load_file(found.weights)


# A run ------------------------------------------------------------------------------------------------------------


def test_a_run_learns_and_leaves_its_folder(base: dict[str, Any], tmp_path: Path) -> None:
    messages: list[str] = []
    config = make_config(
        base
        | {
            "out": tmp_path,
            "steps": 20,
            "caption_dropout": 0.0,
            "validation_share": 0.2,
            "validate_every": 10,
            "sample_every": 20,
            "sample_prompts": "a red cat",
            "save_every": 0,
        }
    )
    found = train(config, messages.append)
    rows = read_metrics(tmp_path / "metrics.csv")
    held_out = [float(row["validation_loss"]) for row in rows if row["validation_loss"]]
    assert len(rows) == 20 and len(held_out) == 2
    assert held_out[1] < held_out[0]
    assert found.steps == 20 and not found.stopped and found.validation_loss == held_out[1]
    for name in ("config.yaml", "loss.png", "lora.safetensors", "samples/step-0000020.png"):
        assert (tmp_path / name).stat().st_size > 0
    assert any("6 clips to train on, 2 held out, 0 skipped" in line for line in messages)
    steps = [line for line in messages if line.startswith("step ")]
    assert all(re.match(r"step \d+ of \d+: .*loss \d", line) for line in steps)
    assert "left" in steps[0] and "left" not in steps[-1]


def test_what_is_trained_draws_from_its_own_numbers_whoever_shares_the_pack(
    base: dict[str, Any], tmp_path: Path
) -> None:
    """One pack of all samples of a step, or a pack for each: the same loss and the same step."""
    packed = run(base, tmp_path / "a", batch_size=4, batch_tokens=None)
    apart = run(base, tmp_path / "b", batch_size=1, batch_tokens=None, accumulate=4)
    assert packed.loss == pytest.approx(apart.loss, rel=1e-5)
    for one, other in zip(tensors_of(packed).values(), tensors_of(apart).values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_resumed_run_is_the_run_that_was_never_stopped(base: dict[str, Any], tmp_path: Path, method: str) -> None:
    changes = {"method": method, "ema_decay": 0.9, "steps": 5, "schedule": "cosine", "warmup_steps": 2, "accumulate": 2}
    if method == "lora":
        changes |= {"lora_dropout": 0.2}  # draws from the global generator
    whole = run(base, tmp_path / "whole", **changes)
    first = run(base, tmp_path / "parts", stop_at=3, **changes)
    assert first.stopped and first.steps == 3
    second = run(base, tmp_path / "parts", resume="auto", **changes)
    assert second.steps == 5
    states = [
        load_file(tmp_path / name / "checkpoints" / "step-0000005" / weights.WEIGHTS_FILE)
        for name in ("whole", "parts")
    ]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    averages = [_average(found) for found in (whole, second)]
    assert all(torch.equal(averages[0][name], averages[1][name]) for name in averages[0])
    rows = [read_metrics(tmp_path / name / "metrics.csv") for name in ("whole", "parts")]
    same = ("step", "samples", "loss", "learning_rate", "gradient_norm")
    assert [[row[name] for name in same] for row in rows[0]] == [[row[name] for name in same] for row in rows[1]]


def _average(found: Trained) -> dict[str, torch.Tensor]:
    assert found.weights is not None
    file = found.weights
    return load_file(file if file.is_file() else file / "transformer" / "diffusion_pytorch_model.safetensors")


def test_full_weights_make_a_model_folder_for_diffusers_and_for_us(
    base: dict[str, Any], tmp_path: Path, tiny_folder: Path
) -> None:
    found = run(base, tmp_path, method="full", steps=2)
    assert found.weights == tmp_path / "model"
    reference = Reference.from_pretrained(tmp_path / "model" / "transformer")
    before = Reference.from_pretrained(tiny_folder / "transformer").state_dict()
    assert any(not torch.equal(before[name], tensor) for name, tensor in reference.state_dict().items())
    request = VideoRequest(prompt="a red cat", seed=0, steps=1, frames=1)
    video = Engine.from_pretrained(str(tmp_path / "model"), device="cpu").generate([request])[0]
    assert video.frames.shape == (1, 32, 32, 3)


@pytest.mark.parametrize(
    "changes",
    [
        {"mixed_precision": "bf16"},
        {"mixed_precision": "fp16"},
        {"base_dtype": "int8"},
        {"method": "full", "mixed_precision": "bf16", "gradient_checkpointing": True},
    ],
    ids=lambda changes: " ".join(map(str, changes.values())),
)
def test_other_precisions_come_near_the_loss_of_fp32(
    base: dict[str, Any], tmp_path: Path, plain_losses: dict[str, float], changes: dict[str, Any]
) -> None:
    other = run(base, tmp_path, steps=2, learning_rate=1e-3, **changes).loss
    expected = plain_losses[changes.get("method", "lora")]
    assert other == pytest.approx(expected, rel=0.05) and other != expected


def test_samples_count_the_same_or_by_their_tokens(base: dict[str, Any], tmp_path: Path) -> None:
    by_sample, by_token = (
        Run(make_config(base | {"out": tmp_path, "weigh": weigh}), make_accelerator(make_config(base)), print)
        for weigh in ("samples", "tokens")
    )
    numbers = range(4)
    losses = by_sample.loss(numbers).detach().double()
    tokens = torch.tensor([by_sample.samples.of(number).video_tokens for number in numbers], dtype=torch.float64)
    assert len(set(tokens.tolist())) > 1
    for one in (by_sample, by_token):
        one.samples.pack = lambda first: range(first, first + 4)  # type: ignore[method-assign]
    assert by_sample.step().loss == pytest.approx(float(losses.mean()), rel=1e-5)
    assert by_token.step().loss == pytest.approx(float((losses * tokens).sum() / tokens.sum()), rel=1e-5)


# What goes wrong --------------------------------------------------------------------------------------------------


def test_broken_files_are_listed_and_the_others_trained_on(base: dict[str, Any], tmp_path: Path) -> None:
    folder = clips.write_folder(tmp_path / "clips", 4)
    (folder / "2.mp4").write_bytes(b"no video")
    found = run(base, tmp_path / "out", data=folder, steps=1)
    assert len(found.skipped) == 1 and "2.mp4: cannot be decoded" in found.skipped[0]
    assert "2.mp4" in (tmp_path / "out" / "skipped.txt").read_text()
    for i in range(4):
        (folder / f"{i}.mp4").write_bytes(b"no video")
    with pytest.raises(DataError, match=r"none of the files can be used:\n.*0.mp4"):
        run(base, tmp_path / "other", data=folder, steps=1)


def test_a_loss_that_is_not_finite_stops_with_step_files_and_checkpoint(
    base: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = loop.flow_matching_loss, 0

    def broken(*args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        losses = real(*args, **kwargs)
        return torch.cat([losses[:1] * float("nan"), losses[1:]]) if calls == 4 else losses

    monkeypatch.setattr(loop, "flow_matching_loss", broken)
    with pytest.raises(TrainingError) as caught:
        run(base, tmp_path)
    message = str(caught.value)
    assert "the loss of step 4 is not finite" in message
    assert message.count(".mp4") == 1  # the one file, not all of the batch
    assert str(tmp_path / "checkpoints" / "step-0000002") in message
    assert len(read_metrics(tmp_path / "metrics.csv")) == 3


def test_a_full_disk_leaves_the_last_good_checkpoint(
    base: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = weights.save_file

    def full(tensors: Any, path: Path) -> None:
        real(tensors, path)
        if "0000004" in str(path):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights, "save_file", full)
    messages: list[str] = []
    found = train(make_config(base | {"out": tmp_path, "steps": 5}), messages.append)
    assert any("step 4 could not be saved" in line and "No space left" in line for line in messages)
    assert found.steps == 5  # the run goes on
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left == ["step-0000002", "step-0000005"]

    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(OSError, match="step 4 could not be saved"):
        train(make_config(base | {"out": tmp_path, "steps": 4}))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-0000002"]


def test_runs_do_not_mix(base: dict[str, Any], tmp_path: Path) -> None:
    run(base, tmp_path, steps=2)
    written = (tmp_path / "config.yaml").read_text()
    for changes, said in (
        ({}, "a run with checkpoints is there; give resume: auto"),
        ({"resume": str(tmp_path / "nowhere")}, r"is no checkpoint .* there are: .*step-0000002"),
        ({"resume": "auto", "targets": ["attn.to_q"]}, "holds other weights than this config trains"),
        ({"resume": "auto", "rank": 1}, "holds other weights than this config trains"),
        ({"resume": "auto", "optimizer": "adafactor"}, "was made with optimizer=adamw; this config has optimizer=ada"),
        ({"resume": "auto", "ema_decay": 0.9}, "was made with ema=False; this config has ema=True"),
    ):
        with pytest.raises(CheckpointError, match=said):
            run(base, tmp_path, steps=2, **changes)
    assert (tmp_path / "config.yaml").read_text() == written
    (tmp_path / "checkpoints" / "step-0000002" / "optimizer.safetensors").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match=r"step-0000002/optimizer.safetensors: cannot be read"):
        run(base, tmp_path, steps=3, resume="auto")


def test_a_resumed_run_takes_the_settings_and_the_clips_that_it_is_given(
    base: dict[str, Any], data: Path, tmp_path: Path
) -> None:
    run(base, tmp_path / "out", steps=2, schedule="linear", warmup_steps=1)
    rows = (data / "metadata.jsonl").read_text().splitlines()
    fewer = tmp_path / "clips.jsonl"
    fewer.write_text("\n".join(row.replace('"file_name": "', f'"file_name": "{data}/') for row in rows[:4]))
    changes = {"steps": 4, "schedule": "linear", "learning_rate": 1e-3, "weight_decay": 0.5, "data": fewer}
    config = make_config(base | {"out": tmp_path / "out", "resume": "auto"} | changes)
    messages: list[str] = []
    going_on = Run(config, make_accelerator(config), messages.append)
    assert going_on.optimizer.param_groups[0]["weight_decay"] == 0.5
    assert going_on.schedule.get_last_lr() == [pytest.approx(1e-3 * 0.5)]  # two of four steps are behind it
    assert any("the clips are not those of the checkpoint" in line for line in messages)
    going_on.go(lambda: False)
    assert [row["step"] for row in read_metrics(tmp_path / "out" / "metrics.csv")] == ["1", "2", "3", "4"]
    assert read_config(tmp_path / "out" / "config.yaml") == config.model_copy(update={"resume": None})


def test_a_clip_that_is_held_out_is_never_trained_on_and_one_must_be_left(
    base: dict[str, Any], data: Path, tmp_path: Path
) -> None:
    one = tmp_path / "one.jsonl"
    one.write_text(json.dumps({"file_name": str(data / "0.mp4"), "text": "a cat"}))
    config = make_config(base | {"out": tmp_path, "validation": one, "batch_tokens": 8})
    messages: list[str] = []
    found = Run(config, make_accelerator(config), messages.append)
    assert len(found.dataset.clips) == 7 and len(found.dataset.held_out) == 1
    assert not {clip.clip.path for clip in found.dataset.clips} & {clip.clip.path for clip in found.dataset.held_out}
    assert any("clips are larger than batch_tokens=8 (the largest has" in line for line in messages)
    assert len(found.samples.pack(0)) == 1
    for changes in ({"validation_share": 0.1}, {"validation": one}):
        with pytest.raises(DataError, match="all 1 clips are held out"):
            run(base, tmp_path, data=one, **changes)


def test_what_to_sample_is_looked_at_before_anything_is_encoded(base: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere\.txt"):
        run(base, tmp_path, sample_prompts=["nowhere.txt"], cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_step_that_overflows_in_fp16_is_skipped_with_its_learning_rate_and_average(
    base: dict[str, Any], tmp_path: Path
) -> None:
    changes = {"out": tmp_path, "mixed_precision": "fp16", "ema_decay": 0.9, "schedule": "linear", "batch_size": 1}
    config = make_config(base | changes)
    accelerator = make_accelerator(config)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    found = Run(config, accelerator, print)
    before = {name: parameter.clone() for name, parameter in found.weights.parameters.items()}
    average = found.weights.average
    assert average is not None
    assert not math.isfinite(found.step().gradient_norm)
    assert found.schedule.get_last_lr() == [1e-2] and average.optimization_step == 0 and found.position.step == 1
    assert all(torch.equal(parameter, before[name]) for name, parameter in found.weights.parameters.items())
    assert accelerator.scaler.get_scale() == 2.0**59

    next(iter(found.weights.parameters.values())).register_hook(lambda gradient: gradient * math.nan)
    found.step()  # it may be the scale
    accelerator.scaler.update(0.5)
    with pytest.raises(TrainingError, match="the gradient of step 3 is not finite"):
        found.step()


# Checkpoints ------------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_kept_only_if_all_devices_have_written_and_replaces_later_ones(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path, 2)
    for step in (1, 2, 3):
        kept.save(Position(step), lambda folder: None)
    assert [path.name for path in kept.all()] == ["step-0000002", "step-0000003"]
    with pytest.raises(OSError, match="another device could not write"):
        kept.save(Position(4), lambda folder: None, anywhere=lambda failed: True)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-0000002", "step-0000003"]
    kept.save(Position(2), lambda folder: None)  # as a run does that went on from before
    assert [path.name for path in kept.all()] == ["step-0000002"]
