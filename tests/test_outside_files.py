"""Files from outside are data: none is run, and a broken one is refused by name, in bounded time and memory."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import clips
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from reelbatch.jobs.prompts import PromptError, read_prompts
from reelbatch.jobs.states import States
from reelbatch.loading.hashing import weights_hash
from reelbatch.loading.hub import ModelFolderError
from reelbatch.loading.inspection import inspect
from reelbatch.loading.load import load
from reelbatch.loading.lora import LoraError, load_loras, parse_lora
from reelbatch.memory import calibration
from reelbatch.models.hunyuan_video.transformer import HunyuanVideoTransformer3DModel
from reelbatch.train import state
from reelbatch.train.cache import read_entry
from reelbatch.train.checkpoints import CheckpointError
from reelbatch.train.config import ConfigError, make_config, read_config
from reelbatch.train.devices import forget_precision, make_accelerator
from reelbatch.train.loop import Run
from reelbatch.tune import profiles

FUZZ = Path(__file__).parents[1] / "benchmarks"


class Planted:
    """A pickle that makes a folder where it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def pickles(tmp_path: Path) -> Iterator[list[bytes]]:
    """Two pickles that would run, bare and as PyTorch stores them; at the end of the test neither has."""
    mark = tmp_path / "executed"
    bare = pickle.dumps(Planted(mark))
    torch.save(Planted(mark), tmp_path / "planted.pt")
    yield [bare, (tmp_path / "planted.pt").read_bytes()]
    assert not mark.exists()
    pickle.loads(bare)  # it would have run
    assert mark.exists()


# Training -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """A run with an average, after a step and a checkpoint."""
    folder = tmp_path_factory.mktemp("run")
    values = {"model": str(tiny_folder), "data": clips.write_folder(folder / "clips"), "out": folder / "out"}
    values |= {"cache": folder / "cache", "device": "cpu", "steps": 1, "batch_size": 1, "rank": 1, "ema_decay": 0.9}
    config = make_config(values)
    found = Run(config, make_accelerator(config), print)
    found.go(lambda: False)
    yield found
    forget_precision()


def as_before(run: Run, folder: Path) -> Path:
    """The checkpoint that version 0.1.0 would have left, by accelerate's own functions."""
    (new,) = run.checkpoints.all()
    folder.mkdir()
    for name in ("reelbatch.json", "trained.safetensors"):
        shutil.copy(new / name, folder)
    run.accelerator._custom_objects = [run.weights.average]
    run.accelerator.register_save_state_pre_hook(lambda models, weights, _: weights.clear())
    run.accelerator.save_state(str(folder))
    return folder


def test_no_file_of_a_checkpoint_is_run(run: Run, tmp_path: Path, pickles: list[bytes]) -> None:
    (new,) = run.checkpoints.all()
    old = as_before(run, tmp_path / "old")
    for checkpoint, files in ((new, 10), (old, 6)):
        run._resume(checkpoint)
        names = sorted(path.name for path in checkpoint.iterdir())
        assert len(names) == files, names
        for name in names:
            for planted in pickles:
                folder = Path(shutil.copytree(checkpoint, tmp_path / "planted", dirs_exist_ok=True))
                (folder / name).write_bytes(planted)
                with pytest.raises(CheckpointError, match=f"{folder}.*resume"):
                    run._resume(folder)
        shutil.rmtree(tmp_path / "planted")
    # beside a whole checkpoint, what accelerate would read
    folder = Path(shutil.copytree(new, tmp_path / "beside"))
    for name in ("custom_checkpoint_0.pkl", "random_states_0.pkl", "scheduler.bin", "sampler.bin"):
        (folder / name).write_bytes(pickles[0])
    run._resume(folder)


def test_a_checkpoint_of_before_goes_on_with_its_average(run: Run, tmp_path: Path) -> None:
    average = run.weights.average
    assert average is not None
    kept = [tensor.clone() for tensor in average.shadow_params]
    old = as_before(run, tmp_path / "old")
    for tensor in average.shadow_params:
        tensor.zero_()
    run._resume(old)
    assert all(map(torch.equal, average.shadow_params, kept))


def test_shards_of_before_are_refused(run: Run, tmp_path: Path, pickles: list[bytes]) -> None:
    """What PyTorch's distributed checkpoints say of themselves is a pickle."""
    (new,) = run.checkpoints.all()
    folder = Path(shutil.copytree(new, tmp_path / "shards"))
    (folder / state.BEFORE_SHARDED).mkdir()
    (folder / state.BEFORE_SHARDED / ".metadata").write_bytes(pickles[0])
    with pytest.raises(CheckpointError, match="as pickles, which could run code; start anew"):
        run._resume(folder)


def test_no_entry_of_a_cache_and_no_settings_file_is_run(
    tmp_path: Path, pickles: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REELBATCH_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "cache" / "profiles" / "a.json"
    path.parent.mkdir(parents=True)
    identity = profiles.Identity(
        model="a", weights="", device="cpu: a", dtype="float32", attention="auto", versions={}, shapes="any shape"
    )
    calibrations = calibration._path(identity)
    calibrations.parent.mkdir()
    for planted in pickles:
        for file in (tmp_path / "entry.safetensors", path, calibrations, tmp_path / "state.safetensors"):
            file.write_bytes(planted)
        assert read_entry(tmp_path / "entry.safetensors") is None
        ((_, reason),) = profiles.stored()
        assert isinstance(reason, str)
        assert calibration.find(identity).calibration is None
        assert States(tmp_path).load("state") is None
        for suffix in (".yaml", ".txt", ".jsonl", ".json", ".csv", ".parquet"):
            (tmp_path / f"a{suffix}").write_bytes(planted)
            with pytest.raises((PromptError, ConfigError)):
                (read_config if suffix == ".yaml" else read_prompts)(tmp_path / f"a{suffix}")
    (tmp_path / "a.yaml").write_text(f"model: !!python/object/apply:os.mkdir ['{tmp_path}/executed']")
    with pytest.raises(ConfigError):
        read_config(tmp_path / "a.yaml")


# Models ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_no_file_of_a_model_folder_is_run(folder: Path, pickles: list[bytes]) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for number, path in enumerate(files):
        whole = path.read_bytes()
        path.write_bytes(pickles[number % 2])
        with contextlib.suppress(ModelFolderError):
            load(folder, "cpu")
        path.write_bytes(whole)
        if path.suffix == ".safetensors":
            for name in (f"{path.stem}.bin", "pytorch_model.bin", "model.pt", "adapter_model.bin"):
                (path.parent / name).write_bytes(pickles[number % 2])
    load(folder, "cpu")  # pickles beside the weights are not looked at


LLAMA, NETWORK, CLIP = "text_encoder/config.json", "transformer/config.json", "text_encoder_2/config.json"
CHOICES: dict[str, tuple[str, dict[str, Any], str]] = {
    "attention": (LLAMA, {"attn_implementation": "eager"}, "has attn_implementation 'eager': .* remove the entry"),
    "a hub kernel": (CLIP, {"_attn_implementation": "kernels-community/flash-attn"}, "may not choose an attention"),
    "nested": (LLAMA, {"text_config": {"attn_implementation": "eager"}}, "may not choose an attention"),
    "code": (NETWORK, {"auto_map": {"AutoModel": "a.B"}}, "may not choose code to run"),
    "quantization": (NETWORK, {"quantization_config": {"quant_method": "torchao"}}, "how weights are quantized"),
    "a tokenizer's code": ("tokenizer/tokenizer_config.json", {"auto_map": ["a.B", None]}, "code to run"),
    "a tokenizer elsewhere": ("tokenizer/tokenizer_config.json", {"tokenizer_file": "/a"}, "a file elsewhere"),
    "many layers": (NETWORK, {"num_layers": 10**9}, "num_layers: .* less than or equal to 256; got 1000000000"),
    "negative layers": (NETWORK, {"num_layers": -5}, "num_layers: .* greater than or equal to 1; got -5"),
    "fewer layers": (NETWORK, {"num_layers": 1}, r"has \d+ weights that the network of its config.json does not have"),
    "more layers": (NETWORK, {"num_single_layers": 3}, r"lacks \d+ weights that the network needs"),
    "fewer text layers": (LLAMA, {"num_hidden_layers": 3}, "text_encoder: has 9 weights that the network"),
    "another width": (CLIP, {"intermediate_size": 16}, r"has \d+ weights of other shapes .* \[32\] for \[16\]"),
    "text for a number": (LLAMA, {"hidden_size": "32"}, "hidden_size: Input should be a valid integer; got '32'"),
    "no such activation": (LLAMA, {"hidden_act": "os.system"}, "asks for a network that cannot be built"),
    "infinite shift": ("scheduler/scheduler_config.json", {"shift": 10**400}, "shift: "),
    "rope of other widths": (NETWORK, {"rope_axes_dim": [4, 6, 8]}, "add up to attention_head_dim 16"),
    "a long template": (
        "reelbatch.json",
        {"prompt_template": {"template": "word " * 300_000 + "{}"}},
        "are read at most",
    ),
    "a wide template": ("reelbatch.json", {"prompt_template": {"template": "{:>999999999}"}}, "must hold exactly one"),
    "attributes": ("reelbatch.json", {"prompt_template": {"template": "{.__class__}"}}, "must hold exactly one"),
    "many faults": ("reelbatch.json", {"about": 0} | {str(i): 0 for i in range(50)}, "and 31 more faults"),
    "escape sequences": ("reelbatch.json", {"\x1b[31m": 1}, r"\\x1b\[31m: Extra inputs"),
}


@pytest.mark.parametrize(("file", "changes", "message"), CHOICES.values(), ids=CHOICES.keys())
def test_what_a_configuration_may_not_say(folder: Path, file: str, changes: dict[str, Any], message: str) -> None:
    edit(folder / file, **changes)
    info = inspect(folder)
    assert len(info.problems) in (1, 21), info.problems
    assert len(info.problems[0]) < 1000
    with pytest.raises(ModelFolderError, match=message) as caught:
        load(folder, "cpu")
    assert str(caught.value).startswith(str(folder / file.partition("/")[0]))


@pytest.mark.parametrize("file", ["model_index.json", NETWORK, "reelbatch.json", "tokenizer/tokenizer_config.json"])
@pytest.mark.parametrize(
    "content", ["[" * 100_000, '{"a": ' * 500 + "1" + "}" * 500, "[1]", '{"a": 1' + "0" * 5000 + "}"]
)
def test_json_that_no_file_holds(folder: Path, file: str, content: str) -> None:
    (folder / file).write_text(content)
    with pytest.raises(ModelFolderError, match=r"cannot be read|is no JSON object"):
        load(folder, "cpu")


def test_a_tokenizer_that_loads_and_cannot_read(folder: Path) -> None:
    settings = folder / "tokenizer" / "tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "model_max_length": {}}))
    with pytest.raises(ModelFolderError, match="tokenizer: the tokenizer cannot be loaded: TypeError"):
        load(folder, "cpu")


def test_a_tokenizer_whose_template_adds_tokens_of_another_model(folder: Path) -> None:
    path = folder / "tokenizer" / "tokenizer.json"
    template = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "s", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"s": {"id": "s", "ids": [90_000], "tokens": ["s"]}},
    }
    path.write_text(json.dumps({**json.loads(path.read_text()), "post_processor": template}))
    with pytest.raises(ModelFolderError, match="tokenizer: has a token 90000, and the text encoder has"):
        load(folder, "cpu")


def test_a_folder_in_the_place_of_settings_that_need_not_be_there_is_passed_over(folder: Path) -> None:
    settings = folder / "tokenizer" / "tokenizer_config.json"
    settings.unlink()
    settings.mkdir()
    assert len(weights_hash(folder)) == 64


def test_weights_that_may_stand_beside_and_such_that_may_not(folder: Path) -> None:
    weights, path = load_file(folder / "text_encoder/model.safetensors"), folder / "text_encoder/model.safetensors"
    more = {"lm_head.weight": torch.zeros(2, 2), "layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
    save_file(weights | more, path)
    expected = load(folder, "cpu").family.text.llama.state_dict()
    assert all(torch.equal(expected[name], tensor) for name, tensor in weights.items())
    save_file({f"model.{name}": tensor for name, tensor in weights.items()}, path)  # as of a larger network
    found = load(folder, "cpu").family.text.llama.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in weights.items())
    for other, message in (
        ({"layers.9.mlp.up_proj.weight": torch.zeros(1)}, "has 1 weights that the network of its config.json does not"),
        ({"norm.weight": torch.zeros(32, dtype=torch.int8)}, "norm.weight in I8; get weights in one of F64, F32"),
    ):
        save_file(weights | other, path)
        (problem,) = inspect(folder).problems
        assert message in problem


@pytest.mark.parametrize("shard", ["../vae/diffusion_pytorch_model.safetensors", "/etc/passwd", 3, "a.bin"])
def test_an_index_names_files_beside_it_only(folder: Path, shard: object) -> None:
    path = folder / "transformer/diffusion_pytorch_model.safetensors"
    index = path.with_name(f"{path.name}.index.json")
    index.write_text(json.dumps({"weight_map": {"a": shard}}))
    (problem,) = inspect(folder).problems
    assert "only one of the two can be meant" in problem
    path.unlink()
    (problem,) = inspect(folder).problems
    assert "which is no safetensors file beside it" in problem


# LoRA files -----------------------------------------------------------------------------------------------------------

LAYER = "transformer.transformer_blocks.0.attn.to_q"


@pytest.fixture
def network() -> HunyuanVideoTransformer3DModel:
    return _network()


def _network() -> HunyuanVideoTransformer3DModel:
    return HunyuanVideoTransformer3DModel(**tiny.transformer_config())


def lora(**more: torch.Tensor) -> dict[str, torch.Tensor]:
    pair = {"lora_A.weight": torch.ones(2, 32), "lora_B.weight": torch.ones(32, 2), **more}
    return {f"{LAYER}.{name}": tensor for name, tensor in pair.items()}


def config(**changes: Any) -> dict[str, Any]:
    return {"transformer.r": 2, "transformer.lora_alpha": 2} | {f"transformer.{k}": v for k, v in changes.items()}


BROKEN: dict[str, tuple[dict[str, torch.Tensor], Any, str]] = {
    "NaN magnitude": (lora(lora_magnitude_vector=torch.full((32,), torch.nan)), None, "holds NaN or infinity"),
    "infinite bias": (lora(**{"lora_B.bias": torch.full((32,), torch.inf)}), None, "holds NaN or infinity"),
    "bias of another layer": (lora(**{"lora_B.bias": torch.ones(31)}), None, "the layer takes 32 and gives 32"),
    "no rank": (
        lora(**{"lora_A.weight": torch.ones(0, 32), "lora_B.weight": torch.ones(32, 0)}),
        None,
        "the layer takes",
    ),
    "one dimension": (lora(**{"lora_A.weight": torch.ones(64)}), None, "the layer takes 32"),
    "whole numbers": (
        lora(**{"lora_A.weight": torch.ones(2, 32, dtype=torch.int64)}),
        None,
        "in I64; weights are floating",
    ),
    "NaN alpha": (
        {
            "lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": torch.ones(2, 32),
            "lora_unet_double_blocks_0_img_attn_proj.lora_up.weight": torch.ones(32, 2),
            "lora_unet_double_blocks_0_img_attn_proj.alpha": torch.tensor(torch.nan),
        },
        None,
        "alpha must be one finite number",
    ),
    "a layer twice": (lora() | {f"diffusion_model.{n[12:]}": t for n, t in lora().items()}, None, "are there twice"),
    "rank of 10**9": (lora(), config(r=10**9), "r: .*less than or equal to 1048576; got 1000000000"),
    "another rank": (
        lora(),
        config(r=4),
        "says rank 4 for transformer_blocks.0.attn.to_q, whose weights are of rank 2",
    ),
    "rank pattern": (lora(), config(rank_pattern={"to_q": 10**9}), "rank_pattern.to_q: "),
    "runaway": (lora(), config(rank_pattern={"(.*.*)*(a+)+$x": 2}), "which is no layer's name; regular expressions"),
    "a number for text": (lora(), config(alpha_pattern=3), "alpha_pattern: Input should be a valid dict"),
    "NaN in metadata": (lora(), config(lora_alpha=float("nan")), "lora_alpha: Input should be a finite number"),
    "a list": (lora(), [1], "is no JSON object, but"),
    "deep": (lora(), "[" * 100_000, "is no JSON that can be read: it is nested too deeply"),
    "other weights": (lora(), config(init_lora_weights="pissa"), "changes the network's own weights"),
    "another adapter": (lora(), config(modules_to_save=["x"]), "sets modules_to_save"),
}


@pytest.mark.parametrize(("weights", "metadata", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_a_lora_that_is_refused(
    network: HunyuanVideoTransformer3DModel,
    tmp_path: Path,
    weights: dict[str, torch.Tensor],
    metadata: Any,
    message: str,
) -> None:
    text = metadata if isinstance(metadata, str) else json.dumps(metadata)
    save_file(weights, tmp_path / "a.safetensors", None if metadata is None else {"lora_adapter_metadata": text})
    with pytest.raises(LoraError, match=message) as caught:
        load_loras(network, [(tmp_path / "a.safetensors", 1.0)])
    assert str(tmp_path / "a.safetensors") in str(caught.value)
    assert not any("lora" in name for name, _ in network.named_modules())


def test_no_lora_file_is_run_and_none_names_a_module(tmp_path: Path, pickles: list[bytes]) -> None:
    for planted in pickles:
        (tmp_path / "a.safetensors").write_bytes(planted)
        with pytest.raises(LoraError, match="is no whole safetensors file"):
            load_loras(_network(), [(tmp_path / "a.safetensors", 1.0)])
    with pytest.raises(LoraError, match="is no file"):
        load_loras(_network(), [(tmp_path, 1.0)])
    # PEFT would import the module that is named here
    metadata = json.dumps(config(megatron_config={"a": 1}, megatron_core="antigravity"))
    save_file(lora(), tmp_path / "a.safetensors", {"lora_adapter_metadata": metadata})
    load_loras(_network(), [(tmp_path / "a.safetensors", 1.0)])
    assert "antigravity" not in sys.modules


def test_scales_of_patterns_are_those_that_peft_would_take(tmp_path: Path) -> None:
    layers = ["transformer_blocks.0.attn.to_q", "transformer_blocks.1.attn.to_q", "transformer_blocks.1.attn.to_k"]
    weights = {f"transformer.{layer}.lora_A.weight": torch.ones(2, 32) for layer in layers}
    weights |= {f"transformer.{layer}.lora_B.weight": torch.ones(32, 2) for layer in layers}
    patterns = {"^transformer_blocks.0.attn.to_q": 8, "to_k": 6, r"blocks\.9\.attn\.to_q": 1}
    metadata = json.dumps(config(alpha_pattern=patterns))
    save_file(weights, tmp_path / "a.safetensors", {"lora_adapter_metadata": metadata})
    model = _network()
    load_loras(model, [(tmp_path / "a.safetensors", 0.5)])
    scales = {name: module.scaling["lora_0"] for name, module in model.named_modules() if hasattr(module, "scaling")}
    assert scales == dict(zip(layers, [2.0, 0.5, 1.5], strict=True))


@pytest.mark.parametrize("scale", ["nan", "inf", "-inf", "1e999", "1e9"])
def test_a_scale_is_a_number_of_reason(scale: str, tmp_path: Path) -> None:
    with pytest.raises(LoraError, match=r"is no scale; give a number from -1000 to 1000"):
        parse_lora(f"a.safetensors:{scale}")
    save_file(lora(), tmp_path / "a.safetensors")
    with pytest.raises(LoraError, match="is no scale"):
        load_loras(_network(), [(tmp_path / "a.safetensors", float(scale))])


# All of them, broken at random ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "count"), [("model", 6), ("lora", 30), ("prompts", 100), ("request", 300)])
def test_what_is_broken_at_random_is_refused_or_right(
    kind: str, count: int, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fast form of `benchmarks/fuzz.py`, in this process."""
    monkeypatch.syspath_prepend(str(FUZZ))
    import fuzz
    import fuzz_cases

    makers: dict[str, Callable[[Path, bytes], Any]] = {
        "model": lambda work, planted: fuzz_cases.Models(tiny_folder, work, planted),
        "lora": lambda work, planted: fuzz_cases.Loras(_network(), work, planted),
        "prompts": fuzz_cases.Prompts,
        "request": lambda work, planted: fuzz_cases.one_request,
    }
    lines: list[str] = []
    counts = fuzz.fuzz(makers[kind], count, 7, kind, lines.append)
    assert not lines and counts["right"] + counts["refused"] == count and counts["refused"], (lines, counts)
