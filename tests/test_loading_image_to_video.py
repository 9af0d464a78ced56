"""Folders of HunyuanVideo-I2V and SkyReels V1: opened as Diffusers saves them, and refused where they are another's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_i2v
import torch
from diffusers import HunyuanVideoTransformer3DModel as Theirs
from safetensors.torch import load_file, save_file
from tiny15 import picture
from tiny_i2v import KINDS, Kind, mixed
from typer.testing import CliRunner

from reelbatch import VideoRequest
from reelbatch.cli import app
from reelbatch.engine.calibrate import small_videos
from reelbatch.engine.engine import Engine
from reelbatch.loading import hub
from reelbatch.loading.families import LAYOUTS
from reelbatch.loading.hub import ModelFolderError, resolve, resolve_here
from reelbatch.loading.hunyuan_video_image import HUNYUAN, size_of
from reelbatch.loading.inspection import inspect
from reelbatch.loading.load import load
from reelbatch.loading.precision import Precision
from reelbatch.loading.skeleton import from_folder
from reelbatch.loading.stored import StoredTensor, differences
from reelbatch.memory.estimate import Estimator
from reelbatch.memory.streaming import groups_of, network_bytes, streamed_bytes
from reelbatch.models.hunyuan_video.llava import LlavaModel
from reelbatch.models.hunyuan_video.transformer import HunyuanVideoTransformer3DModel
from reelbatch.request import RequestDefaults, RequestError
from reelbatch.tune.workload import of_shape


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[Kind, Path]:
    """Read only."""
    return {kind: tiny_i2v.make_folder(tmp_path_factory.mktemp("tiny"), kind) for kind in KINDS}


def hashes(model: Any, kind: Kind) -> list[str]:
    return [video.frames_sha256 for video in Engine(model).generate(mixed(kind))]


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize("kind", ["token_replace", "skyreels"])
def test_weights_that_come_and_go_give_the_same_videos(folders: dict[Kind, Path], kind: Kind) -> None:
    info = inspect(folders[kind])
    assert info.problems == ()
    assert {component.name for component in info.components} == set(info.layout.classes)
    streamed = load(folders[kind], offload="block")
    assert hashes(streamed, kind) == hashes(load(folders[kind]), kind)
    text = streamed.family.parts["text_encoder"]
    assert max(map(group_parameters, groups_of(text))) < sum(weight.numel() for weight in text.parameters()) / 3
    assert streamed_bytes(text) < network_bytes(text)


def group_parameters(group: Any) -> int:
    return sum(weight.numel() for module in group.modules for weight in module.parameters())


def test_names_of_every_transformers_are_read(folders: dict[Kind, Path], tmp_path: Path) -> None:
    """LLaVA's weights had other names before, and its folder has a head for next words, which is left out."""
    copy = shutil.copytree(folders["token_replace"], tmp_path / "copy")
    weights = load_file(copy / "text_encoder/model.safetensors")
    assert "language_model.lm_head.weight" in weights
    earlier = {name.replace("vision_tower.", "vision_tower.vision_model."): weight for name, weight in weights.items()}
    later = {
        f"model.{name.replace('language_model.model.', 'language_model.')}": weight
        for name, weight in weights.items()
        if "lm_head" not in name
    }
    assert len(later.keys() & weights.keys()) == len(earlier.keys() & later.keys()) == 0
    expected = load(folders["token_replace"]).family.parts["text_encoder"].state_dict()
    for stored in (earlier, later):
        save_file(stored, copy / "text_encoder/model.safetensors", {"format": "pt"})
        found = load(copy).family.parts["text_encoder"].state_dict()
        assert all(torch.equal(found[name], weight) for name, weight in expected.items())


@pytest.mark.parametrize(
    ("changes", "parameters"),
    [
        ({"image_condition_type": "token_replace"}, 12.821e9),
        ({"image_condition_type": "latent_concat", "in_channels": 33, "guidance_embeds": False}, 12.811e9),
        ({"in_channels": 32}, 12.821e9),
    ],
    ids=["token_replace", "latent_concat", "skyreels"],
)
def test_every_weight_of_the_published_models_has_its_place(changes: dict[str, Any], parameters: float) -> None:
    with torch.device("meta"):
        ours, theirs = HunyuanVideoTransformer3DModel(**changes), Theirs(**changes)
    shapes = {name: weight.shape for name, weight in theirs.state_dict().items()}
    assert {name: weight.shape for name, weight in ours.state_dict().items()} == shapes
    assert sum(shape.numel() for shape in shapes.values()) == pytest.approx(parameters, rel=1e-3)


def test_the_published_llava_is_read_by_its_configuration() -> None:
    """Of a folder as transformers 4 saved it."""
    published = {
        "architectures": ["LlavaForConditionalGeneration"],
        "image_token_index": 128257,
        "model_type": "llava",
        "pad_token_id": 128258,
        "projector_hidden_act": "gelu",
        "text_config": {
            "_name_or_path": "meta-llama/Meta-Llama-3-8B-Instruct",
            "architectures": ["LlamaForCausalLM"],
            "bos_token_id": 128000,
            "eos_token_id": 128001,
            "intermediate_size": 14336,
            "max_position_embeddings": 8192,
            "model_type": "llama",
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-05,
            "rope_theta": 500000.0,
            "torch_dtype": "float16",
            "vocab_size": 128320,
        },
        "torch_dtype": "float16",
        "vision_config": {
            "hidden_size": 1024,
            "image_size": 336,
            "intermediate_size": 4096,
            "model_type": "clip_vision_model",
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
            "patch_size": 14,
            "projection_dim": 768,
            "vocab_size": 32000,
        },
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
    }
    from reelbatch.loading.configs import build, check_config

    config, faults = check_config(HUNYUAN.configs["text_encoder"], published)
    assert faults == []
    network = build(LlavaModel, config)
    assert sum(weight.numel() for weight in network.parameters()) == pytest.approx(7.83e9, rel=1e-2)
    assert network.config.text_config.rope_parameters["rope_theta"] == 500000.0

    def earlier(name: str) -> str:
        name = name.replace("language_model.", "language_model.model.")
        return name.replace("vision_tower.", "vision_tower.vision_model.")

    stored = {
        earlier(name): StoredTensor("F16", tuple(weight.shape), 0) for name, weight in network.state_dict().items()
    }
    stored["language_model.lm_head.weight"] = StoredTensor("F16", (128320, 4096), 0)
    assert differences(stored, network) == []


@pytest.mark.parametrize(
    ("image", "size"),
    [
        ((1080, 1920), (720, 1280)),
        ((1920, 1080), (1280, 720)),
        ((500, 500), (960, 960)),
        ((600, 800), (832, 1088)),
        ((100, 1000), (480, 1920)),
    ],
)
def test_a_video_has_the_shape_of_its_image(image: tuple[int, int], size: tuple[int, int]) -> None:
    assert size_of(*image, RequestDefaults(), 16) == size


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_is_asked_for_where_there_must_be_one(folders: dict[Kind, Path], kind: Kind) -> None:
    limits = inspect(folders[kind]).limits
    with_image, without = VideoRequest(prompt="a", image=picture(8, 8)), VideoRequest(prompt="a")
    takes, refused, message = with_image, without, r"image is missing: this model's videos begin with one"
    if kind == "skyreels text":
        takes, refused, message = without, with_image, r"from text alone, and takes none"
    assert takes.for_model(limits).frames == 5
    with pytest.raises(RequestError, match=message):
        refused.for_model(limits)


def test_skyreels_is_guided_by_a_negative_prompt(folders: dict[Kind, Path]) -> None:
    for kind in ("skyreels", "skyreels text"):
        request = mixed(kind)[0].for_model(inspect(folders[kind]).limits)  # type: ignore[arg-type]
        assert (request.true_cfg, request.negative_prompt, request.uses_cfg) == (6.0, "", True)
    assert not mixed("token_replace")[0].for_model(inspect(folders["token_replace"]).limits).uses_cfg


def test_defaults_are_the_references_where_the_folder_says_nothing(folders: dict[Kind, Path], tmp_path: Path) -> None:
    for kind, expected in (("token_replace", (720, 1280, 129)), ("skyreels", (544, 960, 97))):
        copy = shutil.copytree(folders[kind], tmp_path / kind)  # type: ignore[index]
        (copy / "reelbatch.json").unlink()
        defaults = inspect(copy).limits.defaults
        assert (defaults.height, defaults.width, defaults.frames, defaults.steps) == (*expected, 50)


@pytest.mark.parametrize(
    ("kind", "file", "values", "message"),
    [
        ("token_replace", "transformer/config.json", {"image_condition_type": None}, "image_condition_type None; a"),
        ("token_replace", "transformer/config.json", {"in_channels": 9}, "in_channels 9; it must be 4"),
        ("latent_concat", "transformer/config.json", {"in_channels": 8}, "in_channels 8; it must be 9"),
        ("skyreels", "transformer/config.json", {"in_channels": 4}, "in_channels 4; it must be 8"),
        ("skyreels", "transformer/config.json", {"image_condition_type": "token_replace"}, "this pipeline has none"),
        ("token_replace", "transformer/config.json", {"text_embed_dim": 8}, "text_encoder has hidden_size 32"),
        ("token_replace", "text_encoder/config.json", {"text_config": None}, "text_config: Input should be"),
        (
            "token_replace",
            "text_encoder/config.json",
            {"vision_config": {"_attn_implementation": "a/b"}},
            "may not choose an attention implementation",
        ),
        (
            "token_replace",
            "image_processor/preprocessor_config.json",
            {"crop_size": {"height": 16, "width": 16}},
            "makes images of 16 x 16 pixels, and text_encoder takes 32 x 32",
        ),
        ("token_replace", "text_encoder/config.json", {"image_token_index": 3}, ""),
    ],
)
def test_what_would_be_another_model_is_refused(
    folders: dict[Kind, Path], tmp_path: Path, kind: Kind, file: str, values: dict[str, Any], message: str
) -> None:
    copy = shutil.copytree(folders[kind], tmp_path / "copy")
    change(copy / file, **values)
    with pytest.raises(ModelFolderError, match=rf"{file}.*{message}" if message else "hold the image token .* 0 times"):
        load(copy)


def test_weights_in_memory_are_estimated_from_the_configurations_alone(folders: dict[Kind, Path]) -> None:
    device = torch.device("cpu")
    skeleton = from_folder(folders["token_replace"], Precision.parse("float32", device), device)
    weights = Estimator(skeleton, "exact", device).weights("block")
    assert weights["text"] > weights["decode"] > 0  # the VAE encodes the image


def test_requests_that_stand_for_others_have_an_image(folders: dict[Kind, Path]) -> None:
    info = inspect(folders["token_replace"])
    (asked, *_) = of_shape(info, {"frames": 1}, 1).requests
    assert asked.image is not None and asked.size == (64, 96, 1)
    assert {request.for_model(info.limits).size for request in small_videos(info.limits)} == {
        (128, 128, 9),
        (192, 192, 17),
        (256, 256, 17),
    }


# -- a transformer alone ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["skyreels", "skyreels text"])
def test_a_transformer_alone_gets_the_rest_from_its_base(
    folders: dict[Kind, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Kind
) -> None:
    base = tiny.make_folder(tmp_path / "base")
    alone = shutil.copytree(folders[kind] / "transformer", tmp_path / "SkyReels-V1")
    (alone / "reelbatch.json").write_text(json.dumps({"defaults": tiny_i2v.DEFAULTS}))
    whole = resolve(f"{alone}+{base}")
    info = inspect(whole)
    assert (info.problems, info.name, info.limits.guidance) == ((), "SkyReels-V1", "classifier-free")
    assert hashes(load(whole), kind) == hashes(load(folders[kind]), kind)
    assert resolve_here(f"{alone}+{base}") == whole

    asked = []
    monkeypatch.setattr(hub, "_download", lambda repository, download: asked.append(repository) or base)
    assert resolve(alone) == whole
    assert asked == ["hunyuanvideo-community/HunyuanVideo"]


def test_another_transformer_keeps_its_embedded_guidance(folders: dict[Kind, Path], tmp_path: Path) -> None:
    alone = shutil.copytree(folders["skyreels text"] / "transformer", tmp_path / "mine")
    limits = inspect(resolve(f"{alone}+{tiny.make_folder(tmp_path / 'base')}")).limits
    assert (limits.guidance, limits.defaults.height) == ("embedded", 720)


def test_a_rest_that_is_not_here_is_named(folders: dict[Kind, Path], tmp_path: Path) -> None:
    alone = shutil.copytree(folders["token_replace"] / "transformer", tmp_path / "mine")
    with pytest.raises(ModelFolderError, match=r"is a transformer alone.*HunyuanVideo-I2V after a plus sign"):
        resolve_here(alone)
    with pytest.raises(ModelFolderError, match="no folder of a HunyuanVideo transformer alone"):
        resolve(f"{folders['skyreels']}+{alone}")


# -- commands --------------------------------------------------------------------------------------


def run(*words: Any) -> str:
    result = CliRunner().invoke(app, [*map(str, words)])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_command_line_takes_images(folders: dict[Kind, Path], tmp_path: Path) -> None:
    kind: Kind = "token_replace"
    for name, size in (("a.png", (64, 48)), ("b.png", (32, 64))):
        (tmp_path / name).write_bytes(picture(*size))
    (tmp_path / "suite.csv").write_text("prompt,image,frames\na red cat,a.png,5\na dog,b.png,1\n")
    job = ["--prompts", tmp_path / "suite.csv", "--model", folders[kind], "--out", tmp_path / "out", "--steps", 1]
    lines = [json.loads(line) for line in run("generate", *job, "--json").splitlines()]
    assert {line["request"]["image"]["path"] for line in lines} == {str(tmp_path / "a.png"), str(tmp_path / "b.png")}
    assert {(line["request"]["width"], line["request"]["height"]) for line in lines} == {(96, 64), (64, 96)}
    run("plan", "--model", folders[kind], "--json")
    listed = json.loads(run("model-info", folders[kind], "--json"))["components"]
    assert {part["name"] for part in listed} == set(inspect(folders[kind]).layout.classes)


def test_a_missing_image_is_refused_before_anything_is_written(folders: dict[Kind, Path], tmp_path: Path) -> None:
    words = ["generate", "a cat", "--model", folders["token_replace"], "--out", tmp_path / "out"]
    result = CliRunner().invoke(app, [*map(str, words)])
    assert "prompt 1: image is missing" in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_the_classes_of_pipelines_are_known() -> None:
    assert {"HunyuanVideoImageToVideoPipeline", "HunyuanSkyreelsImageToVideoPipeline"} <= LAYOUTS.keys()
