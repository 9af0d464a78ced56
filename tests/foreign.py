"""Small models as Tencent, ComfyUI and others store them: written name by name, without the tables that read them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

State = dict[str, Tensor]


def tencent(state: Mapping[str, Tensor], *, fused: bool = True) -> State:
    """The weights of Diffusers' transformer in Tencent's names.

    Args:
        fused: whether queries, keys and values of the dual-stream blocks are one layer, as in 1.0 and in ComfyUI's
            files of 1.5.
    """
    written: State = {}

    def put(name: str, *layers: str) -> None:
        for parameter in ("weight", "bias"):
            if f"{layers[0]}.{parameter}" in state:
                rows = [state[f"{layer}.{parameter}"] for layer in layers]
                written[f"{name}.{parameter}"] = torch.cat(rows) if len(rows) > 1 else rows[0].clone()

    def blocks(name: str) -> range:
        return range(
            1
            + max((int(key.split(".")[name.count(".") + 1]) for key in state if key.startswith(f"{name}.")), default=-1)
        )

    for i in blocks("transformer_blocks"):
        ours, theirs = f"transformer_blocks.{i}", f"double_blocks.{i}"
        for stream, norm, ff, out in (
            ("img", "norm1", "ff", "to_out.0"),
            ("txt", "norm1_context", "ff_context", "to_add_out"),
        ):
            names = [f"{ours}.attn.{f'to_{p}' if stream == 'img' else f'add_{p}_proj'}" for p in "qkv"]
            if fused:
                put(f"{theirs}.{stream}_attn_qkv", *names)
            else:
                for part, name in zip("qkv", names, strict=True):
                    put(f"{theirs}.{stream}_attn_{part}", name)
            put(f"{theirs}.{stream}_mod.linear", f"{ours}.{norm}.linear")
            put(f"{theirs}.{stream}_attn_proj", f"{ours}.attn.{out}")
            put(f"{theirs}.{stream}_mlp.fc1", f"{ours}.{ff}.net.0.proj")
            put(f"{theirs}.{stream}_mlp.fc2", f"{ours}.{ff}.net.2")
            for part in "qk":
                put(
                    f"{theirs}.{stream}_attn_{part}_norm",
                    f"{ours}.attn.norm_{'' if stream == 'img' else 'added_'}{part}",
                )
    for i in blocks("single_transformer_blocks"):
        ours, theirs = f"single_transformer_blocks.{i}", f"single_blocks.{i}"
        put(f"{theirs}.linear1", *(f"{ours}.{name}" for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")))
        put(f"{theirs}.linear2", f"{ours}.proj_out")
        put(f"{theirs}.modulation.linear", f"{ours}.norm.linear")
        put(f"{theirs}.q_norm", f"{ours}.attn.norm_q")
        put(f"{theirs}.k_norm", f"{ours}.attn.norm_k")
    for i in blocks("context_embedder.token_refiner.refiner_blocks"):
        ours = f"context_embedder.token_refiner.refiner_blocks.{i}"
        theirs = f"txt_in.individual_token_refiner.blocks.{i}"
        put(f"{theirs}.norm1", f"{ours}.norm1")
        put(f"{theirs}.norm2", f"{ours}.norm2")
        put(f"{theirs}.self_attn_qkv", *(f"{ours}.attn.to_{part}" for part in "qkv"))
        put(f"{theirs}.self_attn_proj", f"{ours}.attn.to_out.0")
        put(f"{theirs}.mlp.fc1", f"{ours}.ff.net.0.proj")
        put(f"{theirs}.mlp.fc2", f"{ours}.ff.net.2")
        put(f"{theirs}.adaLN_modulation.1", f"{ours}.norm_out.linear")
    put("img_in.proj", "x_embedder.proj")
    put("txt_in.input_embedder", "context_embedder.proj_in")
    for number in (1, 2):
        mlp = 2 * (number - 1)
        put(f"txt_in.t_embedder.mlp.{mlp}", f"context_embedder.time_text_embed.timestep_embedder.linear_{number}")
        put(f"txt_in.c_embedder.linear_{number}", f"context_embedder.time_text_embed.text_embedder.linear_{number}")
        put(f"time_in.mlp.{mlp}", f"time_text_embed.timestep_embedder.linear_{number}")
        put(f"time_in.mlp.{mlp}", f"time_embed.timestep_embedder.linear_{number}")
        put(f"time_r_in.mlp.{mlp}", f"time_embed.timestep_embedder_r.linear_{number}")
        put(f"guidance_in.mlp.{mlp}", f"time_text_embed.guidance_embedder.linear_{number}")
        put(f"vector_in.{('in_layer', 'out_layer')[number - 1]}", f"time_text_embed.text_embedder.linear_{number}")
    put("byt5_in.layernorm", "context_embedder_2.norm")
    for number in (1, 2, 3):
        put(f"byt5_in.fc{number}", f"context_embedder_2.linear_{number}")
    for number, name in ((0, "norm_in"), (1, "linear_1"), (3, "linear_2"), (4, "norm_out")):
        put(f"vision_in.proj.{number}", f"image_embedder.{name}")
    put("cond_type_embedding", "cond_type_embed")
    put("final_layer.linear", "proj_out")
    for parameter in ("weight", "bias"):  # here the shift is first
        scale, shift = state[f"norm_out.linear.{parameter}"].chunk(2)
        written[f"final_layer.adaLN_modulation.1.{parameter}"] = torch.cat([shift, scale])
    assert sum(t.numel() for t in written.values()) == sum(t.numel() for t in state.values())
    return written


def comfyui(state: Mapping[str, Tensor]) -> State:
    """Tencent's names as ComfyUI's own network has them."""
    renamed = {}
    for name, tensor in state.items():
        for theirs, own in (
            ("_attn_q_norm.", "_attn.norm.query_norm."),
            ("_attn_k_norm.", "_attn.norm.key_norm."),
            (".q_norm.", ".norm.query_norm."),
            (".k_norm.", ".norm.key_norm."),
            ("_attn_qkv.", "_attn.qkv."),
            ("_attn_proj.", "_attn.proj."),
            ("_mod.linear.", "_mod.lin."),
            (".modulation.linear.", ".modulation.lin."),
            ("mlp.fc1.", "mlp.0."),
            ("mlp.fc2.", "mlp.2."),
            ("c_embedder.linear_1.", "c_embedder.in_layer."),
            ("c_embedder.linear_2.", "c_embedder.out_layer."),
        ):
            name = name.replace(theirs, own)
        for embedder in ("txt_in.t_embedder", "time_in", "time_r_in", "guidance_in"):
            name = name.replace(f"{embedder}.mlp.0.", f"{embedder}.in_layer.")
            name = name.replace(f"{embedder}.mlp.2.", f"{embedder}.out_layer.")
        renamed[name] = tensor
    return renamed


def linear(name: str, tensor: Tensor) -> bool:
    """Whether a tensor is the weight of a linear layer of a block."""
    return ("double_blocks" in name or "single_blocks" in name) and name.endswith(".weight") and tensor.ndim == 2


def fp8(state: State, scale_name: Callable[[str], str], parts: int = 0) -> tuple[State, State, State]:
    """The blocks' linear weights in 8 bits, their scales under their own names, and what they stand for in bfloat16.

    Args:
        parts: of a row, each with a scale; 0 is one scale for the whole weight.
    """
    stored, scales, expected = {}, {}, {}
    for name, tensor in state.items():
        if not linear(name, tensor):
            stored[name] = expected[name] = tensor
            continue
        rows = tensor.unflatten(1, (parts, -1)) if parts else tensor
        scale = (rows.abs().amax(dim=2, keepdim=True) if parts else rows.abs().max()) / 448
        stored[name] = (rows / scale).to(torch.float8_e4m3fn).reshape(tensor.shape)
        scales[scale_name(name.removesuffix(".weight"))] = scale
        whole = stored[name].to(torch.bfloat16).unflatten(1, (parts, -1)) if parts else stored[name].to(torch.bfloat16)
        expected[name] = (whole * scale.to(torch.bfloat16)).reshape(tensor.shape)
    return stored, scales, expected


def weights(folder: Path, component: str = "transformer") -> State:
    state: State = {}
    for file in sorted((folder / component).glob("*.safetensors")):
        state |= load_file(file)
    return state


def vae15(state: Mapping[str, Tensor]) -> State:
    """The VAE of 1.5 in Tencent's names."""
    written = {}
    for name, tensor in state.items():
        parts = name.split(".")
        if parts[1] in ("down_blocks", "up_blocks"):
            parts[1] = parts[1].removesuffix("_blocks")
            kind = {"resnets": "block", "downsamplers": "downsample", "upsamplers": "upsample"}[parts[3]]
            parts[3:5] = [kind, parts[4]] if kind == "block" else [kind]
        elif parts[1] == "mid_block":
            parts[1] = "mid"
            parts[2:4] = ["attn_1"] if parts[2] == "attentions" else [f"block_{int(parts[3]) + 1}"]
            parts = [{"to_q": "q", "to_k": "k", "to_v": "v"}.get(part, part) for part in parts]
        written[".".join(parts)] = tensor.clone()
    return written


def json_of(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def tencent10_folder(folder: Path, root: Path, *, in_fp8: bool = False) -> State:
    """Writes Tencent's layout of 1.0 from a model folder; gives the weights that Diffusers' names should have."""
    model = root / "hunyuan-video-t2v-720p"
    (model / "transformers").mkdir(parents=True)
    own, state = weights(folder), tencent(weights(folder))
    states = model / "transformers" / "mp_rank_00_model_states.pt"
    if in_fp8:
        stored, scales, _ = fp8(state, lambda layer: layer)
        torch.save({"module": stored}, states.with_stem(states.stem + "_fp8"))
        torch.save(scales, states.with_stem(states.stem + "_fp8_map"))
    else:
        torch.save({"module": state}, states)
    vae = json_of(folder / "vae" / "config.json")
    vae["_class_name"] = "AutoencoderKLCausal3D"
    vae["down_block_types"] = ["DownEncoderBlockCausal3D"] * 4
    vae["up_block_types"] = ["UpDecoderBlockCausal3D"] * 4
    vae["time_compression_ratio"] = vae.pop("temporal_compression_ratio")
    write_json(model / "vae" / "config.json", vae)
    torch.save(
        {"state_dict": {f"vae.{name}": t for name, t in weights(folder, "vae").items()}},
        model / "vae" / "pytorch_model.pt",
    )
    return own


def tencent15_folder(folder: Path, root: Path, variant: str) -> None:
    """Writes Tencent's layout of 1.5 from a model folder: the transformer and the VAE."""
    config = json_of(folder / "transformer" / "config.json")
    theirs = {
        "_class_name": "HunyuanVideo_1_5_DiffusionTransformer",
        "patch_size": [config["patch_size_t"], config["patch_size"], config["patch_size"]],
        "in_channels": config["out_channels"],
        "concat_condition": True,
        "hidden_size": config["num_attention_heads"] * config["attention_head_dim"],
        "heads_num": config["num_attention_heads"],
        "mm_double_blocks_depth": config["num_layers"],
        "mm_single_blocks_depth": 0,
        "rope_dim_list": config["rope_axes_dim"],
        "rope_theta": 256,
        "ideal_resolution": variant[:4],
        "use_meanflow": config["use_meanflow"],
    }
    write_json(root / "transformer" / variant / "config.json", theirs)
    save_file(
        tencent(weights(folder), fused=False), root / "transformer" / variant / "diffusion_pytorch_model.safetensors"
    )
    vae = json_of(folder / "vae" / "config.json")
    vae["_class_name"] = "AutoencoderKLConv3D"
    vae["ffactor_spatial"] = vae.pop("spatial_compression_ratio")
    vae["ffactor_temporal"] = vae.pop("temporal_compression_ratio")
    vae["shift_factor"] = None
    write_json(root / "vae" / "config.json", vae)
    save_file(vae15(weights(folder, "vae")), root / "vae" / "diffusion_pytorch_model.safetensors")


def without(folder: Path, out: Path, *components: str) -> Path:
    shutil.copytree(folder, out, ignore=lambda place, names: [n for n in names if n in components])
    return out


def towers10(folder: Path, root: Path) -> None:
    """Llama as a part of what makes text, and CLIP with its half for images, beside Tencent's layout of 1.0."""
    write_json(
        root / "text_encoder" / "config.json",
        {**json_of(folder / "text_encoder" / "config.json"), "architectures": ["LlamaForCausalLM"]},
    )
    own = {f"model.{name}": tensor for name, tensor in weights(folder, "text_encoder").items()}
    save_file(own | {"lm_head.weight": torch.ones(3, 32)}, root / "text_encoder" / "model.safetensors")
    text = json_of(folder / "text_encoder_2" / "config.json")
    write_json(
        root / "text_encoder_2" / "config.json",
        {
            "architectures": ["CLIPModel"],
            "model_type": "clip",
            "text_config": text,
            "vision_config": {"hidden_size": 8},
        },
    )
    own = {name.removeprefix("text_model."): tensor for name, tensor in weights(folder, "text_encoder_2").items()}
    own = {f"text_model.{name}": tensor for name, tensor in own.items()}
    others = {
        "vision_model.post_layernorm.weight": torch.ones(8),
        "logit_scale": torch.ones(()),
        "text_projection.weight": torch.ones(24, 24),
        "text_model.embeddings.position_ids": torch.arange(77),
    }
    save_file(own | others, root / "text_encoder_2" / "model.safetensors")
    (root / "text_encoder_2" / "pytorch_model.bin").write_bytes(b"the same for PyTorch")
    for name in ("tokenizer", "tokenizer_2"):
        place = root / name.replace("tokenizer", "text_encoder")
        for file in (folder / name).iterdir():
            shutil.copyfile(file, place / file.name)


def towers15(folder: Path, root: Path, tokens: int) -> State:
    """Qwen with its half for images, and Glyph, beside Tencent's layout of 1.5; gives ByT5's weights.

    Args:
        tokens: of colours and fonts that Glyph has besides ByT5's.
    """
    place = root / "text_encoder"
    text = json_of(folder / "text_encoder" / "config.json")
    write_json(
        place / "llm" / "config.json", {"architectures": ["Qwen2_5_VLForConditionalGeneration"], "text_config": text}
    )
    own = {f"model.language_model.{name}": tensor for name, tensor in weights(folder, "text_encoder").items()}
    others = {"model.visual.patch_embed.proj.weight": torch.ones(2, 2), "lm_head.weight": torch.ones(2, 2)}
    save_file(own | others, place / "llm" / "model.safetensors")
    for file in (folder / "tokenizer").iterdir():
        shutil.copyfile(file, place / "llm" / file.name)
    write_json(place / "byt5-small" / "config.json", json_of(folder / "text_encoder_2" / "config.json"))
    colours = tokens // 2
    write_json(place / "Glyph-SDXL-v2" / "assets" / "color_idx.json", {f"c{i}": i for i in range(colours)})
    fonts = {f"en-font {i}": i for i in range(tokens - colours)}
    write_json(place / "Glyph-SDXL-v2" / "assets" / "multilingual_10-lang_idx.json", fonts)
    byt5 = weights(folder, "text_encoder_2")
    shared = byt5.pop("shared.weight")
    byt5["encoder.embed_tokens.weight"] = torch.cat([shared, torch.full((tokens, shared.shape[1]), 0.5)])
    (place / "Glyph-SDXL-v2" / "checkpoints").mkdir(parents=True)
    named = {f"module.text_tower.{name}": tensor for name, tensor in byt5.items()}
    torch.save({"state_dict": named}, place / "Glyph-SDXL-v2" / "checkpoints" / "byt5_model.pt")
    return byt5


def towers15_image(folder: Path, root: Path) -> None:
    place = root / "vision_encoder" / "siglip"
    for name in ("image_encoder", "feature_extractor"):
        shutil.copytree(folder / name, place / name)
    own = weights(folder, "image_encoder")
    own = {f"vision_model.{name.removeprefix('vision_model.')}": tensor for name, tensor in own.items()}
    save_file(own, place / "image_encoder" / "model.safetensors")
