"""Training HunyuanVideo 1.5, text to video and image to video: the same loop, its own conditioning."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import clips
import pytest
import tiny15
import torch
from diffusers import HunyuanVideo15Transformer3DModel as Reference
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from reelbatch import Engine, VideoRequest
from reelbatch.cli import app
from reelbatch.loading.load import load
from reelbatch.models.hunyuan_video15.family import HunyuanVideo15
from reelbatch.train.cache import EncodedClips
from reelbatch.train.config import ConfigError, make_config
from reelbatch.train.data import Clip, ClipRules, read_clip
from reelbatch.train.devices import forget_precision
from reelbatch.train.flow_matching import Example, flow_matching_loss
from reelbatch.train.loop import Trained, train
from reelbatch.train.method import prepare_network, target_layers, trainable
from reelbatch.train.report import read_metrics
from reelbatch.train.weights import WEIGHTS_FILE

CAPTIONS = ("a red cat moving left", 'a sign that says "go" at night', "a robot “slowly”", "a blue star in the rain")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny15.make_folder(tmp_path_factory.mktemp("tiny15"))


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny15.make_folder(tmp_path_factory.mktemp("tiny15_text"), "text")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight clips of four shapes; half of the captions quote words."""
    folder = clips.write_folder(tmp_path_factory.mktemp("clips"))
    rows = [{"file_name": f"{i}.mp4", "text": CAPTIONS[i % len(CAPTIONS)]} for i in range(8)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def base(folder: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run of a few seconds; all share one cache."""
    return {
        "model": str(folder),
        "data": data,
        "device": "cpu",
        "cache": tmp_path_factory.getbasetemp() / "encoded15",
        "method": "full",
        "steps": 3,
        "batch_size": 4,
        "learning_rate": 1e-2,
        "image_dropout": 0.4,
        "ema_decay": 0.9,
        "schedule": "cosine",
        "log_every": 1,
    }


@pytest.fixture(scope="module")
def family() -> HunyuanVideo15:
    family = tiny15.model(tiny15.pipeline()).family
    assert isinstance(family, HunyuanVideo15)
    return family


@pytest.fixture(autouse=True)
def _any_precision() -> Iterator[None]:
    yield
    forget_precision()


def run(base: dict[str, Any], out: Path, stop_at: int | None = None, **changes: Any) -> Trained:
    asked = iter(range(1, 1000))
    return train(make_config(base | {"out": out} | changes), should_stop=lambda: next(asked) == stop_at)


@pytest.fixture(scope="module")
def whole(base: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """All weights, in packs of four samples."""
    return run(base, tmp_path_factory.mktemp("whole"))


def tensors_of(trained: Trained) -> dict[str, torch.Tensor]:
    assert trained.weights is not None
    return load_file(trained.weights / "transformer" / "diffusion_pytorch_model.safetensors")


# The loss ---------------------------------------------------------------------------------------------------------


def examples(family: HunyuanVideo15) -> list[Example]:
    """Text to video, with and without quoted words, and image to video; no two of one shape."""
    frames = [
        torch.randint(0, 256, size, dtype=torch.uint8) for size in ((1, 32, 32, 3), (5, 32, 48, 3), (9, 48, 32, 3))
    ]
    made = []
    for video, caption in zip(frames, CAPTIONS, strict=False):
        encoded = family.encode_clip(video)
        made.append(Example(encoded.pop("latents"), family.encode_caption(caption) | encoded))
    shown = made[1].conditioning
    dropped = {name: tensor for name, tensor in shown.items() if name not in ("image", "first_frame")}
    return [*made, Example(made[1].latents, dropped)]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_gradient_of_a_pack_is_the_sum_of_the_gradients_of_its_samples(
    family: HunyuanVideo15, checkpointing: bool
) -> None:
    torch.manual_seed(0)
    pack = examples(family)
    assert [set(one.conditioning) for one in pack] == [
        {"text"},
        {"text", "glyphs", "image", "first_frame"},
        {"text", "glyphs", "image", "first_frame"},
        {"text", "glyphs"},
    ]
    sigmas, ones = torch.tensor([0.2, 0.6, 0.9, 0.4]), torch.ones(4)
    noise = [torch.randn_like(one.latents) for one in pack]
    together, apart = (type(family.transformer).from_config(family.transformer.config) for _ in range(2))
    for network in (together, apart):
        network.load_state_dict(family.transformer.state_dict())
        prepare_network(network, make_config({"method": "full", "gradient_checkpointing": checkpointing}))
    losses = flow_matching_loss(together, family.training_branch, pack, sigmas, ones, noise)
    losses.sum().backward()
    for i, one in enumerate(pack):
        loss = flow_matching_loss(apart, family.training_branch, [one], sigmas[i : i + 1], ones[:1], noise[i : i + 1])
        torch.testing.assert_close(loss[0], losses[i], rtol=1e-5, atol=1e-6)
        loss.sum().backward()
        # on several devices each must have them all, whatever is in its pack
        assert all(parameter.grad is not None for parameter in trainable(apart).values())
    for name, parameter in trainable(together).items():
        other = apart.get_parameter(name).grad
        assert parameter.grad is not None and other is not None
        assert (parameter.grad - other).norm() <= 1e-5 * other.norm() + 1e-8, name


def test_weights_that_nothing_depends_on_are_not_trained(family: HunyuanVideo15) -> None:
    network = type(family.transformer).from_config(family.transformer.config)
    prepare_network(network, make_config({"method": "full"}))
    last = ("attn.to_add_out", "ff_context.net.0.proj", "ff_context.net.2")
    frozen = {f"transformer_blocks.1.{layer}.{kind}" for layer in last for kind in ("weight", "bias")}
    assert {name for name, parameter in network.named_parameters() if not parameter.requires_grad} == frozen
    layers = target_layers(network, ["attention", "mlp"])
    assert len(layers) == 2 * 12 - len(last) and not {f"transformer_blocks.1.{layer}" for layer in last} & set(layers)


def test_a_piece_without_rows_is_no_piece(family: HunyuanVideo15) -> None:
    for one in examples(family):
        level, guidance = torch.tensor(500.0), torch.tensor(1.0)
        branch = family.training_branch(one.latents, one.conditioning, level, guidance, torch.float32)
        assert branch.glyphs is not None and branch.image is not None
        assert branch.conditioning_rows == family.conditioning_rows(one.conditioning)
        without = replace(
            branch,
            **{name: None for name in ("glyphs", "image") if name not in one.conditioning},  # as in generating
        )
        assert torch.equal(*(family.velocities([[either]])[0][0] for either in (branch, without)))


def test_a_clip_gives_what_a_request_with_its_first_frame_gives(
    family: HunyuanVideo15, data: Path, tmp_path: Path
) -> None:
    clip = Clip(data / "1.mp4", CAPTIONS[1:2])
    frames = read_clip(clip.path, ClipRules())
    Image.fromarray(frames[0]).save(tmp_path / "first.png")
    latents, first_frame = EncodedClips(tmp_path / "cache", family, ClipRules()).clip(clip)
    request = VideoRequest(prompt=CAPTIONS[1], image=tmp_path / "first.png", height=32, width=48, frames=5)
    expected = family.encode(request.for_model(family.limits))
    assert expected.image is not None
    assert torch.equal(first_frame["image"], expected.image.states)
    assert torch.equal(first_frame["first_frame"], expected.image.latents)
    # the VAE is causal: the clip's own first latent frame is that of the frame alone
    torch.testing.assert_close(latents[:, 0], first_frame["first_frame"], rtol=1e-4, atol=1e-4)
    # and so is what the transformer is given at a step
    conditioning = {**family.encode_caption(CAPTIONS[1]), **first_frame}
    level = torch.tensor(500.0)
    step: Any = SimpleNamespace(conditioning=expected, latents=latents, timestep=level, next_timestep=level)
    generated = family.branches(step)[0]
    trained = family.training_branch(latents, conditioning, level, torch.tensor(1.0), torch.float32)
    for name in ("latents", "text", "glyphs", "image", "timestep"):
        assert torch.equal(getattr(trained, name), getattr(generated, name)), name
    assert generated.conditioning_rows == family.conditioning_rows(conditioning)


# Runs -------------------------------------------------------------------------------------------------------------


def test_a_run_learns_and_its_lora_acts_here_and_in_diffusers(
    base: dict[str, Any], folder: Path, data: Path, tmp_path: Path
) -> None:
    row = {"prompt": "a red cat", "image": str(tmp_path / "first.png"), "frames": 5, "steps": 1}
    (tmp_path / "prompts.jsonl").write_text(json.dumps(row))
    Image.fromarray(read_clip(data / "1.mp4", ClipRules())[0]).save(tmp_path / "first.png")
    changes = {"steps": 12, "schedule": "constant", "caption_dropout": 0.0, "validation_share": 0.2}
    previews = {"validate_every": 6, "sample_every": 12, "sample_prompts": [str(tmp_path / "prompts.jsonl"), "a robot"]}
    lora = {"method": "lora", "rank": 2, "targets": ["attention", "mlp", "embedders"], "ema_decay": None}
    trained = run(base, tmp_path / "out", **lora, **changes, **previews)
    held_out = [
        float(row["validation_loss"])
        for row in read_metrics(tmp_path / "out" / "metrics.csv")
        if row["validation_loss"]
    ]
    assert len(held_out) == 2 and held_out[1] < held_out[0]
    assert (tmp_path / "out" / "samples" / "step-0000012.png").stat().st_size > 0
    assert trained.weights is not None

    model = load(folder, "cpu", lora=[(trained.weights, 1.0)])
    family, plain = model.family, load(folder, "cpu").family
    assert isinstance(family, HunyuanVideo15) and isinstance(plain, HunyuanVideo15)
    theirs = Reference.from_pretrained(folder / "transformer")
    theirs.load_lora_adapter(str(trained.weights), prefix="transformer")
    frames = torch.from_numpy(read_clip(data / "1.mp4", ClipRules()))
    conditioning = family.encode_clip(frames) | family.encode_caption("a cat")
    latents = conditioning.pop("latents")
    branch = family.training_branch(latents, conditioning, torch.tensor(500.0), torch.tensor(1.0), torch.float32)
    ours, without = (one.velocities([[branch]])[0][0] for one in (family, plain))
    with torch.no_grad():
        reference = theirs(
            hidden_states=branch.latents[None],
            timestep=branch.timestep[None],
            encoder_hidden_states=branch.text[None],
            encoder_attention_mask=torch.ones(1, len(branch.text)),
            encoder_hidden_states_2=torch.zeros(1, 1, 24),
            encoder_attention_mask_2=torch.zeros(1, 1),
            image_embeds=conditioning["image"][None],
            return_dict=False,
        )[0][0]
    assert (ours - without).abs().max() > 1e-2 * ours.abs().max()
    assert (ours - reference).abs().max() < 1e-4 * ours.abs().max()


def test_a_pack_of_samples_or_a_pack_for_each_make_the_same_step(
    base: dict[str, Any], whole: Trained, tmp_path: Path
) -> None:
    apart = run(base, tmp_path, batch_size=1, accumulate=4)
    assert whole.loss == pytest.approx(apart.loss, rel=1e-5)
    one, other = tensors_of(whole), tensors_of(apart)
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-3, atol=1e-4)


def test_a_resumed_run_is_the_run_that_was_never_stopped_and_makes_a_model(
    base: dict[str, Any], whole: Trained, tmp_path: Path
) -> None:
    first = run(base, tmp_path, stop_at=2)
    assert first.stopped and first.steps == 2
    second = run(base, tmp_path, resume="auto")
    checkpoint = f"checkpoints/step-0000003/{WEIGHTS_FILE}"
    for one, other in (
        (tensors_of(whole), tensors_of(second)),  # averages
        (load_file(whole.out / checkpoint), load_file(tmp_path / checkpoint)),
    ):
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    rows = [read_metrics(out / "metrics.csv") for out in (whole.out, tmp_path)]
    same = ("step", "samples", "loss", "learning_rate", "gradient_norm")
    assert [[row[name] for name in same] for row in rows[0]] == [[row[name] for name in same] for row in rows[1]]

    request = VideoRequest(prompt="a red cat", image=tiny15.picture(48, 32), seed=0, steps=1, frames=5)
    video = Engine.from_pretrained(str(second.weights), device="cpu").generate([request])[0]
    assert video.frames is not None and len(video.frames) == 5


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "lora", "mixed_precision": "bf16", "base_dtype": "int8"},
        {"mixed_precision": "bf16", "gradient_checkpointing": True},
    ],
    ids=lambda changes: " ".join(map(str, changes.values())),
)
def test_other_precisions_come_near_the_loss_of_fp32(
    base: dict[str, Any], whole: Trained, tmp_path: Path, changes: dict[str, Any]
) -> None:
    expected = float(read_metrics(whole.out / "metrics.csv")[0]["loss"])  # a LoRA changes nothing before its first step
    loss = run(base, tmp_path, steps=1, **changes).loss
    assert loss == pytest.approx(expected, rel=0.05) and loss != expected


def test_the_command_trains_a_text_to_video_model(text_folder: Path, data: Path, tmp_path: Path) -> None:
    flags = f"--model {text_folder} --data {data} --out {tmp_path} --device cpu --rank 2 --steps 2 --log-every 1"
    done = CliRunner().invoke(app, ["train", *flags.split()])
    assert done.exit_code == 0, done.output
    assert len(read_metrics(tmp_path / "metrics.csv")) == 2
    weights = load_file(tmp_path / "lora.safetensors")
    assert "transformer.transformer_blocks.1.attn.to_q.lora_B.weight" in weights
    command = ["generate", "a red cat", "--model", str(text_folder), "--device", "cpu", "--steps", "1"]
    made = CliRunner().invoke(
        app, [*command, "--lora", str(tmp_path / "lora.safetensors"), "--out", str(tmp_path / "videos")]
    )
    assert made.exit_code == 0, made.output


# What is refused --------------------------------------------------------------------------------------------------


def test_what_a_model_cannot_be_trained_with_is_refused_by_name(
    base: dict[str, Any], text_folder: Path, tmp_path: Path
) -> None:
    meanflow = tiny15.make_folder(tmp_path / "meanflow", use_meanflow=True)
    for changes, said in (
        ({"model": str(meanflow)}, r"was distilled to few steps \(use_meanflow\)"),
        ({"guidance": 6.0}, "has no embedded guidance; leave out guidance=6"),
        ({"guidance_max": 6.0}, "has no embedded guidance; leave out guidance_max=6"),
        ({"model": str(text_folder)}, r"takes no image.*; leave out image_dropout=0\.4"),
    ):
        with pytest.raises(ConfigError, match=said):
            run(base, tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()
