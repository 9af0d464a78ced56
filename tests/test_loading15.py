"""Folders of HunyuanVideo 1.5: opened as Diffusers saves them, and refused where they are something else."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import tiny15
import torch
from diffusers import HunyuanVideo15ImageToVideoPipeline
from safetensors.torch import save_file
from tiny15 import mixed, picture
from typer.testing import CliRunner

from reelbatch import VideoRequest
from reelbatch.cli import app
from reelbatch.engine.engine import Engine
from reelbatch.loading.hashing import weights_hash
from reelbatch.loading.hub import ModelFolderError
from reelbatch.loading.hunyuan_video15 import variant
from reelbatch.loading.inspection import inspect
from reelbatch.loading.load import load
from reelbatch.loading.precision import Precision
from reelbatch.loading.skeleton import from_folder
from reelbatch.memory.estimate import Estimator
from reelbatch.models.hunyuan_video15.transformer import HunyuanVideo15Transformer3DModel
from reelbatch.models.hunyuan_video15.variants import VARIANTS
from reelbatch.request import RequestError, RequestWarning


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Image to video. Read only."""
    return tiny15.make_folder(tmp_path_factory.mktemp("tiny15"))


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text to video. Read only."""
    return tiny15.make_folder(tmp_path_factory.mktemp("tiny15_text"), "text")


def hashes(model: Any) -> list[str]:
    return [video.frames_sha256 for video in Engine(model).generate(mixed())]


def test_a_folder_gives_the_videos_of_the_networks_it_was_saved_from(folder: Path) -> None:
    info = inspect(folder)
    assert info.problems == ()
    assert {component.name for component in info.components} == set(info.layout.classes)
    expected = hashes(tiny15.model(tiny15.pipeline()))
    assert hashes(load(folder)) == expected
    assert hashes(load(folder, offload="block")) == expected


def test_a_text_folder_makes_the_same_videos_and_takes_no_image(folder: Path, text_folder: Path) -> None:
    request = VideoRequest(prompt='a red "go"', seed=1)
    text, image = Engine(load(text_folder)), Engine(load(folder))
    assert text.generate(request)[0].frames_sha256 == image.generate(request)[0].frames_sha256
    with pytest.raises(RequestError, match="from text alone"):
        text.generate(VideoRequest(prompt="a", image=picture(16, 16)))
    assert "text" not in load(text_folder).family.also.get("vae", ())


def test_the_transformer_saved_from_it_opens_in_diffusers_pipeline(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    model = load(folder)
    model.family.transformer.save_pretrained(copy / "transformer")
    pipe = HunyuanVideo15ImageToVideoPipeline.from_pretrained(copy)
    theirs = pipe.transformer.state_dict()
    for name, weight in model.family.transformer.state_dict().items():
        assert torch.equal(weight, theirs[name])
    assert weights_hash(copy) != weights_hash(tiny15.make_folder(tmp_path / "other", seed=1))


def test_a_lora_acts_and_keeps_videos_apart(folder: Path, tmp_path: Path) -> None:
    weights = {}
    for layer in ("transformer_blocks.0.attn.to_q", "image_embedder.linear_2"):
        out, into = (32, 32) if "to_q" in layer else (32, 20)
        weights[f"transformer.{layer}.lora_A.weight"] = torch.randn(2, into)
        weights[f"transformer.{layer}.lora_B.weight"] = torch.randn(out, 2)
    save_file(weights, tmp_path / "a.safetensors")
    model = load(folder, lora=[(tmp_path / "a.safetensors", 1.0)])
    together = hashes(model)
    assert together == [Engine(model).generate(request)[0].frames_sha256 for request in mixed()]
    assert all(one != other for one, other in zip(together, hashes(load(folder)), strict=True))


@pytest.mark.parametrize("known", VARIANTS, ids=lambda known: known.name)
def test_each_published_variant_is_known_by_its_settings(known: Any) -> None:
    configs = {
        "guider": {"_class_name": "ClassifierFreeGuidance", "guidance_scale": known.guidance},
        "scheduler": {"shift": known.shift},
        "transformer": {"target_size": known.target_size, "use_meanflow": known.meanflow, "task_type": "i2v"},
    }
    assert variant(configs) == known


def test_defaults_are_the_variants_where_the_folder_says_nothing(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "reelbatch.json").unlink()
    change(copy / "transformer/config.json", target_size=960)
    change(copy / "guider/guider_config.json", guidance_scale=6.0)
    change(copy / "scheduler/scheduler_config.json", shift=7.0)
    info = inspect(copy)
    assert vars(info.limits.defaults) == {
        "height": 720,
        "width": 1280,
        "frames": 121,
        "steps": 50,
        "guidance": 6.0,
        "fps": 24,
    }
    assert info.flow_shift == 7.0
    portrait = VideoRequest(prompt="a", image=picture(720, 1280)).for_model(info.limits)
    assert portrait.size == (1264, 720, 121)  # the reference's own bucket
    assert inspect(folder).limits.defaults.guidance == tiny15.GUIDANCE


def test_who_asks_a_distilled_model_for_what_it_does_not_need_is_warned(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    change(copy / "guider/guider_config.json", guidance_scale=1.0)
    limits = inspect(copy).limits
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not VideoRequest(prompt="a", steps=50).for_model(limits).uses_cfg
    with pytest.warns(RequestWarning, match=r"no classifier-free guidance, and 6 is asked for"):
        VideoRequest(prompt="a", guidance=6).for_model(limits)
    change(copy / "transformer/config.json", use_meanflow=True)
    change(copy / "scheduler/scheduler_config.json", shift=7.0)
    with pytest.warns(RequestWarning, match=r"480p_i2v_step_distilled|custom.*8 or 12 steps, and 50 are asked for"):
        VideoRequest(prompt="a", steps=50).for_model(inspect(copy).limits)


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        (
            "guider/guider_config.json",
            {"_class_name": "AdaptiveProjectedGuidance"},
            "is of class AdaptiveProjectedGuidance",
        ),
        ("guider/guider_config.json", {"stop": 0.5}, "sets stop 0.5; only"),
        ("transformer/config.json", {"in_channels": 8}, "has in_channels 8.*it must be 9"),
        ("transformer/config.json", {"image_embed_dim": 8}, "image_encoder has hidden_size 20"),
        ("transformer/config.json", {"text_embed_2_dim": 8}, "text_encoder_2 has d_model 24"),
        ("scheduler/scheduler_config.json", {"use_dynamic_shifting": True}, "sets use_dynamic_shifting"),
        ("vae/config.json", {"_class_name": "AutoencoderKL"}, "is of class AutoencoderKL; expected"),
        ("text_encoder/config.json", {"attn_implementation": "a/kernel"}, "may not choose an attention"),
        ("tokenizer_2/tokenizer_config.json", {"auto_map": ["a.B", None]}, "may not choose code to run"),
        ("text_encoder/config.json", {"rope_scaling": None, "rope_parameters": None}, "an mrope_section of 3 whole"),
        ("text_encoder", {"num_hidden_layers": 3, "layer_types": None}, r"has \d+ weights that the network of its"),
        ("text_encoder_2", {"num_layers": 3}, r"lacks \d+ weights that the network needs"),
        ("image_encoder", {"intermediate_size": 16}, r"has \d+ weights of other shapes"),
        ("image_encoder/config.json", {"image_size": 10**9}, "image_size: .* less than or equal to 4096"),
        ("feature_extractor/preprocessor_config.json", {"size": {"height": 8, "width": 24}}, "takes 24 x 24"),
        ("feature_extractor/preprocessor_config.json", {"auto_map": {"a": "b.C"}}, "may not choose code to run"),
        ("guider/guider_config.json", {"guidance_scale": "much"}, "guidance_scale: Input should be a valid number"),
    ],
)
def test_what_would_be_another_model_is_refused(
    folder: Path, tmp_path: Path, file: str, values: dict[str, Any], message: str
) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    change(copy / file if file.endswith(".json") else copy / file / "config.json", **values)
    with pytest.raises(ModelFolderError, match=rf"{file}.*{message}"):
        load(copy)


def test_missing_towers_are_named(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    shutil.rmtree(copy / "image_encoder")
    with pytest.raises(ModelFolderError, match="image_encoder: missing"):
        load(copy)


def test_memory_is_estimated_from_the_configurations_alone(folder: Path) -> None:
    device = torch.device("cpu")
    skeleton = from_folder(folder, Precision.parse("float32", device), device)
    estimator = Estimator(skeleton, "exact", device)
    text = VideoRequest(prompt="a", height=32, width=32, frames=9).for_model(skeleton.limits)
    image = VideoRequest(prompt="a", image=picture(32, 32), height=32, width=32, frames=9).for_model(skeleton.limits)
    assert estimator.step_tensors([image]) > estimator.step_tensors([text]) > 0
    assert estimator.decode(image) > 0
    plan = estimator.plan([text, image], "block")
    assert plan.weights["text"] > plan.weights["decode"] > 0


def test_the_class_name_leads_back_to_our_class() -> None:
    from reelbatch.models import hunyuan_video15

    assert hunyuan_video15.HunyuanVideo15Transformer3DModel is HunyuanVideo15Transformer3DModel
    with pytest.raises(AttributeError):
        hunyuan_video15.Nothing  # noqa: B018


def test_the_command_line_takes_images(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture(64, 40))
    (tmp_path / "suite.csv").write_text("prompt,image\na red cat,a.png\na dog,\n")
    words = ["generate", "--prompts", tmp_path / "suite.csv", "--model", folder, "--out", tmp_path / "out", "--json"]
    result = CliRunner().invoke(app, [*map(str, words), "--steps", "1"])
    assert result.exit_code == 0, result.output
    cat, dog = sorted((json.loads(line)["request"] for line in result.stdout.splitlines()), key=lambda r: r["prompt"])[
        ::-1
    ]
    assert (dog["height"], dog["width"]) == (32, 48)
    assert cat["image"]["path"] == str(tmp_path / "a.png")
    assert (cat["height"], cat["width"]) == (48, 64)
    again = CliRunner().invoke(app, [*map(str, words), "--steps", "1"])
    assert json.loads(again.stdout.splitlines()[0])["state"] != "failed"

    result = CliRunner().invoke(app, ["plan", "--model", str(folder), "--json"])
    assert result.exit_code == 0, result.output
    result = CliRunner().invoke(app, ["model-info", str(folder), "--json"])
    assert {part["class"] for part in json.loads(result.stdout)["components"]} > {"HunyuanVideo15Transformer3DModel"}
