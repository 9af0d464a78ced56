"""loading/: what is in a model folder, what is wrong with it, and loading it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import diffusers
import huggingface_hub
import pytest
import tiny
import torch
import transformers
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

from reelbatch.device import choose_device
from reelbatch.loading import hub, inspection
from reelbatch.loading.hub import ModelFolderError, resolve
from reelbatch.loading.inspection import inspect
from reelbatch.loading.load import load
from reelbatch.loading.precision import choose_dtype


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


def edit(path: Path, **changes: object) -> None:
    content = json.loads(path.read_text())
    content.update(changes)
    path.write_text(json.dumps(content))


def shard(folder: Path) -> Path:
    """Split the transformer's weights into two files and an index; returns the second file."""
    directory, name = folder / "transformer", "diffusion_pytorch_model"
    whole = directory / f"{name}.safetensors"
    tensors = load_file(whole)
    whole.unlink()
    names, files = sorted(tensors), [f"{name}-0000{part}-of-00002.safetensors" for part in (1, 2)]
    parts = {files[0]: names[::2], files[1]: names[1::2]}
    for file, part in parts.items():
        save_file({tensor: tensors[tensor] for tensor in part}, directory / file)
    weight_map = {tensor: file for file, part in parts.items() for tensor in part}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (directory / f"{name}.safetensors.index.json").write_text(json.dumps(index))
    return directory / files[1]


def test_inspect_counts_what_is_stored(tiny_folder, tiny_pipeline):
    info = inspect(tiny_folder)
    assert info.problems == ()
    assert {part.name: part.class_name for part in info.components} == {
        "transformer": "HunyuanVideoTransformer3DModel",
        "vae": "AutoencoderKLHunyuanVideo",
        "text_encoder": "LlamaModel",
        "text_encoder_2": "CLIPTextModel",
        "tokenizer": "TokenizersBackend",
        "tokenizer_2": "CLIPTokenizer",
        "scheduler": "FlowMatchEulerDiscreteScheduler",
    }
    networks = {name: getattr(tiny_pipeline, name) for name in ("transformer", "vae", "text_encoder", "text_encoder_2")}
    counts = {name: sum(p.numel() for p in network.parameters()) for name, network in networks.items()}
    assert {part.name: part.parameters for part in info.components if part.parameters} == counts
    assert {part.name: part.stored_bytes for part in info.components if part.parameters} == {
        name: (("F32", 4 * count),) for name, count in counts.items()
    }
    assert info.weight_bytes("float32") == 2 * info.weight_bytes("bf16") == 4 * sum(counts.values())
    assert info.flow_shift == 7.0
    assert (info.limits.spatial_stride, info.limits.temporal_stride) == (16, 4)
    assert info.limits.defaults.frames == 9


def test_patch_1_halves_the_stride(tiny_folder_patch1):
    assert inspect(tiny_folder_patch1).limits.spatial_stride == 8


def test_verdict_compares_with_the_device(tiny_folder, monkeypatch):
    info = inspect(tiny_folder)
    assert info.verdict("cpu").startswith("can run: ")
    monkeypatch.setattr(inspection, "device_memory_bytes", lambda device: info.weight_bytes("bfloat16") + 1)
    assert info.fits("cpu", "bfloat16")
    assert not info.fits("cpu", "float32")
    assert info.verdict("cpu").startswith("cannot run: the weights take")
    with pytest.raises(ModelFolderError, match="the weights take"):
        load(tiny_folder, "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_load(tiny_folder, tiny_pipeline, dtype):
    components = load(tiny_folder, "cpu", dtype)
    text, vae = components.family.text, components.family.decoder.vae
    for network, reference in (
        (components.family.transformer, tiny_pipeline.transformer),
        (vae, tiny_pipeline.vae),
        (text.llama, tiny_pipeline.text_encoder),
        (text.clip, tiny_pipeline.text_encoder_2),
    ):
        assert not network.training
        expected = reference.state_dict()
        loaded = network.state_dict()
        assert loaded.keys() == expected.keys()
        assert all(torch.equal(value, expected[name].to(value.dtype)) for name, value in loaded.items())
        assert {parameter.dtype for parameter in network.parameters()} == {dtype}
        assert not any(parameter.requires_grad for parameter in network.parameters())
    assert text.crop_start == 95
    assert (components.family.flow_shift, components.vocabulary) == (7.0, None)


def test_auto_is_float32_on_the_cpu_and_bfloat16_on_cuda():
    assert choose_dtype("auto", torch.device("cpu")) == torch.float32
    assert choose_dtype("auto", torch.device("cuda")) == torch.bfloat16
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for dtype in ("int4", torch.int64, "none"):
        with pytest.raises(ValueError, match="give auto, float32, bfloat16 or float16"):
            choose_dtype(dtype, torch.device("cpu"))
    with pytest.raises(ValueError, match="device 'tpu9' is unknown"):
        choose_device("tpu9")
    with pytest.raises(ValueError, match="device 'cuda:99' is not there"):
        choose_device("cuda:99")


def test_sharded_weights_load_too(folder, tiny_folder):
    shard(folder)
    assert inspect(folder).problems == ()
    assert inspect(folder).parameters == inspect(tiny_folder).parameters
    expected = load(tiny_folder, "cpu").family.transformer.state_dict()
    assert all(
        torch.equal(value, expected[name])
        for name, value in load(folder, "cpu").family.transformer.state_dict().items()
    )


def truncate(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
BREAKAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "shard absent": (
        lambda f: shard(f).unlink(),
        r"00002-of-00002\.safetensors: missing: one of 2 files listed in .*index\.json; download it again",
    ),
    "shard of another file": (
        lambda f: save_file({"other": torch.zeros(1)}, shard(f)),
        r"00002-of-00002\.safetensors: lacks \d+ tensors listed in .*, such as ",
    ),
    "partial download": (
        lambda f: (f / "vae" / "weights.safetensors.incomplete").touch(),
        r"weights\.safetensors\.incomplete: is a download that did not finish",
    ),
    "cut short": (lambda f: truncate(f / WEIGHTS, 100_000), r"is cut short: 100000 of \d+ bytes; download it again"),
    "cut in the header": (lambda f: truncate(f / WEIGHTS, 100), r"is cut short: 100 bytes, less than its header says"),
    "empty": (lambda f: truncate(f / WEIGHTS, 0), "is cut short: 0 bytes"),
    "git lfs pointer": (
        lambda f: (f / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "is a Git LFS pointer",
    ),
    "damaged header": (
        lambda f: (f / WEIGHTS).write_bytes((4).to_bytes(8, "little") + b"{{{{"),
        "has a damaged header",
    ),
    "weights absent": (lambda f: (f / WEIGHTS).unlink(), r"diffusion_pytorch_model\.safetensors: missing"),
    "only pickled weights": (
        lambda f: (f / "text_encoder/model.safetensors").rename(f / "text_encoder/pytorch_model.bin"),
        r"model\.safetensors: missing \(there is pytorch_model\.bin, but only safetensors are read\)",
    ),
    "no directory": (lambda f: shutil.rmtree(f / "text_encoder_2"), "text_encoder_2: missing: the text_encoder_2 that"),
    "no component": (
        lambda f: edit(f / "model_index.json", tokenizer_2=[None, None]),
        r"model_index\.json: lists no tokenizer_2",
    ),
    "foreign class": (
        lambda f: edit(f / "model_index.json", text_encoder=["transformers", "T5EncoderModel"]),
        "has text_encoder of class T5EncoderModel; expected LlamaModel",
    ),
    "no config": (lambda f: (f / "vae/config.json").unlink(), r"vae/config\.json: missing; run the download again"),
    "bad config": (lambda f: (f / "vae/config.json").write_text("{"), r"vae/config\.json: cannot be read"),
    "other transformer": (
        lambda f: edit(f / "transformer/config.json", _class_name="HunyuanVideo15Transformer3DModel"),
        "is of class HunyuanVideo15Transformer3DModel; expected HunyuanVideoTransformer3DModel",
    ),
    "image to video": (
        lambda f: edit(f / "transformer/config.json", image_condition_type="latent_concat"),
        "is an image-to-video model",
    ),
    "temporal patch": (lambda f: edit(f / "transformer/config.json", patch_size_t=2), "has patch_size_t 2"),
    "parts of two models": (
        lambda f: edit(f / "transformer/config.json", text_embed_dim=64),
        r"has text_embed_dim 64, but text_encoder has hidden_size 32",
    ),
    "dynamic shifting": (
        lambda f: edit(f / "scheduler/scheduler_config.json", use_dynamic_shifting=True),
        r"scheduler_config\.json: sets use_dynamic_shifting",
    ),
    "no tokenizer": (
        lambda f: (f / "tokenizer/tokenizer.json").unlink(),
        r"tokenizer: has neither tokenizer\.json nor",
    ),
    "profile: unknown field": (lambda f: edit(f / "reelbatch.json", words=[]), r"reelbatch\.json: words: Extra inputs"),
    "profile: unknown default": (
        lambda f: edit(f / "reelbatch.json", defaults={"lenght": 9}),
        "defaults: no such default: lenght; there are height, width, frames",
    ),
    "profile: default off the stride": (
        lambda f: edit(f / "reelbatch.json", defaults={"height": 40, "width": 32, "frames": 9}),
        r"has defaults that the model cannot make: height=40 .* 16.*nearest: 32 or 48",
    ),
    "profile: bad template": (
        lambda f: edit(f / "reelbatch.json", prompt_template={"template": "no place"}),
        r"prompt_template.*must hold exactly one \{\}",
    ),
}


@pytest.mark.parametrize(("damage", "message"), BREAKAGES.values(), ids=BREAKAGES.keys())
def test_broken_folder_is_named_with_its_remedy(folder, damage, message):
    damage(folder)
    info = inspect(folder)
    assert len(info.problems) == 1, info.problems
    assert info.verdict().startswith("cannot run: 1 problem")
    assert info.problems[0].startswith(str(folder))
    with pytest.raises(ModelFolderError, match=message):
        load(folder, "cpu")


def test_all_problems_are_told_at_once(folder):
    shutil.rmtree(folder / "vae")
    (folder / "transformer/config.json").unlink()
    assert len(inspect(folder).problems) == 2


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, r"model: no such folder"),
        (lambda f: (f / "model_index.json").unlink(), r"model_index\.json: missing\. Give a model folder"),
        (
            lambda f: ((f / "model_index.json").unlink(), (f / "x.incomplete").touch()),
            r"model_index\.json: missing\. The download did not finish",
        ),
        (
            lambda f: ((f / "model_index.json").unlink(), (f / "mp_rank_00_model_states.pt").touch()),
            "Tencent's own layout; make a model folder of it",
        ),
        (lambda f: (f / "model_index.json").write_text("[]"), r"model_index\.json: is no JSON object"),
        (
            lambda f: edit(f / "model_index.json", _class_name="WanPipeline"),
            r"model_index\.json: is a folder for WanPipeline, but reelbatch runs HunyuanVideoPipeline",
        ),
    ],
)
def test_what_is_no_model_folder_at_all(folder, damage, message):
    damage(folder)
    with pytest.raises(ModelFolderError, match=message):
        inspect(folder)


def test_weights_that_the_network_needs_but_the_file_lacks(folder):
    path = folder / WEIGHTS
    tensors = load_file(path)
    del tensors["x_embedder.proj.weight"]
    save_file(tensors, path)
    with pytest.raises(ModelFolderError, match=r"transformer: lacks 1 weights .* x_embedder\.proj\.weight"):
        load(folder, "cpu")


def test_template_that_does_not_fit_the_tokenizer(folder):
    edit(folder / "reelbatch.json", prompt_template={"template": "{}", "crop_start": 95})
    with pytest.raises(ModelFolderError, match=r"reelbatch\.json: its prompt_template .* does not fit"):
        load(folder, "cpu")


def test_profile(folder):
    edit(
        folder / "reelbatch.json",
        defaults={"height": 48, "width": 64, "frames": 5},
        prompt_template={"template": "<|start_header_id|>{}<|eot_id|>", "crop_start": 2},
        vocabulary=["a", "red", "cat"],
    )
    components = load(folder, "cpu")
    assert components.vocabulary == {"a", "red", "cat"}
    defaults = components.limits.defaults
    assert (defaults.height, defaults.width, defaults.frames, defaults.steps) == (48, 64, 5, 50)
    assert len(components.family.text.encode("a red cat").text) == 4


def test_folder_without_profile_has_hunyuanvideos_defaults(folder):
    (folder / "reelbatch.json").unlink()
    defaults = inspect(folder).limits.defaults
    assert (defaults.height, defaults.width, defaults.frames) == (720, 1280, 129)
    assert (defaults.steps, defaults.guidance, defaults.fps) == (50, 6.0, 24)


def test_llama_3_tokenizer_under_its_old_name(folder, tiny_pipeline):
    """Folders name LlamaTokenizerFast; transformers 5 would spell Llama 3's words letter by letter under that name."""
    edit(folder / "model_index.json", tokenizer=["transformers", "LlamaTokenizerFast"])
    edit(folder / "tokenizer/tokenizer_config.json", tokenizer_class="LlamaTokenizerFast")
    text = load(folder, "cpu").family.text
    ids = tiny_pipeline.tokenizer("a red cat").input_ids
    assert text.tokenizer("a red cat").input_ids == ids
    assert len(ids) == 4


def test_clip_tokenizer_from_vocabulary_files(folder, tiny_pipeline):
    (folder / "tokenizer_2/tokenizer.json").unlink()
    text = load(folder, "cpu").family.text
    assert text.tokenizer_2("a red cat, zig").input_ids == tiny_pipeline.tokenizer_2("a red cat, zig").input_ids


def test_resolve_local(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    assert resolve(str(folder)) == folder
    assert resolve("model").samefile(folder)
    with pytest.raises(ModelFolderError, match="is a file; give the model folder"):
        resolve("model/model_index.json")
    for path in ("nowhere", "./nowhere/else", "/no/where"):
        with pytest.raises(ModelFolderError, match=r"no such folder; .* a hub id such as"):
            resolve(path)


def test_resolve_hub(folder, monkeypatch):
    asked = []

    def snapshot(repository: str, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        asked.append(repository)
        assert {"model_index.json", "transformer/*", "tokenizer_2/*"} <= set(allow_patterns)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert resolve("someone/HunyuanVideo") == folder
    assert asked == ["someone/HunyuanVideo"]

    def offline(*args: object, **options: object) -> str:
        raise LocalEntryNotFoundError("Cannot find an appropriate cached snapshot folder\nmore")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(ModelFolderError) as caught:
        resolve("someone/HunyuanVideo")
    message = str(caught.value)
    assert "someone/HunyuanVideo: there is no such folder here" in message
    assert "hf download someone/HunyuanVideo --local-dir FOLDER" in message
    assert "\n" not in message


def test_resolve_demo_without_its_files(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "DEMO_FOLDER", tmp_path)
    with pytest.raises(ModelFolderError, match="the bundled model is not part of this installation"):
        resolve("demo")
    tiny.make_folder(tmp_path)
    assert resolve("demo") == tmp_path
    assert inspect(tmp_path).name == "demo"


def test_names(tmp_path):
    cached = tmp_path / "models--someone--HunyuanVideo" / "snapshots" / "0123abc"
    assert inspect(tiny.make_folder(cached)).name == "someone/HunyuanVideo"
    assert inspect(tiny.make_folder(tmp_path / "mine")).name == "mine"


def test_loading_shows_no_bars_and_leaves_those_of_others_as_they_were(
    tiny_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    libraries = (diffusers.utils.logging, transformers.utils.logging)
    for logging in libraries:
        logging.enable_progress_bar()
    load(tiny_folder, "cpu", torch.float32)
    assert all(logging.is_progress_bar_enabled() for logging in libraries)
    captured = capfd.readouterr()
    assert "%|" not in captured.out + captured.err
    libraries[0].disable_progress_bar()
    load(tiny_folder, "cpu", torch.float32)
    assert [logging.is_progress_bar_enabled() for logging in libraries] == [False, True]
    libraries[0].enable_progress_bar()
