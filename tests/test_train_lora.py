"""LoRA files: what is trained loads here and in Diffusers, under every name; what is none of this model is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from diffusers import HunyuanVideoPipeline
from diffusers.loaders.lora_conversion_utils import _convert_hunyuan_video_lora_to_diffusers
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from reelbatch import VideoRequest
from reelbatch.cli import app
from reelbatch.engine.engine import Engine
from reelbatch.loading.load import load
from reelbatch.loading.lora import LoraError, convert_file, layer_widths, load_loras, parse_lora, save_lora
from reelbatch.loading.lora_names import Lora, from_diffusers, to_diffusers
from reelbatch.loading.parameter_names import HUNYUAN_VIDEO
from reelbatch.models.hunyuan_video.transformer import HunyuanVideoTransformer3DModel
from reelbatch.train.config import ConfigError, make_config
from reelbatch.train.method import prepare_network, target_layers

REQUESTS = [
    VideoRequest(prompt="a red cat moving left", seed=1, steps=2, width=48, frames=5),
    VideoRequest(prompt="a robot", seed=2, steps=2),
]


def network() -> HunyuanVideoTransformer3DModel:
    model = HunyuanVideoTransformer3DModel(**tiny.transformer_config())
    model.load_state_dict(tiny.transformer().state_dict())
    return model


def write(path: Path, seed: int = 0, **changes: Any) -> Path:
    """A LoRA with random weights, as a training run writes it."""
    model = network()
    prepare_network(model, make_config({"rank": 3, "alpha": 2.0, **changes}))
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape))
    save_lora(model, path)
    return path


def latents(folder: Path, files: list[tuple[Path, float]]) -> list[torch.Tensor]:
    components = load(folder, "cpu")
    load_loras(components.family.transformer, files)
    videos = Engine(components, keep_latents=True).generate(REQUESTS)
    return [video.latents for video in videos if video.latents is not None]


def difference(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("changes", [{}, {"rslora": True}, {"dora": True}], ids=str)
def test_a_lora_does_in_diffusers_what_it_does_here(
    tmp_path: Path, tiny_folder: Path, tiny_pipeline: HunyuanVideoPipeline, changes: dict[str, Any]
) -> None:
    file = write(tmp_path / "a.safetensors", **changes)
    ours, without = latents(tiny_folder, [(file, 0.7)]), latents(tiny_folder, [])
    assert difference(ours, without) > 1e-2
    pipeline = HunyuanVideoPipeline.from_pretrained(tiny_folder)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(str(file), adapter_name="a")
    pipeline.set_adapters(["a"], [0.7])
    theirs = [
        pipeline(
            prompt=request.prompt,
            height=32,
            width=request.width or 32,
            num_frames=request.frames or 9,
            num_inference_steps=2,
            guidance_scale=6.0,
            generator=torch.Generator().manual_seed(request.seed),
            output_type="latent",
        ).frames[0]
        for request in REQUESTS
    ]
    assert difference(ours, theirs) < 1e-4


def test_several_loras_act_together_each_with_its_scale(tmp_path: Path, tiny_folder: Path) -> None:
    a, b = write(tmp_path / "a.safetensors", 1), write(tmp_path / "b.safetensors", 2)
    found = latents(tiny_folder, [(a, 1.0), (b, -0.5)])
    merged = load(tiny_folder, "cpu")
    weights = dict(merged.family.transformer.named_parameters())
    with torch.no_grad():
        for file, scale in ((a, 1.0), (b, -0.5)):
            lora = load_file(file)
            for name in (name for name in lora if name.endswith("lora_A.weight")):
                up = lora[name.replace("lora_A", "lora_B")]
                layer = name.removeprefix("transformer.").replace(".lora_A", "")
                weights[layer] += scale * 2.0 / 3 * up @ lora[name]  # alpha / rank
    expected = [video.latents for video in Engine(merged, keep_latents=True).generate(REQUESTS)]
    assert difference(found, expected) < 1e-4
    alone = latents(tiny_folder, [(a, 1.0)])
    assert difference(found, alone) > 1e-2


def test_a_batch_under_a_lora_is_what_its_requests_give_alone(tmp_path: Path, tiny_folder: Path) -> None:
    components = load(tiny_folder, "cpu")
    load_loras(components.family.transformer, [(write(tmp_path / "a.safetensors"), 1.0)])
    together = Engine(components).generate(REQUESTS)
    for video, request in zip(together, REQUESTS, strict=True):
        assert video.frames_sha256 == Engine(components).generate([request])[0].frames_sha256


def test_weights_that_wait_on_disk_wait_with_their_lora(tmp_path: Path, tiny_folder: Path) -> None:
    files = [(write(tmp_path / "a.safetensors"), 0.7)]
    ways = [Engine.from_pretrained(str(tiny_folder), device="cpu", lora=files, offload=o) for o in ("none", "block")]
    there, elsewhere = (engine.generate(REQUESTS) for engine in ways)
    assert [video.frames_sha256 for video in there] == [video.frames_sha256 for video in elsewhere]


def test_eight_bit_weights_take_a_lora(tmp_path: Path, tiny_folder: Path) -> None:
    file = write(tmp_path / "a.safetensors")
    components = load(tiny_folder, "cpu", "int8", lora=[(file, 0.7)])
    found = [video.latents for video in Engine(components, keep_latents=True).generate(REQUESTS)]
    near, far = difference(found, latents(tiny_folder, [(file, 0.7)])), difference(found, latents(tiny_folder, []))
    assert near < far / 3


def test_generate_takes_loras_and_tells_videos_of_different_ones_apart(tmp_path: Path, tiny_folder: Path) -> None:
    a, b = write(tmp_path / "a.safetensors", 1), write(tmp_path / "b.safetensors", 2)
    hashes = []
    for loras in ([], [f"{a}"], [f"{a}:0.5", f"{b}"]):
        flags = [part for lora in loras for part in ("--lora", lora)]
        command = ["generate", "a red cat", "--model", str(tiny_folder), "--device", "cpu", "--steps", "1", "--json"]
        found = CliRunner().invoke(app, [*command, "--out", str(tmp_path / "out"), *flags])
        assert found.exit_code == 0, found.output
        record = json.loads(found.stdout.splitlines()[-1])
        assert record["state"] == "done"
        assert all(Path(lora.partition(":")[0]).name in record["model"] for lora in loras)
        hashes.append(record["frames_sha256"])
    assert len(set(hashes)) == 3
    refused = CliRunner().invoke(app, [*command, "--lora", "nowhere.safetensors"])
    assert refused.exit_code != 0 and "nowhere.safetensors: cannot be read: No such file" in str(refused.exception)


# Names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"targets": ["attn.to_q", "mlp", "refiner", "modulation"]}, {"rslora": True}])
def test_kohyas_names_and_back_give_the_same_videos(tmp_path: Path, tiny_folder: Path, changes: dict[str, Any]) -> None:
    file = write(tmp_path / "a.safetensors", **changes)
    convert_file(file, tmp_path / "k.safetensors", "kohya", network())
    kohya = load_file(tmp_path / "k.safetensors")
    assert "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight" in kohya
    assert kohya["lora_unet_single_blocks_1_linear1.lora_up.weight"].shape[0] == 3 * 32 + 64
    assert {name.rpartition(".")[2] for name in kohya} == {"weight", "alpha"}
    convert_file(tmp_path / "k.safetensors", tmp_path / "d.safetensors", "diffusers", network())
    expected = latents(tiny_folder, [(file, 1.0)])
    for name in ("k", "d"):
        assert difference(latents(tiny_folder, [(tmp_path / f"{name}.safetensors", 1.0)]), expected) < 1e-4


def test_a_fused_lora_keeps_its_rank_there_and_back() -> None:
    """As musubi-tuner writes it: one A for queries, keys, values and MLP."""
    name = "lora_unet_single_blocks_0_linear1"
    file = {
        f"{name}.lora_down.weight": torch.randn(3, 32),
        f"{name}.lora_up.weight": torch.randn(160, 3),
        f"{name}.alpha": torch.tensor(1.5),
    }
    widths = layer_widths(network())
    ours = to_diffusers(file, widths, HUNYUAN_VIDEO).weights
    assert ours["transformer.single_transformer_blocks.0.proj_mlp.lora_B.weight"].shape == (64, 3)
    back = from_diffusers(Lora(ours, {}), widths, HUNYUAN_VIDEO, "kohya")
    assert back[f"{name}.lora_down.weight"].shape == (3, 32)
    torch.testing.assert_close(
        back[f"{name}.lora_up.weight"] * back[f"{name}.alpha"] / 3, file[f"{name}.lora_up.weight"] * 0.5
    )


def test_tencents_names_are_read_as_diffusers_reads_them() -> None:
    """At the real network's width, the only one that Diffusers' converter knows."""
    width, rank = 3072, 2
    layers = {
        "double_blocks.0.img_attn_qkv": (3 * width, width),
        "double_blocks.3.txt_attn_qkv": (3 * width, width),
        "double_blocks.0.img_attn_proj": (width, width),
        "double_blocks.0.txt_attn_proj": (width, width),
        "double_blocks.0.img_mlp.fc1": (64, width),
        "double_blocks.0.txt_mlp.fc2": (width, 64),
        "double_blocks.0.img_mod.linear": (64, width),
        "double_blocks.0.txt_mod.linear": (64, width),
        "single_blocks.7.linear1": (3 * width + 64, width),
        "single_blocks.7.linear2": (width, 64),
        "single_blocks.7.modulation.linear": (64, width),
    }
    file = {}
    for layer, (out, into) in layers.items():
        file[f"diffusion_model.{layer}.lora_A.weight"] = torch.randn(rank, into)
        file[f"diffusion_model.{layer}.lora_B.weight"] = torch.randn(out, rank)
    theirs = _convert_hunyuan_video_lora_to_diffusers(dict(file))
    widths = {
        name.removeprefix("transformer.").removesuffix(".lora_B.weight"): len(tensor)
        for name, tensor in theirs.items()
        if name.endswith("lora_B.weight")
    }
    ours = to_diffusers(file, widths, HUNYUAN_VIDEO).weights
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


# What is refused --------------------------------------------------------------------------------------------------


def test_what_is_no_lora_of_this_model_is_refused_by_name(tmp_path: Path) -> None:
    good = load_file(write(tmp_path / "a.safetensors"))
    layer = "transformer.transformer_blocks.0.attn.to_q"

    def refused(weights: dict[str, torch.Tensor], said: str) -> None:
        save_file(weights, tmp_path / "b.safetensors")
        model = network()
        with pytest.raises(LoraError, match=said):
            load_loras(model, [(tmp_path / "a.safetensors", 1.0), (tmp_path / "b.safetensors", 1.0)])
        assert not any("lora" in name for name, _ in model.named_modules())  # as it was

    refused(
        {n: t for n, t in good.items() if n != f"{layer}.lora_B.weight"},
        "missing transformer_blocks.0.attn.to_q.lora_B",
    )
    refused({n.replace("blocks.1.", "blocks.9."): t for n, t in good.items()}, "unexpected transformer.*blocks.9")
    refused(good | {f"{layer}.lora_A.weight": torch.zeros(3, 8)}, "the layer takes 32 and gives 32")
    refused(good | {f"{layer}.lora_A.weight": torch.full((3, 32), torch.nan)}, "holds NaN")
    refused({"transformer.x": torch.zeros(1)}, "unexpected transformer.x")
    (tmp_path / "c.safetensors").write_bytes(b"no file")
    with pytest.raises(LoraError, match="is no whole safetensors file"):
        load_loras(network(), [(tmp_path / "c.safetensors", 1.0)])
    with pytest.raises(LoraError, match="no such file"):
        load_loras(network(), [(tmp_path / "d.safetensors", 1.0)])


def test_a_lora_is_asked_for_with_or_without_a_scale() -> None:
    assert parse_lora("a/b.safetensors") == (Path("a/b.safetensors"), 1.0)
    assert parse_lora("b.safetensors:-0.5") == (Path("b.safetensors"), -0.5)
    assert parse_lora("C:\\b.safetensors") == (Path("C:\\b.safetensors"), 1.0)
    with pytest.raises(LoraError, match=r"'much' is no scale; give FILE or FILE:scale"):
        parse_lora("b.safetensors:much")


def test_targets_name_layers_by_group_or_by_their_ends() -> None:
    model = network()
    attention = target_layers(model, ["attention"])
    assert "single_transformer_blocks.1.attn.to_v" in attention and "transformer_blocks.0.attn.to_add_out" in attention
    assert all(".attn." in name and "context_embedder" not in name for name in attention)
    mlp = target_layers(model, ["mlp"])
    assert {"single_transformer_blocks.0.proj_out", "transformer_blocks.1.ff_context.net.2"} <= set(mlp)
    assert "proj_out" not in mlp
    assert target_layers(model, ["1.attn.to_q", "transformer_blocks.0.attn.to_k"]) == [
        "context_embedder.token_refiner.refiner_blocks.1.attn.to_q",
        "transformer_blocks.1.attn.to_q",
        "single_transformer_blocks.1.attn.to_q",
        "transformer_blocks.0.attn.to_k",
    ]
    with pytest.raises(ConfigError, match=r"'atention' names no linear layer of this model; did you mean attention\?"):
        target_layers(model, ["atention"])
