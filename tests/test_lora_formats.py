"""LoRA files of every program, written here by hand and not by the table that reads them, change what they name."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny15
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from reelbatch.cli import app
from reelbatch.engine.engine import Engine
from reelbatch.loading.load import load
from reelbatch.loading.lora import LoraError, check_loras, convert_file, layer_widths, load_loras
from reelbatch.loading.lora_names import Lora, from_diffusers, to_diffusers
from reelbatch.loading.parameter_names import HUNYUAN_VIDEO, HUNYUAN_VIDEO_15, ParameterNames
from reelbatch.models.hunyuan_video.transformer import HunyuanVideoTransformer3DModel
from reelbatch.models.hunyuan_video15.transformer import HunyuanVideo15Transformer3DModel
from reelbatch.request import VideoRequest

RANK, ALPHA = 4, 8.0
SCALE = ALPHA / RANK
"""A power of two, by which no bit of a weight is lost."""


@cache
def state(model: str) -> dict[str, Tensor]:
    return dict((tiny if model == "1.0" else tiny15).transformer().state_dict())


def network(model: str) -> Any:
    """Ours, of the small networks' weights: 32 wide, with feed-forwards of 64."""
    kind, config = {
        "1.0": (HunyuanVideoTransformer3DModel, tiny.transformer_config()),
        "1.5": (HunyuanVideo15Transformer3DModel, tiny15.TRANSFORMER),
    }[model]
    with torch.device("meta"):
        ours = kind(**config)
    ours.load_state_dict({name: weight.clone() for name, weight in state(model).items()}, assign=True)
    return ours


def changes(model: str, file: Path, scale: float = 1.0) -> dict[str, Tensor]:
    """What a file adds to the network's weights, of those that it changes."""
    ours = network(model)
    load_loras(ours, [(file, scale)])
    for module in ours.modules():
        if hasattr(module, "lora_A"):
            module.merge()
    after = {name.replace(".base_layer.", "."): weight for name, weight in ours.state_dict().items()}
    before = state(model)
    return {name: after[name] - weight for name, weight in before.items() if not torch.equal(after[name], weight)}


def same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, change in found.items():
        torch.testing.assert_close(
            change, expected[name], atol=1e-5, rtol=1e-4, msg=lambda text, n=name: f"{n}: {text}"
        )


def matrices(seed: int, out: int, into: int, rank: int = RANK) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    down, up = torch.randn(rank, into, generator=generator), torch.randn(out, rank, generator=generator)
    return 0.1 * down, 0.1 * up


# The layers that the files below have, by what they are, with outputs and inputs ----------------------------------

LAYERS = {
    "1.0": {
        "image qkv": (96, 32),
        "text qkv": (96, 32),
        "image mlp": (64, 32),
        "text out": (32, 32),
        "single in": (160, 32),
        "single out": (32, 96),
        "single modulation": (96, 32),
        "refiner qkv": (96, 32),
        "refiner mlp": (32, 128),
        "time": (32, 256),
        "last modulation": (64, 32),
        "last": (16, 32),
    },
    "1.5": {
        "image qkv": (96, 32),
        "text qkv": (96, 32),
        "image mlp": (64, 32),
        "text out": (32, 32),
        "refiner qkv": (96, 32),
        "glyphs": (2048, 24),
        "vision": (32, 20),
        "time": (32, 256),
        "last modulation": (64, 32),
    },
}
TENCENT = {
    "image qkv": "double_blocks.0.img_attn_qkv",
    "text qkv": "double_blocks.1.txt_attn_qkv",
    "image mlp": "double_blocks.1.img_mlp.fc1",
    "text out": "double_blocks.0.txt_attn_proj",
    "single in": "single_blocks.1.linear1",
    "single out": "single_blocks.0.linear2",
    "single modulation": "single_blocks.0.modulation.linear",
    "refiner qkv": "txt_in.individual_token_refiner.blocks.1.self_attn_qkv",
    "refiner mlp": "txt_in.individual_token_refiner.blocks.0.mlp.fc2",
    "time": "time_in.mlp.0",
    "glyphs": "byt5_in.fc1",
    "vision": "vision_in.proj.3",
    "last modulation": "final_layer.adaLN_modulation.1",
    "last": "final_layer.linear",
}
COMFYUI = TENCENT | {
    "image qkv": "double_blocks.0.img_attn.qkv",
    "text qkv": "double_blocks.1.txt_attn.qkv",
    "image mlp": "double_blocks.1.img_mlp.0",
    "text out": "double_blocks.0.txt_attn.proj",
    "single modulation": "single_blocks.0.modulation.lin",
    "refiner qkv": "txt_in.individual_token_refiner.blocks.1.self_attn.qkv",
    "refiner mlp": "txt_in.individual_token_refiner.blocks.0.mlp.2",
    "time": "time_in.in_layer",
}
DIFFUSERS: dict[str, dict[str, tuple[str, ...]]] = {
    "1.0": {
        "single in": tuple(
            f"single_transformer_blocks.1.{n}" for n in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
        ),
        "single out": ("single_transformer_blocks.0.proj_out",),
        "single modulation": ("single_transformer_blocks.0.norm.linear",),
        "time": ("time_text_embed.timestep_embedder.linear_1",),
    },
    "1.5": {
        "glyphs": ("context_embedder_2.linear_1",),
        "vision": ("image_embedder.linear_2",),
        "time": ("time_embed.timestep_embedder.linear_1",),
    },
}
for _own in DIFFUSERS.values():
    _own |= {
        "image qkv": tuple(f"transformer_blocks.0.attn.to_{part}" for part in "qkv"),
        "text qkv": tuple(f"transformer_blocks.1.attn.add_{part}_proj" for part in "qkv"),
        "image mlp": ("transformer_blocks.1.ff.net.0.proj",),
        "text out": ("transformer_blocks.0.attn.to_add_out",),
        "refiner qkv": tuple(f"context_embedder.token_refiner.refiner_blocks.1.attn.to_{part}" for part in "qkv"),
        "refiner mlp": ("context_embedder.token_refiner.refiner_blocks.0.ff.net.2",),
        "last modulation": ("norm_out.linear",),
        "last": ("proj_out",),
    }


def expected_of(model: str, scale: float = SCALE) -> dict[str, Tensor]:
    """The change of each weight of Diffusers' network, from the matrices of `matrices`."""
    changed = {}
    for seed, (layer, (out, into)) in enumerate(LAYERS[model].items()):
        down, up = matrices(seed, out, into)
        whole = scale * up @ down
        if layer == "last modulation":  # scale before shift
            whole = torch.cat([whole[32:], whole[:32]])
        names, begin = DIFFUSERS[model][layer], 0
        for name in names:
            rows = 64 if name.endswith("proj_mlp") else out if len(names) == 1 else 32
            changed[f"{name}.weight"] = whole[begin : begin + rows]
            begin += rows
    return changed


Write = Callable[[str], tuple[dict[str, Tensor], dict[str, str]]]


def kohya(names: dict[str, str], alpha: Any = ALPHA) -> Write:
    """musubi-tuner's, of a network whose queries, keys and values are one layer."""

    def write(model: str) -> tuple[dict[str, Tensor], dict[str, str]]:
        file = {}
        for seed, (layer, (out, into)) in enumerate(LAYERS[model].items()):
            name = "lora_unet_" + names[layer].replace(".", "_")
            file[f"{name}.lora_down.weight"], file[f"{name}.lora_up.weight"] = matrices(seed, out, into)
            file[f"{name}.alpha"] = torch.tensor(alpha)
        return file, {"ss_network_module": "networks.lora"}

    return write


def dotted(prefix: str, names: dict[str, str], down: str, up: str) -> Write:
    def write(model: str) -> tuple[dict[str, Tensor], dict[str, str]]:
        file = {}
        for seed, (layer, (out, into)) in enumerate(LAYERS[model].items()):
            a, b = matrices(seed, out, into)
            file[f"{prefix}{names[layer]}.{down}"] = a
            file[f"{prefix}{names[layer]}.{up}"] = b if "down" in down else SCALE * b  # PEFT stores no alpha
            if "down" in down:
                file[f"{prefix}{names[layer]}.alpha"] = torch.tensor(ALPHA)
        return file, {}

    return write


def split(prefix: str, named: Callable[[str, str, int, str], str], down: str, up: str) -> Write:
    """Of a network that has queries, keys and values apart, and the last modulation in its own order."""

    def write(model: str) -> tuple[dict[str, Tensor], dict[str, str]]:
        file = {}
        for seed, (layer, (out, into)) in enumerate(LAYERS[model].items()):
            a, b = matrices(seed, out, into)
            parts, begin = DIFFUSERS[model][layer], 0
            for number, diffusers in enumerate(parts):
                rows = 64 if diffusers.endswith("proj_mlp") else out if len(parts) == 1 else 32
                name = prefix + named(model, layer, number, diffusers)
                mine = b[begin : begin + rows]
                if layer == "last modulation" and "double" not in named(model, "image qkv", 0, ""):
                    mine = torch.cat([mine[32:], mine[:32]])
                file[f"{name}.{down}"], file[f"{name}.{up}"] = a.clone(), mine.clone()
                if "down" in down:
                    file[f"{name}.alpha"] = torch.tensor(ALPHA)
                begin += rows
        peft = {"r": RANK, "lora_alpha": ALPHA, "peft_type": "LORA", "rank_pattern": {}}
        if "down" in down:
            return file, {}
        keys = {f"{prefix}{key}": value for key, value in peft.items()}
        return file, {"format": "pt", "lora_adapter_metadata": json.dumps(keys)}

    return write


def _diffusers(model: str, layer: str, number: int, name: str) -> str:
    return name


def _tencent15(model: str, layer: str, number: int, name: str) -> str:
    """Tencent's network of 1.5: the refiner's layers are one, the blocks' three."""
    return (
        TENCENT[layer].removesuffix("_qkv") + f"_{'qkv'[number]}"
        if layer in ("image qkv", "text qkv")
        else TENCENT[layer]
    )


def tencent15(prefix: str, down: str, up: str, underscores: bool = False) -> Write:
    def write(model: str) -> tuple[dict[str, Tensor], dict[str, str]]:
        file = {}
        for seed, (layer, (out, into)) in enumerate(LAYERS[model].items()):
            a, b = matrices(seed, out, into)
            for number in range(3 if layer in ("image qkv", "text qkv") else 1):
                name = _tencent15(model, layer, number, "")
                name = prefix + (name.replace(".", "_") if underscores else name)
                rows = b[32 * number : 32 * number + 32] if layer in ("image qkv", "text qkv") else b
                file[f"{name}.{down}"], file[f"{name}.{up}"] = a.clone(), rows.clone()
                if "down" in down:
                    file[f"{name}.alpha"] = torch.tensor(ALPHA)
        if "down" in down:
            return file, {}
        # as PeftAdapterMixin.save_lora_adapter writes it: no prefix before the settings
        peft = {"r": RANK, "lora_alpha": ALPHA, "target_modules": ["linear"], "rank_pattern": {}}
        return file, {"format": "pt", "lora_adapter_metadata": json.dumps(peft)}

    return write


FORMATS: dict[tuple[str, str], Write] = {
    ("1.0", "musubi-tuner"): kohya(TENCENT),
    ("1.0", "musubi-tuner for ComfyUI, alpha a whole number"): kohya(COMFYUI, int(ALPHA)),
    ("1.0", "ComfyUI's own"): dotted("diffusion_model.", COMFYUI, "lora_down.weight", "lora_up.weight"),
    ("1.0", "Tencent's, PEFT"): dotted("diffusion_model.", TENCENT, "lora_A.weight", "lora_B.weight"),
    ("1.0", "diffusion-pipe"): dotted("transformer.", TENCENT, "lora_A.weight", "lora_B.weight"),
    ("1.0", "PEFT's own"): dotted("base_model.model.", TENCENT, "lora_A.default.weight", "lora_B.default.weight"),
    ("1.0", "Diffusers"): split("transformer.", _diffusers, "lora_A.weight", "lora_B.weight"),
    ("1.0", "OneTrainer"): split(
        "lora_transformer_", lambda *a: a[-1].replace(".", "_"), "lora_down.weight", "lora_up.weight"
    ),
    ("1.5", "Tencent's training"): tencent15("", "lora_A.weight", "lora_B.weight"),
    ("1.5", "musubi-tuner"): tencent15("lora_unet_", "lora_down.weight", "lora_up.weight", underscores=True),
    ("1.5", "musubi-tuner for ComfyUI"): kohya(COMFYUI),
    ("1.5", "ComfyUI's own"): dotted("diffusion_model.", COMFYUI, "lora_down.weight", "lora_up.weight"),
    ("1.5", "Tencent's names, one qkv"): dotted("diffusion_model.", TENCENT, "lora_A.weight", "lora_B.weight"),
    ("1.5", "Diffusers"): split("transformer.", _diffusers, "lora_A.weight", "lora_B.weight"),
}


def write(file: Path, model: str, form: str) -> Path:
    weights, metadata = FORMATS[model, form](model)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, file, metadata or None)
    return file


@pytest.mark.parametrize(("model", "form"), FORMATS, ids=str)
def test_a_file_changes_the_weights_that_its_program_would(tmp_path: Path, model: str, form: str) -> None:
    file = write(tmp_path / "a.safetensors", model, form)
    same(changes(model, file, 0.5), expected_of(model, SCALE / 2))


@pytest.mark.parametrize("names", ["diffusers", "tencent", "kohya", "comfyui"])
@pytest.mark.parametrize("model", ["1.0", "1.5"])
def test_a_file_of_one_program_becomes_that_of_another(tmp_path: Path, model: str, names: Any) -> None:
    file = write(tmp_path / "a.safetensors", model, "musubi-tuner")
    convert_file(file, tmp_path / "b.safetensors", names, network(model))
    same(changes(model, tmp_path / "b.safetensors"), expected_of(model))
    qkv = {
        ("1.0", "kohya"): "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight",
        ("1.5", "kohya"): "lora_unet_double_blocks_0_img_attn_k.lora_down.weight",
        ("1.0", "tencent"): "diffusion_model.double_blocks.0.img_attn_qkv.lora_A.weight",
        ("1.5", "tencent"): "diffusion_model.double_blocks.0.img_attn_k.lora_A.weight",
        (model, "comfyui"): "diffusion_model.double_blocks.0.img_attn.qkv.lora_down.weight",
        (model, "diffusers"): "transformer.transformer_blocks.0.attn.to_k.lora_A.weight",
    }[model, names]
    assert load_file(tmp_path / "b.safetensors")[qkv].shape == (RANK, 32)  # a shared A stays one


def test_the_command_converts_for_the_model_it_is_given(tmp_path: Path) -> None:
    folder = tiny15.make_folder(tmp_path / "m", "text")
    file = write(tmp_path / "a.safetensors", "1.5", "Tencent's training")
    command = ["convert-lora", str(file), str(tmp_path / "b.safetensors"), "--names", "comfyui"]
    done = CliRunner().invoke(app, [*command, "--model", str(folder)])
    assert done.exit_code == 0, done.output
    same(changes("1.5", tmp_path / "b.safetensors"), expected_of("1.5"))
    refused = CliRunner().invoke(app, command)  # the bundled model is a 1.0
    assert "is a LoRA of HunyuanVideo 1.5" in str(refused.exception)


@pytest.mark.parametrize("model", ["1.0", "1.5"])
def test_a_video_is_the_same_to_the_bit_under_a_lora_of_any_program(
    tmp_path: Path, tiny_folder: Path, model: str
) -> None:
    folder = tiny_folder if model == "1.0" else tiny15.make_folder(tmp_path / "m", "text")
    request = VideoRequest(prompt="a red cat", seed=3, steps=1, height=32, width=32, frames=5)

    def frames(form: str | None) -> str | None:
        lora = [] if form is None else [(write(tmp_path / "a.safetensors", model, form), 1.0)]
        return Engine(load(folder, "cpu", lora=lora)).generate([request])[0].frames_sha256

    reference = frames("Diffusers")
    assert reference != frames(None)
    for form in ("musubi-tuner", "ComfyUI's own"):
        assert frames(form) == reference, form


# DoRA, LyCORIS, differences ---------------------------------------------------------------------------------------


def test_doras_magnitudes_are_those_of_the_rows(tmp_path: Path) -> None:
    name, weight = "lora_unet_double_blocks_0_img_attn_qkv", state("1.0")
    base = torch.cat([weight[f"transformer_blocks.0.attn.to_{part}.weight"] for part in "qkv"])
    (down, up), magnitude = matrices(1, 96, 32), torch.rand(96, 1) + 0.5
    file = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(ALPHA)}
    save_file(file | {f"{name}.dora_scale": magnitude}, tmp_path / "a.safetensors")
    moved = base + SCALE * up @ down
    changed = magnitude * moved / moved.norm(dim=1, keepdim=True) - base
    expected = {
        f"transformer_blocks.0.attn.to_{p}.weight": rows for p, rows in zip("qkv", changed.split(32), strict=True)
    }
    same(changes("1.0", tmp_path / "a.safetensors"), expected)
    for names in ("kohya", "comfyui", "tencent", "diffusers"):
        convert_file(tmp_path / "a.safetensors", tmp_path / f"{names}.safetensors", names, network("1.0"))
        same(changes("1.0", tmp_path / f"{names}.safetensors"), expected)
    save_file(file | {f"{name}.dora_scale": torch.ones(1, 32)}, tmp_path / "b.safetensors")
    with pytest.raises(LoraError, match=r"magnitudes of the inputs \(LyCORIS with wd_on_output=False\)"):
        load_loras(network("1.0"), [(tmp_path / "b.safetensors", 1.0)])


def _factors(*shapes: tuple[int, int]) -> list[Tensor]:
    return [
        0.3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed, shape in enumerate(shapes)
    ]


def _loha() -> tuple[dict[str, Tensor], Tensor]:
    a, b, c, d = _factors((96, 2), (2, 32), (96, 3), (3, 32))
    parts = {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": c, "hada_w2_b": d, "alpha": torch.tensor(1.0)}
    return parts, torch.einsum("ir,rj,is,sj->ij", a, b, c, d) / 2


def _lokr() -> tuple[dict[str, Tensor], Tensor]:
    w1, a, b = _factors((8, 4), (12, 2), (2, 8))
    parts = {"lokr_w1": w1, "lokr_w2_a": a, "lokr_w2_b": b, "alpha": torch.tensor(3.0)}
    return parts, torch.einsum("ij,kr,rl->ikjl", w1, a, b).reshape(96, 32) * 1.5


def _lokr_of_two_products() -> tuple[dict[str, Tensor], Tensor]:
    a, b, c, d = _factors((8, 2), (2, 4), (12, 3), (3, 8))
    parts = {"lokr_w1_a": a, "lokr_w1_b": b, "lokr_w2_a": c, "lokr_w2_b": d}
    return parts, torch.einsum("iq,qj,kr,rl->ikjl", a, b, c, d).reshape(96, 32)


def _lokr_of_whole_matrices() -> tuple[dict[str, Tensor], Tensor]:
    w1, w2 = _factors((8, 4), (12, 8))
    return {"lokr_w1": w1, "lokr_w2": w2, "alpha": torch.tensor(5.0)}, torch.einsum("ij,kl->ikjl", w1, w2).reshape(
        96, 32
    )


def _whole() -> tuple[dict[str, Tensor], Tensor]:
    (whole,) = _factors((96, 32))
    return {"diff": whole}, whole


KINDS = {kind.__name__: kind for kind in (_loha, _lokr, _lokr_of_two_products, _lokr_of_whole_matrices, _whole)}


@pytest.mark.parametrize("kind", KINDS)
def test_products_of_lycoris_and_differences_are_added_to_the_weights(tmp_path: Path, kind: str) -> None:
    parts, whole = KINDS[kind]()
    names = [f"transformer_blocks.0.attn.to_{part}.weight" for part in "qkv"]
    expected = dict(zip(names, whole.split(32), strict=True))
    for layer in ("lora_unet_double_blocks_0_img_attn_qkv", "diffusion_model.double_blocks.0.img_attn.qkv"):
        save_file({f"{layer}.{name}": tensor for name, tensor in parts.items()}, tmp_path / "a.safetensors")
        for model in ("1.0", "1.5"):
            same(changes(model, tmp_path / "a.safetensors"), expected)
    convert_file(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "comfyui", network("1.0"))
    same(changes("1.0", tmp_path / "b.safetensors"), expected)
    with pytest.raises(LoraError, match="by more than a LoRA can"):
        convert_file(tmp_path / "a.safetensors", tmp_path / "c.safetensors", "kohya", network("1.0"))


def test_differences_of_norms_and_biases_beside_a_lora(tmp_path: Path) -> None:
    down, up = matrices(0, 32, 32)
    norm, bias, shift = torch.randn(16), torch.randn(96), torch.randn(64)
    file = {
        "diffusion_model.double_blocks.1.txt_attn.proj.lora_down.weight": down,
        "diffusion_model.double_blocks.1.txt_attn.proj.lora_up.weight": up,
        "diffusion_model.double_blocks.0.img_attn.norm.query_norm.diff": norm,
        "diffusion_model.double_blocks.0.txt_attn.qkv.diff_b": bias,
        "diffusion_model.final_layer.adaLN_modulation.1.diff_b": shift,
    }
    save_file(file, tmp_path / "a.safetensors")
    expected = {
        "transformer_blocks.1.attn.to_add_out.weight": up @ down,
        "transformer_blocks.0.attn.norm_q.weight": norm,
        "norm_out.linear.bias": torch.cat([shift[32:], shift[:32]]),
        **{f"transformer_blocks.0.attn.add_{p}_proj.bias": rows for p, rows in zip("qkv", bias.split(32), strict=True)},
    }
    for model in ("1.0", "1.5"):
        same(changes(model, tmp_path / "a.safetensors"), expected)
        convert_file(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "comfyui", network(model))
        assert load_file(tmp_path / "b.safetensors").keys() - file.keys() == {
            "diffusion_model.double_blocks.1.txt_attn.proj.alpha"
        }
        same(changes(model, tmp_path / "b.safetensors"), expected)


def test_eight_bit_weights_take_no_differences(tmp_path: Path, tiny_folder: Path) -> None:
    save_file({"diffusion_model.double_blocks.0.img_attn.qkv.diff": torch.ones(96, 32)}, tmp_path / "a.safetensors")
    with pytest.raises(LoraError, match="differences are added to whole weights: leave int8 out"):
        load(tiny_folder, "cpu", "int8", lora=[(tmp_path / "a.safetensors", 1.0)])


# What is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "form"), [(m, f) for m, f in FORMATS if f != "Tencent's names, one qkv"], ids=str)
def test_a_lora_of_the_other_model_is_refused_with_that_reason(tmp_path: Path, model: str, form: str) -> None:
    file = write(tmp_path / "a.safetensors", model, form)
    other = {"1.0": "1.5", "1.5": "1.0"}[model]
    said = rf"is a LoRA of HunyuanVideo {model} \(.*\), and this model is HunyuanVideo {other}.*no LoRA of one fits"
    ours = network(other)
    with pytest.raises(LoraError, match=said):
        load_loras(ours, [(file, 1.0)])
    assert not any("lora" in name for name, _ in ours.named_modules())


@pytest.mark.parametrize(("width", "other"), [(3072, 2048), (2048, 3072)])
def test_where_names_do_not_tell_the_width_does(tmp_path: Path, width: int, other: int) -> None:
    """Names of a block that both models have, at the published widths."""
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    save_file(
        {f"{name}.lora_down.weight": torch.ones(1, other), f"{name}.lora_up.weight": torch.ones(3 * width, 1)},
        tmp_path / "a.safetensors",
    )
    heads = {"num_attention_heads": width // 16, "num_layers": 1}
    with torch.device("meta"):
        ours: Any = (
            HunyuanVideoTransformer3DModel(**{**tiny.transformer_config(), **heads, "num_single_layers": 1})
            if width == 3072
            else HunyuanVideo15Transformer3DModel(**{**tiny15.TRANSFORMER, **heads})
        )
    made_for = "1.5" if other == 2048 else "1.0"
    with pytest.raises(LoraError, match=rf"is a LoRA of HunyuanVideo {made_for} \(.*has {other} inputs\)"):
        check_loras(ours, [(tmp_path / "a.safetensors", 1.0)])


ONE = "lora_unet_double_blocks_0_img_attn_proj"
REFUSED: dict[str, tuple[dict[str, Tensor], str]] = {
    "OFT": ({f"{ONE}.oft_blocks": torch.ones(4, 4)}, "OFT, which is not read"),
    "GLoRA": ({f"{ONE}.a1.weight": torch.ones(4, 4)}, "GLoRA, which is not read"),
    "Tucker": ({f"{ONE}.lokr_t2": torch.ones(2, 2, 1, 1)}, "LoKr of a convolution, which is not read"),
    "half a LoHa": ({f"{ONE}.hada_w1_a": torch.ones(32, 2)}, "are not the weights of one LoHa, LoKr or diff"),
    "half a LoKr": ({f"{ONE}.lokr_w1": torch.ones(4, 4)}, "are not the weights of a LoKr"),
    "a LoKr of another size": (
        {f"{ONE}.lokr_w1": torch.ones(2**17, 1), f"{ONE}.lokr_w2": torch.ones(1, 2**17)},
        r"is of \[131072, 131072\]; the network's is \[32, 32\]",
    ),
    "numbers too large": (
        {f"{ONE}.lokr_w1": torch.full((4, 4), 1e30), f"{ONE}.lokr_w2": torch.full((8, 8), 1e30)},
        "can be as large as 1e.60, which is no number here",
    ),
    "NaN": ({f"{ONE}.diff": torch.full((32, 32), torch.nan)}, "holds NaN or infinity"),
    "two kinds": ({f"{ONE}.diff": torch.ones(32, 32), f"{ONE}.lora_up.weight": torch.ones(32, 1)}, "two kinds at once"),
    "no such parameter": (
        {"diffusion_model.double_blocks.0.img_attn.norm.query_norm.diff_b": torch.ones(16)},
        "unexpected difference of transformer_blocks.0.attn.norm_q.bias",
    ),
    "another width": (
        {
            "lora_unet_single_blocks_0_linear1.lora_up.weight": torch.ones(96, 1),
            "lora_unet_single_blocks_0_linear1.lora_down.weight": torch.ones(1, 32),
        },
        "give 96 outputs; this network has 160",
    ),
}


@pytest.mark.parametrize(("weights", "said"), REFUSED.values(), ids=REFUSED.keys())
def test_other_adapters_and_damaged_ones_are_refused_by_name(
    tmp_path: Path, weights: dict[str, Tensor], said: str
) -> None:
    save_file(weights, tmp_path / "a.safetensors")
    ours = network("1.0")
    with pytest.raises(LoraError, match=said):
        load_loras(ours, [(tmp_path / "a.safetensors", 1.0)])
    assert all(torch.equal(weight, state("1.0")[name]) for name, weight in ours.state_dict().items())


# Any LoRA, any form, there and back -------------------------------------------------------------------------------

NAMES: dict[str, ParameterNames] = {"1.0": HUNYUAN_VIDEO, "1.5": HUNYUAN_VIDEO_15}


@given(data=st.data(), model=st.sampled_from(["1.0", "1.5"]), form=st.sampled_from(["tencent", "kohya", "comfyui"]))
@settings(max_examples=30, deadline=None)
def test_any_lora_keeps_what_it_adds_there_and_back(data: st.DataObject, model: str, form: Any) -> None:
    weights = state(model)
    widths = {
        name.removesuffix(".weight"): len(weight)
        for name, weight in weights.items()
        if name.endswith(".weight") and weight.ndim == 2 and "cond_type" not in name
    }
    layers = data.draw(st.lists(st.sampled_from(sorted(widths)), min_size=1, max_size=6, unique=True))
    given_lora: dict[str, Tensor] = {}
    for layer in layers:
        rank, seed = data.draw(st.integers(1, 3)), data.draw(st.integers(0, 3))
        into = weights[f"{layer}.weight"].shape[1]
        down, up = matrices(seed, widths[layer], into, rank)
        given_lora |= {f"transformer.{layer}.lora_A.weight": down, f"transformer.{layer}.lora_B.weight": up}
    alphas = {layer: data.draw(st.sampled_from([0.5, 1.0, 3.0])) for layer in layers}
    file = from_diffusers(Lora(given_lora, {}), widths, NAMES[model], form, alphas)
    back = to_diffusers(file, widths, NAMES[model]).weights
    for layer in widths:
        name = f"transformer.{layer}.lora_"
        added = back[f"{name}B.weight"] @ back[f"{name}A.weight"] if f"{name}A.weight" in back else torch.zeros(())
        if layer in layers:
            down, up = given_lora[f"{name}A.weight"], given_lora[f"{name}B.weight"]
            torch.testing.assert_close(added, up @ down * alphas[layer] / len(down))
        else:
            assert not added.any()


def test_every_layer_of_the_networks_has_a_name_in_every_style() -> None:
    for model, names in NAMES.items():
        layers = {name.rpartition(".")[0] for name in state(model)}
        for style in ("tencent", "comfyui"):
            spelled = names.spelled(style)
            assert layers <= spelled.keys()
            for layer in layers:
                name, target = spelled[layer]
                assert names.targets[name] == target
                assert layer in target.layers
    assert layer_widths(network("1.5"))["norm_out.linear"] == 64
