"""`reelbatch convert`: every layout that people have gives the weights, and the videos, of Diffusers' folder."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import foreign
import pytest
import tiny
import tiny15
import tiny_i2v
import torch
from diffusers.loaders.single_file_utils import convert_hunyuan_video_transformer_to_diffusers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from typer.testing import CliRunner

from reelbatch import VideoRequest
from reelbatch.cli import app
from reelbatch.engine.engine import Engine
from reelbatch.loading.checkpoints.convert import Conversion, base_model, check_out, describe, write
from reelbatch.loading.checkpoints.convert import plan as plan_of
from reelbatch.loading.checkpoints.kinds import KINDS, possible
from reelbatch.loading.checkpoints.parts import config_of, reader, recognise
from reelbatch.loading.checkpoints.weight_files import WeightFile
from reelbatch.loading.configs import build
from reelbatch.loading.families import LAYOUTS
from reelbatch.loading.hub import DEMO_FOLDER, ModelFolderError
from reelbatch.loading.inspection import inspect
from reelbatch.loading.load import load
from reelbatch.loading.stored import StoredTensor

State = foreign.State
PREFIX = "model.diffusion_model."


@pytest.fixture(scope="module")
def folder15(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """HunyuanVideo 1.5, text to video. Read only."""
    return tiny15.make_folder(tmp_path_factory.mktemp("tiny15"), "text")


@pytest.fixture
def base(request: pytest.FixtureRequest, tiny_folder: Path, folder15: Path) -> Path:
    return {"1.0": tiny_folder, "1.5": folder15}[request.param]


def model_of(folder: Path) -> str:
    return "1.5" if "15" in folder.parent.name + folder.name else "1.0"


inspected = cache(base_model)
"""Of folders that no test changes."""


def plan(source: Path, asked: str | None = None, rest: Path | None = None, *args: Any, **options: Any) -> Conversion:
    return plan_of(source, asked, None if rest is None else inspected(rest), *args, **options)


def convert(source: Path, out: Path, rest: Path | None, asked: str | None, **options: Any) -> Path:
    write(plan(source, asked, rest, **options), out, lambda path, there: None)
    return out


def same(found: State, expected: State) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name


def frames(folder: Path) -> str | None:
    request = VideoRequest(prompt="a red cat", seed=3, steps=1, height=32, width=32, frames=5)
    return Engine(load(folder, "cpu")).generate([request])[0].frames_sha256


# Files that hold a transformer, written from a folder: the file, and the weights that Diffusers' names should have --


def _comfyui_repackaged(folder: Path, file: Path) -> State:
    own = {name: tensor.half() for name, tensor in foreign.weights(folder).items()}
    save_file({f"{PREFIX}{name}": tensor for name, tensor in foreign.tencent(own).items()}, file)
    return own


def _comfyui_saved(folder: Path, file: Path) -> State:
    own = foreign.weights(folder)
    named = foreign.comfyui(foreign.tencent(own))
    named = {name.replace("_norm.weight", "_norm.scale") if ".norm." in name else name: t for name, t in named.items()}
    save_file({f"{PREFIX}{name}": tensor for name, tensor in named.items()}, file)
    return own


def _with_its_vae(folder: Path, file: Path) -> State:
    own = foreign.weights(folder)
    both = {f"{PREFIX}{name}": tensor for name, tensor in foreign.tencent(own).items()}
    vae = foreign.weights(folder, "vae")
    vae = foreign.vae15(vae) if model_of(folder) == "1.5" else vae
    save_file(both | {f"vae.{name}": tensor for name, tensor in vae.items()}, file)
    return own


def _split(folder: Path, file: Path) -> State:
    own = foreign.weights(folder)
    save_file(foreign.tencent(own, fused=model_of(folder) == "1.0"), file)
    return own


def _diffusers(folder: Path, file: Path) -> State:
    own = foreign.weights(folder)
    save_file({f"{PREFIX}{name}": tensor for name, tensor in own.items()}, file)
    return own


def _cast_to_fp8(folder: Path, file: Path) -> State:
    own = foreign.weights(folder)
    named = foreign.tencent(own)
    cast = {n: t.to(torch.float8_e5m2) if foreign.linear(n, t) else t for n, t in named.items()}
    save_file(cast, file)
    blocks = ("transformer_blocks", "single_transformer_blocks")
    return {
        name: tensor.to(torch.float8_e5m2).bfloat16() if name.startswith(blocks) and tensor.ndim == 2 else tensor
        for name, tensor in own.items()
    }


def _scaled(scale: str, *, parts: int = 0, more: Callable[[State], State] = lambda scales: {}) -> Any:
    def write_file(folder: Path, file: Path) -> State:
        own = foreign.weights(folder)
        stored, scales, _ = foreign.fp8(foreign.tencent(own), lambda layer: f"{PREFIX}{layer}.{scale}", parts)
        named = {f"{PREFIX}{name}": tensor for name, tensor in stored.items()}
        save_file({**named, **scales, **more(scales)}, file)
        return _scaled_back(own, parts)

    return write_file


def _scaled_back(own: State, parts: int = 0) -> State:
    """As `foreign.fp8` of the fused layers, cut into Diffusers' layers: by finding each one's rows among them."""
    *_, expected = foreign.fp8(foreign.tencent(own), lambda layer: layer, parts)
    numbers, begin = {}, 0
    for name, tensor in own.items():
        numbers[name] = torch.arange(begin, begin + tensor.numel()).reshape(tensor.shape)
        begin += tensor.numel()
    places = torch.cat([tensor.flatten() for tensor in foreign.tencent(numbers).values()])
    order = torch.argsort(places)
    dtypes = torch.cat([torch.full((t.numel(),), t.dtype == torch.bfloat16) for t in expected.values()])[order]
    values = torch.cat([tensor.float().flatten() for tensor in expected.values()])[order]
    return {
        name: values[number].to(torch.bfloat16 if dtypes[number].all() else torch.float32)
        for name, number in numbers.items()
    }


def _note(scales: State) -> State:
    note = torch.tensor(list(json.dumps({"format": "float8_e4m3fn"}).encode()), dtype=torch.uint8)
    return {name.replace("weight_scale", "comfy_quant"): note.clone() for name in scales}


def _marks(scales: State) -> State:
    inputs = {name.replace("scale_weight", "scale_input"): torch.ones(()) for name in scales}
    return {f"{PREFIX}scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn), **inputs}


FILES: dict[str, Callable[[Path, Path], State]] = {
    "ComfyUI's, fp16": _comfyui_repackaged,
    "saved by ComfyUI": _comfyui_saved,
    "with its VAE": _with_its_vae,
    "Tencent's names": _split,
    "Diffusers' names": _diffusers,
    "cast to fp8": _cast_to_fp8,
    "ComfyUI's fp8 with scales": _scaled("scale_weight", more=_marks),
    "ComfyUI's later fp8 with scales": _scaled("weight_scale", more=_note),
    "musubi-tuner's fp8, a scale for a part of a row": _scaled("scale_weight", parts=2),
}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("base", ["1.0", "1.5"], indirect=True)
def test_a_file_gives_the_weights_it_was_written_from(tmp_path: Path, base: Path, file: str) -> None:
    expected = FILES[file](base, tmp_path / "a.safetensors")
    asked = "t2v" if model_of(base) == "1.0" else "480p_t2v"
    found = plan(tmp_path / "a.safetensors", asked, base).weights
    same({name: found["transformer"].read(name) for name in found["transformer"].sizes}, expected)
    if file == "with its VAE":
        same({name: found["vae"].read(name) for name in found["vae"].sizes}, foreign.weights(base, "vae"))


def test_tencents_layout_of_1_gives_the_same_videos(tmp_path: Path, tiny_folder: Path) -> None:
    expected = foreign.tencent10_folder(tiny_folder, tmp_path / "ckpts")
    rest = foreign.without(tiny_folder, tmp_path / "rest")
    out = convert(tmp_path / "ckpts", tmp_path / "out", rest, None)  # the folder says that it is t2v
    same(foreign.weights(out), expected)
    same(foreign.weights(out, "vae"), foreign.weights(tiny_folder, "vae"))
    assert frames(out) == frames(tiny_folder)
    states = tmp_path / "ckpts" / "hunyuan-video-t2v-720p" / "transformers" / "mp_rank_00_model_states.pt"
    same(foreign.weights(convert(states, tmp_path / "again", rest, None)), expected)


@pytest.mark.parametrize(("kind", "asked"), [("token_replace", "i2v"), ("latent_concat", None), ("skyreels", None)])
def test_image_to_video_models_of_the_first_network(tmp_path: Path, kind: Any, asked: str | None) -> None:
    """Those of which the channels say enough need no name."""
    folder = tiny_i2v.make_folder(tmp_path / "m", kind)
    _diffusers(folder, tmp_path / "a.safetensors")
    out = convert(tmp_path / "a.safetensors", tmp_path / "out", folder, asked)
    same(foreign.weights(out), foreign.weights(folder))
    if kind == "token_replace":
        request = tiny_i2v.mixed(kind)[0]
        videos = [Engine(load(place, "cpu")).generate([request])[0].frames_sha256 for place in (out, folder)]
        assert videos[0] == videos[1]


def test_skyreels_text_to_video_has_its_own_defaults(tmp_path: Path, tiny_folder: Path) -> None:
    _diffusers(tiny_folder, tmp_path / "a.safetensors")
    with pytest.raises(ModelFolderError, match=r"holds no text_encoder, tokenizer, image_processor"):
        check_out(plan(tmp_path / "a.safetensors", "i2v", tiny_folder), tmp_path / "out")  # whose encoder is LLaVA
    out = convert(tmp_path / "a.safetensors", tmp_path / "out", tiny_folder, "skyreels-t2v")
    assert foreign.json_of(out / "reelbatch.json")["guidance"] == "classifier-free"
    assert inspect(out).limits.defaults.frames == 97


def test_tencents_fp8_is_made_whole_with_its_map(tmp_path: Path, tiny_folder: Path) -> None:
    own = foreign.tencent10_folder(tiny_folder, tmp_path / "ckpts", in_fp8=True)
    out = convert(tmp_path / "ckpts", tmp_path / "out", tiny_folder, None)
    same(foreign.weights(out), _scaled_back(own))
    states = tmp_path / "ckpts" / "hunyuan-video-t2v-720p" / "transformers" / "mp_rank_00_model_states_fp8.pt"
    scales = states.with_stem(states.stem + "_map")
    torch.save({"double_blocks.0.img_attn_qkv": torch.ones(1)}, scales)
    with pytest.raises(ModelFolderError, match=r"fp8_map\.pt: has no scale for .*, which is stored in 8 bits"):
        plan(states, "t2v", tiny_folder)
    scales.unlink()
    with pytest.raises(ModelFolderError, match=r"fp8_map\.pt: missing: the scales of the 8-bit weights"):
        plan(states, "t2v", tiny_folder)


def test_tencents_layout_of_15_gives_the_same_videos(tmp_path: Path, folder15: Path) -> None:
    foreign.tencent15_folder(folder15, tmp_path / "ckpts", "480p_t2v")
    out = convert(tmp_path / "ckpts", tmp_path / "out", folder15, None)
    for component in ("transformer", "vae"):
        same(foreign.weights(out, component), foreign.weights(folder15, component))
    shutil.copyfile(folder15 / "guider" / "guider_config.json", out / "guider" / "guider_config.json")
    assert frames(out) == frames(folder15)
    shutil.copytree(tmp_path / "ckpts" / "transformer" / "480p_t2v", tmp_path / "ckpts" / "transformer" / "720p_t2v")
    with pytest.raises(ModelFolderError, match="holds several models; say which with --as NAME, one of 480p_t2v, 720p"):
        plan(tmp_path / "ckpts", None, folder15)
    chosen = plan(tmp_path / "ckpts", "720p_t2v", folder15)
    assert (chosen.kind.shift, chosen.kind.transformer["target_size"]) == (9.0, 960)
    assert plan(tmp_path / "ckpts" / "transformer" / "480p_t2v", None, folder15).kind.name == "480p_t2v"


def test_the_encoders_of_tencents_layout_of_1_are_taken_from_it(tmp_path: Path, tiny_folder: Path) -> None:
    foreign.tencent10_folder(tiny_folder, tmp_path / "ckpts")
    foreign.towers10(tiny_folder, tmp_path / "ckpts")
    conversion = plan(tmp_path / "ckpts", None, tiny_folder)
    assert set(conversion.taken) == {"scheduler"} and conversion.missing == {}
    write(conversion, tmp_path / "out", lambda path, there: None)
    for component in ("text_encoder", "text_encoder_2"):
        found, expected = (foreign.weights(folder, component) for folder in (tmp_path / "out", tiny_folder))
        same(
            {name.removeprefix("text_model."): tensor for name, tensor in found.items()},
            {name.removeprefix("text_model."): tensor for name, tensor in expected.items()},
        )
    assert frames(tmp_path / "out") == frames(tiny_folder)
    assert foreign.json_of(tmp_path / "out" / "tokenizer" / "tokenizer_config.json")["padding_side"] == "right"


def test_a_whole_layout_of_15_needs_nothing_else(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tiny15.make_folder(tmp_path_factory.mktemp("image15"))  # image to video
    foreign.tencent15_folder(folder, tmp_path / "ckpts", "480p_i2v")
    byt5 = foreign.towers15(folder, tmp_path / "ckpts", tokens=5)
    lacking = plan(tmp_path / "ckpts")
    assert set(lacking.missing) == {"image_encoder", "feature_extractor"}
    foreign.towers15_image(folder, tmp_path / "ckpts")
    conversion = plan(tmp_path / "ckpts")
    assert conversion.taken == {} and conversion.missing == {}
    out = tmp_path / "out"
    write(conversion, out, lambda path, there: None)
    for component in ("text_encoder", "image_encoder"):
        same(foreign.weights(out, component), foreign.weights(folder, component))
    glyph = foreign.weights(out, "text_encoder_2")
    assert torch.equal(glyph.pop("shared.weight"), byt5.pop("encoder.embed_tokens.weight"))
    same(glyph, byt5)
    shutil.copyfile(folder / "guider" / "guider_config.json", out / "guider" / "guider_config.json")
    shutil.copyfile(folder / "reelbatch.json", out / "reelbatch.json")
    request = VideoRequest(
        prompt='a "red" cat', image=tiny15.picture(48, 32), seed=3, steps=1, height=32, width=48, frames=5
    )
    videos = [Engine(load(place, "cpu")).generate([request])[0].frames_sha256 for place in (out, folder)]
    assert videos[0] == videos[1]
    colours = tmp_path / "ckpts" / "text_encoder" / "Glyph-SDXL-v2" / "assets" / "color_idx.json"
    foreign.write_json(colours, {})
    with pytest.raises(ModelFolderError, match="get assets and checkpoints together"):
        plan(tmp_path / "ckpts")


@pytest.mark.parametrize("base", ["1.0", "1.5"], indirect=True)
@pytest.mark.parametrize("kind", ["F32", "BF16", "Q8_0", "Q5_1"])
def test_gguf_files_are_made_whole(tmp_path: Path, base: Path, kind: str) -> None:
    gguf = pytest.importorskip("gguf")
    own = foreign.tencent(foreign.weights(base))
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "hyvid")
    whole = {}
    for name, tensor in own.items():
        small = foreign.linear(name, tensor) and tensor.shape[1] % 32 == 0
        wanted = gguf.GGMLQuantizationType[kind if small else "F32"]
        data = gguf.quants.quantize(tensor.numpy(), wanted)
        if name == "img_in.proj.weight":  # as ComfyUI-GGUF stores what has too many dimensions
            writer.add_array(f"comfy.gguf.orig_shape.{name}", list(tensor.shape))
            data = data.reshape(tensor.shape[0], -1)
        writer.add_tensor(name, data, raw_dtype=wanted)
        few = small and kind.startswith("Q")
        whole[name] = torch.from_numpy(gguf.quants.dequantize(data, wanted)) if few else tensor
        whole[name] = whole[name].reshape(tensor.shape).to(torch.bfloat16 if small and kind != "F32" else torch.float32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    asked = "t2v" if model_of(base) == "1.0" else "480p_t2v"
    out = convert(tmp_path / "a.gguf", tmp_path / "out", base, asked)
    found = foreign.tencent(foreign.weights(out))
    assert {name: tensor.dtype for name, tensor in found.items()} == {name: t.dtype for name, t in whole.items()}
    same(found, whole)
    (tmp_path / "a.gguf").write_bytes((tmp_path / "a.gguf").read_bytes()[:5000])
    with pytest.raises(ModelFolderError, match=r"a\.gguf: is no whole GGUF file"):
        plan(tmp_path / "a.gguf", asked, base)


def test_gguf_without_its_package_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "gguf", None)
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + bytes(20))
    with pytest.raises(ModelFolderError, match=r"not installed: pip install 'reelbatch\[gguf\]'"):
        plan(tmp_path / "a.gguf")


# Shards, going on, what is asked ------------------------------------------------------------------------------------


def test_a_conversion_that_was_stopped_goes_on(tmp_path: Path, tiny_folder: Path) -> None:
    expected = _comfyui_repackaged(tiny_folder, tmp_path / "a.safetensors")
    conversion = plan(tmp_path / "a.safetensors", "t2v", tiny_folder)
    out = tmp_path / "out"
    files: list[tuple[str, bool]] = []

    def stop(path: Path, there: bool) -> None:
        files.append((path.name, there))
        if len(files) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(conversion, out, stop, shard_bytes=50_000)
    assert not (out / "model_index.json").exists()
    shards = sorted((out / "transformer").glob("*.safetensors"))
    assert [path.name for path in shards] == [name for name, _ in files]
    damaged = bytearray(shards[1].read_bytes())
    damaged[-1] ^= 1  # one bit of one weight
    shards[1].write_bytes(damaged)
    shards[2].write_bytes(shards[2].read_bytes()[:1000])
    (out / "transformer" / ".abc.part").write_bytes(b"x")
    written: list[tuple[str, bool]] = []
    write(conversion, out, lambda path, there: written.append((path.name, there)), shard_bytes=50_000)
    assert [there for _, there in written] == [True] + [False] * (len(written) - 1)
    assert len(written) > 4
    same(foreign.weights(out), expected)
    assert inspect(out).problems == ()
    assert not list((out / "transformer").glob(".*"))
    with pytest.raises(ModelFolderError, match="a model folder is there already"):
        write(conversion, out, lambda path, there: None)


def test_the_command_says_what_it_did(tmp_path: Path, tiny_folder: Path) -> None:
    _comfyui_repackaged(tiny_folder, tmp_path / "a.safetensors")
    command = ["convert", str(tmp_path / "a.safetensors"), str(tmp_path / "out"), "--as", "t2v"]
    done = CliRunner().invoke(app, [*command, "--rest", str(tiny_folder), "--dtype", "bfloat16", "--json"])
    assert done.exit_code == 0, done.output
    record = json.loads(done.stdout.splitlines()[-1])
    assert record["kind"] == "t2v" and record["layout"] == "one file (safetensors)"
    assert [Path(file["file"]).parent.name for file in record["files"]] == ["transformer"]
    assert {tensor.dtype for tensor in foreign.weights(tmp_path / "out").values()} == {torch.bfloat16}
    again = CliRunner().invoke(app, [*command, "--rest", str(tiny_folder)])
    assert "a model folder is there already" in str(again.exception)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").touch()
    other = CliRunner().invoke(app, [*command[:2], str(tmp_path / "notes"), *command[3:], "--rest", str(tiny_folder)])
    assert "holds mine.txt; name an empty folder" in str(other.exception)


def test_what_is_missing_is_named_with_where_it_comes_from(tmp_path: Path, folder15: Path) -> None:
    foreign.tencent15_folder(folder15, tmp_path / "ckpts", "480p_t2v")
    command = ["convert", str(tmp_path / "ckpts"), str(tmp_path / "out")]
    refused = CliRunner().invoke(app, command)
    assert isinstance(refused.exception, ModelFolderError)
    message = str(refused.exception)
    for said in (
        "text_encoder: from Qwen/Qwen2.5-VL-7B-Instruct",
        "tokenizer_2: from google/byt5-small with the weights of AI-ModelScope/Glyph-SDXL-v2",
        "Give --rest a model folder or hub id",
    ):
        assert said in message
    assert "vae:" not in message and "image_encoder" not in message
    assert not (tmp_path / "out").exists()


def test_ambiguous_and_unknown_files_are_told_by_name(tmp_path: Path, tiny_folder: Path, folder15: Path) -> None:
    file = tmp_path / "a.safetensors"
    own = foreign.tencent(_diffusers(tiny_folder, file))

    def refused(said: str, state: State, asked: str | None = None, rest: Path = tiny_folder) -> None:
        save_file(state, file)
        with pytest.raises(ModelFolderError, match=said):
            plan(file, asked, rest)

    refused(r"do not tell which model it is\. Say so with --as NAME, one of: t2v \(.*; i2v \(.*; skyreels-t2v", own)
    refused("--as video: no such model; there are t2v, i2v", own, "video")
    refused("cannot be 480p_t2v as --as 480p_t2v says; it can be t2v", own, "480p_t2v")
    wide = own | {"img_in.proj.weight": torch.zeros(32, 7, 1, 2, 2)}
    refused("with 7 channels in and 4 out: no published model", wide)
    refused("is of FramePack, which reelbatch does not run", own | {"clean_x_embedder.proj.weight": torch.ones(1)})
    refused(
        "has 1 tensors that are of no layer of the transformer, such as double_blocks.0.extra",
        own | {"double_blocks.0.extra": torch.ones(1)},
        "t2v",
    )
    lacking = {name: tensor for name, tensor in own.items() if name != "double_blocks.1.img_attn_qkv.weight"}
    refused("lacks 3 weights of the transformer, such as transformer_blocks.1.attn.to_k.weight", lacking, "t2v")
    refused("twice, as", own | {"double_blocks.0.img_attn.qkv.weight": torch.zeros(96, 32)}, "t2v")
    refused(
        r"has double_blocks.0.img_mlp.fc2.weight of \[1, 2\], where",
        own | {"double_blocks.0.img_mlp.fc2.weight": torch.zeros(1, 2)},
        "t2v",
    )
    refused("holds neither the transformer nor the VAE of a HunyuanVideo; its tensors are x", {"x": torch.ones(1)})
    refused(
        "is no whole transformer of HunyuanVideo 1.0: x_embedder",
        {"txt_in.individual_token_refiner.blocks.0.norm1.weight": torch.ones(1)},
    )
    fifteen = foreign.tencent(foreign.weights(folder15))
    refused("one of: 480p_t2v .*480p_i2v .*720p_t2v_distilled", fifteen, None, folder15)
    upscaler = fifteen | {"img_in.proj.weight": torch.zeros(32, 14, 1, 1, 1)}
    refused("is HunyuanVideo 1.5 with 14 channels in and 4 out: the upscaler", upscaler, None, folder15)
    save_file(foreign.vae15(foreign.weights(folder15, "vae")), tmp_path / "vae.safetensors")
    save_file(own, file)
    with pytest.raises(ModelFolderError, match="these are parts of two models"):
        plan(file, "t2v", tiny_folder, tmp_path / "vae.safetensors")
    with pytest.raises(ModelFolderError, match="holds the VAE alone"):
        plan(tmp_path / "vae.safetensors", None, folder15)
    with pytest.raises(ModelFolderError, match="is in Diffusers' layout already"):
        plan(tiny_folder)
    with pytest.raises(ModelFolderError, match=r"holds 2 files of weights \(a.safetensors, vae.safetensors\)"):
        plan(tmp_path)


def test_a_vae_is_taken_from_a_file_of_its_own(tmp_path: Path, folder15: Path) -> None:
    _split(folder15, tmp_path / "a.safetensors")
    changed = {name: tensor + 1 for name, tensor in foreign.weights(folder15, "vae").items()}
    save_file(foreign.vae15(changed), tmp_path / "vae.safetensors")
    out = convert(tmp_path / "a.safetensors", tmp_path / "out", folder15, "480p_t2v", vae=tmp_path / "vae.safetensors")
    same(foreign.weights(out, "vae"), changed)


# Files from outside -------------------------------------------------------------------------------------------------


class _Planted:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def test_no_file_is_run_and_damaged_ones_are_refused(tmp_path: Path, tiny_folder: Path) -> None:
    file, mark = tmp_path / "a.pt", tmp_path / "executed"

    def refused(said: str) -> None:
        with pytest.raises(ModelFolderError, match=said) as caught:
            plan(file, "t2v", tiny_folder)
        assert str(file) in str(caught.value)
        assert not mark.exists()

    own = foreign.tencent(foreign.weights(tiny_folder))
    torch.save({"module": own | {"x": _Planted(mark)}}, file)
    refused("is no file of weights alone, and is not run")
    torch.save(_Planted(mark), file, _use_new_zipfile_serialization=False)
    refused("in the format of PyTorch before 1.6")
    torch.save({"module": {"x": 3}}, file)
    refused("holds 'x', which is no weight but int")
    torch.save([1], file)
    refused("holds no dictionary of weights, but list")
    torch.save(own | {"x": torch.ones(1).expand(2**20, 2**20)}, file)
    refused("a tensor of .* that is not all there")
    whole = tmp_path / "whole.pt"
    torch.save(own, whole)
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as new:
        for part in old.infolist():
            new.writestr(part.filename, bytes(2**20))
    refused("its parts are compressed, or too many")
    file.write_bytes(whole.read_bytes()[:-2000])
    refused("is no whole PyTorch file")
    file.write_bytes(b"")
    refused("is no whole safetensors, PyTorch or GGUF file")
    file.write_bytes((10**12).to_bytes(8, "little") + b"{}")
    refused("is cut short")


def test_scales_that_do_not_fit_are_refused(tmp_path: Path, tiny_folder: Path) -> None:
    stored, scales, _ = foreign.fp8(
        foreign.tencent(foreign.weights(tiny_folder)), lambda layer: f"{layer}.scale_weight"
    )
    file, layer = tmp_path / "a.safetensors", "double_blocks.0.img_attn_qkv"

    def refused(said: str, changes: State, metadata: dict[str, str] | None = None) -> None:
        save_file({**stored, **scales, **changes}, file, metadata)
        with pytest.raises(ModelFolderError, match=said):
            convert(file, tmp_path / "out", tiny_folder, "t2v")

    refused(
        r"the scale of double_blocks.0.img_attn_qkv.weight is F32 \[5\], which",
        {f"{layer}.scale_weight": torch.ones(5)},
    )
    refused("the scale of .* is not finite", {f"{layer}.scale_weight": torch.tensor(torch.inf)})
    note = torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8)
    refused("as 'nvfp4'; of ComfyUI's formats of few bits only float8_e4m3fn", {f"{layer}.comfy_quant": note})
    refused("comfy_quant cannot be read", {f"{layer}.comfy_quant": note[:5].clone()})
    refused("it is a note of a format", {f"{layer}.comfy_quant": torch.zeros(100_000, dtype=torch.uint8)})
    said = json.dumps({"layers": {layer: {"format": "mxfp8"}}})
    refused("as 'mxfp8'", {}, {"_quantization_metadata": said})
    refused("its _quantization_metadata cannot be read", {}, {"_quantization_metadata": "[" * 100_000})
    refused("in I8, which is not read", {f"{layer}.weight": torch.zeros(96, 32, dtype=torch.int8)})


def test_an_index_names_no_file_elsewhere(tmp_path: Path, tiny_folder: Path) -> None:
    save_file(foreign.tencent(foreign.weights(tiny_folder)), tmp_path / "secret.safetensors")
    folder = tmp_path / "m"
    foreign.write_json(folder / "a.safetensors.index.json", {"weight_map": {"x": "../secret.safetensors"}})
    with pytest.raises(
        ModelFolderError, match=r"lists '../secret.safetensors', which is no safetensors file beside it"
    ):
        plan(folder, "t2v", tiny_folder)


# Any size of network ------------------------------------------------------------------------------------------------


@given(
    layers=st.integers(1, 3),
    heads=st.integers(1, 3),
    patch=st.sampled_from([(1, 1), (1, 2), (2, 2)]),
    ratio=st.sampled_from([1.0, 2.5, 4.0]),
    fifteen=st.booleans(),
    option=st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_the_shapes_of_weights_say_their_configuration(
    layers: int, heads: int, patch: tuple[int, int], ratio: float, fifteen: bool, option: bool
) -> None:
    shared = {
        "num_layers": layers,
        "num_attention_heads": heads,
        "num_refiner_layers": 1 + layers % 2,
        "mlp_ratio": ratio,
        "patch_size_t": patch[0],
        "patch_size": patch[1],
    }
    with torch.device("meta"):
        if fifteen:
            network: Any = tiny15.HunyuanVideo15Transformer3DModel(
                **{**tiny15.TRANSFORMER, **shared, "use_meanflow": option}
            )
        else:
            more = {"num_single_layers": layers - 1, "guidance_embeds": option}
            network = tiny.HunyuanVideoTransformer3DModel(**{**tiny.transformer_config(), **shared, **more})
        state = foreign.tencent(network.state_dict())
    tensors = {name: StoredTensor("F32", tuple(tensor.shape), 4 * tensor.numel()) for name, tensor in state.items()}
    (part,) = recognise(WeightFile(Path("a"), "safetensors", tensors, state.__getitem__))
    found = config_of(part)
    assert found == {name: network.config[name] for name in found}


@pytest.mark.parametrize("pipeline", ["HunyuanVideoPipeline", "HunyuanVideo15Pipeline"])
def test_the_published_networks_are_recognised_whole(pipeline: str) -> None:
    """By names and shapes alone; and the names are those that Diffusers' own converter reads."""
    network: Any = build(LAYOUTS[pipeline].networks["transformer"], {})
    own = network.state_dict()
    state = foreign.tencent(own, fused=pipeline == "HunyuanVideoPipeline")
    tensors = {name: StoredTensor("BF16", tuple(tensor.shape), 2 * tensor.numel()) for name, tensor in state.items()}
    (part,) = recognise(WeightFile(Path("a"), "safetensors", tensors, state.__getitem__))
    found = config_of(part)
    assert found == {name: network.config[name] for name in found}
    read = reader(part, network)
    assert all(read(name).shape == tensor.shape for name, tensor in own.items())
    names = [kind.name for kind in possible(part.names, found, "a")]
    if pipeline == "HunyuanVideoPipeline":
        assert names == ["t2v", "i2v", "skyreels-t2v"]
        theirs = convert_hunyuan_video_transformer_to_diffusers(dict(state))
        assert {name: tensor.shape for name, tensor in theirs.items()} == {name: t.shape for name, t in own.items()}
    else:
        assert (len(own), len(state), len(names)) == (1801, 1793, 8)  # of the refiner, three are one
        assert names[0] == "480p_t2v"


def test_every_published_model_has_a_name_and_every_name_an_end() -> None:
    names = [kind.name for kind in KINDS]
    assert len(set(names)) == len(names)
    assert {"t2v", "i2v", "480p_t2v", "480p_i2v_step_distilled"} <= set(names)


def test_the_bundled_model_is_the_same_from_a_file_of_its_transformer(tmp_path: Path) -> None:
    """Also its schedule and its words, which the file does not say."""
    _comfyui_repackaged(DEMO_FOLDER, tmp_path / "a.safetensors")  # in fp16, as it is stored
    out = convert(tmp_path / "a.safetensors", tmp_path / "out", DEMO_FOLDER, "t2v")
    assert inspect(out).flow_shift == inspect(DEMO_FOLDER).flow_shift
    assert frames(out) == frames(DEMO_FOLDER)


def test_a_conversion_describes_itself(tmp_path: Path, tiny_folder: Path) -> None:
    _split(tiny_folder, tmp_path / "a.safetensors")
    record = describe(plan(tmp_path / "a.safetensors", "t2v", tiny_folder))
    assert record["model"] == "HunyuanVideo 1.0" and record["missing"] == {}
    towers = {"text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"}
    assert set(record["taken"]) == {"vae", "scheduler", *towers}


def test_model_info_explains_files_and_folders_of_other_layouts(
    tmp_path: Path, tiny_folder: Path, folder15: Path
) -> None:
    def said(path: Path, *options: str) -> dict[str, Any]:
        shown = CliRunner().invoke(app, ["model-info", str(path), *options])
        record = CliRunner().invoke(app, ["model-info", str(path), "--json", *options])
        assert shown.exit_code == record.exit_code == 1, (shown.output, shown.exception)
        content: dict[str, Any] = json.loads(record.stdout)
        assert content["about"] in shown.stdout and content["verdict"] in shown.stdout
        return content

    file = tmp_path / "a.safetensors"
    _scaled("scale_weight", more=_marks)(tiny_folder, file)
    found = said(file)
    assert (found["model"], found["kind"], found["possible"]) == (
        "HunyuanVideo 1.0",
        None,
        ["t2v", "i2v", "skyreels-t2v"],
    )
    assert found["config"]["num_single_layers"] == 2 and set(found["stored_bytes"]) == {"F8_E4M3", "F32"}
    assert (
        f"reelbatch convert {file} OUT --as NAME (one of t2v, i2v, skyreels-t2v) --rest hunyuanvideo-community"
        in found["verdict"]
    )
    assert set(found["missing"]) == {"vae", "text_encoder", "text_encoder_2"}
    assert "--rest hunyuanvideo-community/HunyuanVideo-I2V" in said(file, "--as", "i2v")["verdict"]

    foreign.tencent10_folder(tiny_folder, tmp_path / "ten")
    found = said(tmp_path / "ten")
    assert (found["kind"], found["layout"]) == ("t2v", "Tencent's layout of HunyuanVideo")
    assert found["holds"] == ["transformer", "vae"]

    foreign.tencent15_folder(folder15, tmp_path / "fifteen", "480p_t2v")
    found = said(tmp_path / "fifteen")
    assert (found["kind"], found["model"]) == ("480p_t2v", "HunyuanVideo 1.5")
    assert "image_encoder" not in found["missing"]
    found = said(tmp_path / "fifteen" / "vae" / "diffusion_pytorch_model.safetensors")
    assert (found["about"], found["kind"]) == ("the VAE of HunyuanVideo 1.5", None)

    lora = {f"lora_unet_single_blocks_0_linear1.lora_{way}.weight": torch.ones(1, 1) for way in ("up", "down")}
    save_file(lora, tmp_path / "lora.safetensors")
    assert said(tmp_path / "lora.safetensors")["about"] == "a LoRA of HunyuanVideo 1.0, for 1 layers"

    save_file({"x": torch.ones(1)}, file)
    unknown = CliRunner().invoke(app, ["model-info", str(file)])
    assert "holds neither the transformer nor the VAE" in str(unknown.exception)
    for path in (file, tmp_path / "ten"):  # what else takes a model says what to do
        refused = CliRunner().invoke(app, ["generate", "a cat", "--model", str(path)])
        assert "reelbatch convert" in str(refused.exception)
