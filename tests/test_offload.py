"""Offload: weights wait elsewhere, memory falls, every frame is the same; texts are encoded in one visit."""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from reelbatch import VideoRequest
from reelbatch.device import OutOfMemory, device_memory_bytes
from reelbatch.engine.admission import TEXT_WINDOW
from reelbatch.engine.engine import Engine, Failure
from reelbatch.engine.runner import Runner
from reelbatch.engine.sample import Sample
from reelbatch.loading import inspection
from reelbatch.loading import load as loading_room
from reelbatch.loading.hub import ModelFolderError
from reelbatch.loading.inspection import inspect
from reelbatch.loading.load import load
from reelbatch.loading.lora import save_lora
from reelbatch.loading.model import Model
from reelbatch.memory import placement as placement_room
from reelbatch.memory.placement import Placement, check_offload, offloads
from reelbatch.memory.streaming import counting_fetches, stop_streaming, stream
from reelbatch.models.hunyuan_video.text import TextEncoder

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
MIB = 2**20


def requests(**fields: Any) -> list[VideoRequest]:
    each = ({"frames": 5}, {"width": 48}, {"true_cfg": 2.0, "negative_prompt": "blurry"}, {"steps": 3})
    return [
        VideoRequest(**{"prompt": "a red cat", "seed": i, "id": f"r{i}", "steps": 2, **own, **fields})
        for i, own in enumerate(each)
    ]


def same(ours: list, theirs: list) -> bool:
    pairs = list(zip(ours, theirs, strict=True))
    return all(np.array_equal(a.frames, b.frames) and torch.equal(a.latents, b.latents) for a, b in pairs)


@pytest.fixture(scope="module")
def whole(tiny_folder: Path) -> Model:
    return load(tiny_folder, "cpu", "float32")


@pytest.fixture
def by_component(tiny_folder: Path) -> Model:
    """A model whose parts come and go, as on a GPU, and have nowhere to go."""
    model = load(tiny_folder, "cpu", "float32")
    placement = Placement(CPU)
    placement.offload = "component"
    for name, network in model.family.parts.items():
        placement.take(name, network, torch.float32, model.family.phases[name], name in model.family.blockwise)
    return replace(model, placement=placement)


# -- the same videos -------------------------------------------------------------------------------


@pytest.mark.parametrize("isolation", ["exact", "packed"])
@pytest.mark.parametrize("dtype", ["float32", "transformer=bf16,vae=fp32,text=bf16"])
def test_videos_are_the_same_to_the_bit_and_the_folder_goes(tiny_folder: Path, isolation: str, dtype: str) -> None:
    options = {"device": "cpu", "dtype": dtype, "isolation": isolation, "keep_latents": True}
    expected = Engine.from_pretrained(str(tiny_folder), **options).generate(requests())
    engine = Engine.from_pretrained(str(tiny_folder), **options, offload="block")
    made = engine.generate(requests())
    assert same(made, expected)
    assert made[0].provenance["offload"] == "block"
    assert expected[0].provenance["offload"] == "none"
    folder = Path(engine.model.placement._folder.name)
    assert len(list(folder.rglob("*.safetensors"))) >= 8  # the transformer's blocks alone are four
    del engine, made
    gc.collect()
    assert not folder.exists()


def test_weights_stored_in_another_dtype_are_cast_as_loading_casts_them(tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "half"
    shutil.copytree(tiny_folder, folder)
    for file in folder.glob("*/*.safetensors"):
        save_file({name: tensor.half() for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    options = {"device": "cpu", "dtype": "float32", "keep_latents": True}
    engine = Engine.from_pretrained(str(folder), **options, offload="block")
    dtypes = {parameter.dtype for parameter in engine.model.family.transformer.parameters()}
    assert dtypes == {torch.float32}
    assert same(engine.generate(requests()), Engine.from_pretrained(str(folder), **options).generate(requests()))


def test_component_by_component_one_part_is_there_while_it_works(
    by_component: Model, whole: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, enter = [], Placement.enter
    monkeypatch.setattr(
        Placement, "enter", lambda self, phase: (entered.append((self.here, phase)), enter(self, phase))
    )
    made = Engine(by_component, keep_latents=True).generate(requests())
    assert same(made, Engine(whole, keep_latents=True).generate(requests()))
    moves = [phase for here, phase in entered if here != phase]
    # texts, then the steps until the first three are done, their decoding, the last one's step and its decoding
    assert moves[:5] == ["text", "step", "decode", "step", "decode"]
    assert by_component.placement.here == moves[-1]


def test_networks_go_to_the_cpu_when_another_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[tuple[str, str]] = []

    class Network(torch.nn.Linear):
        def to(self, device: torch.device) -> Network:  # type: ignore[override]
            moved.append((self.name, torch.device(device).type))
            return self

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(placement_room, "send_to_device", lambda values, device: values)
    placement = Placement(CUDA, "component")
    networks = {}
    phases = {"text_encoder": "text", "text_encoder_2": "text", "transformer": "step", "vae": "decode"}
    for name, phase in phases.items():
        networks[name] = Network(2, 2)
        networks[name].name = name
        placement.take(name, networks[name], torch.float32, phase, blockwise=False)
    assert not moved  # loading puts nothing on the device
    for name in ("text_encoder", "text_encoder_2", "transformer", "transformer", "vae"):
        networks[name](torch.ones(1, 2))
    texts = ["text_encoder", "text_encoder_2"]
    assert moved == [
        *((name, "cuda") for name in texts),
        *((name, "cpu") for name in texts),
        ("transformer", "cuda"),
        ("transformer", "cpu"),
        ("vae", "cuda"),
    ]
    moved.clear()
    with placement.on_cpu("decode"):
        assert networks["vae"]._hf_hook.execution_device == CPU
        networks["vae"](torch.ones(1, 2))
    assert moved == [("vae", "cpu")] * 2  # it leaves, and works without coming
    networks["vae"](torch.ones(1, 2))
    assert moved[-1] == ("vae", "cuda")


# -- memory ----------------------------------------------------------------------------------------

CHILD = """
import json, sys
from pathlib import Path
import torch, transformers
from reelbatch import VideoRequest
from reelbatch.engine.engine import Engine

torch.set_num_threads(1)
_ = transformers.LlamaModel, transformers.CLIPTextModel, transformers.PreTrainedTokenizerFast  # now imported

def resident(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

before = resident("VmRSS")
engine = Engine.from_pretrained(sys.argv[1], device="cpu", dtype=sys.argv[3], offload=sys.argv[2], keep_latents=True)
loaded = resident("VmRSS") - before
Path("/proc/self/clear_refs").write_text("5")
videos = engine.generate([VideoRequest(prompt="a red cat", seed=i, steps=2, frames=5) for i in range(2)])
folder = engine.model.placement._folder and engine.model.placement._folder.name
print(json.dumps([loaded, resident("VmHWM") - before, [v.frames_sha256 for v in videos], folder]))
"""


@pytest.fixture(scope="module")
def heavy_folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a transformer of 200 MiB, most of it in eight blocks."""
    folder = tmp_path_factory.mktemp("heavy") / "model"
    shutil.copytree(tiny_folder, folder)
    heads = {"num_attention_heads": 40, "mlp_ratio": 4.0, "num_layers": 2, "num_single_layers": 6}
    tiny.transformer(num_refiner_layers=0, **heads).save_pretrained(folder / "transformer")
    return folder


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_memory_falls_by_the_blocks_that_are_not_at_work(heavy_folder: Path) -> None:
    def child(kind: str) -> list[Any]:
        words = [sys.executable, "-c", CHILD, str(heavy_folder), kind, "bfloat16"]
        done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    (_, whole_peak, expected, _), (loaded, peak, made, folder) = child("none"), child("block")
    assert made == expected
    weights = (heavy_folder / "transformer" / "diffusion_pytorch_model.safetensors").stat().st_size // 2
    assert weights > 90 * MIB
    assert loaded < 0.5 * weights  # what stays are libraries
    assert whole_peak - peak > 0.5 * weights
    assert not Path(folder).exists()  # removed at the end


def test_the_weights_that_come_for_a_phase_are_counted(tiny_folder: Path, by_component: Model, whole: Model) -> None:
    transformer = whole.family.transformer
    total = sum(parameter.numel() * 4 for parameter in transformer.parameters())
    singles = transformer.single_transformer_blocks  # smaller: two of the others are the most that is there
    in_blocks = load(tiny_folder, "cpu", "float32", offload="block").placement
    assert whole.placement.visiting_bytes("step") == 0
    assert by_component.placement.visiting_bytes("step") == total
    assert in_blocks.visiting_bytes("step") == total - sum(p.numel() * 4 for p in singles.parameters())
    assert len(transformer.transformer_blocks) == 2


# -- for a while ----------------------------------------------------------------------------------


def test_a_network_that_is_streamed_for_a_while_is_as_before_afterwards(whole: Model) -> None:
    generate, transformer = Engine(whole, keep_latents=True).generate, whole.family.transformer
    expected = generate(requests())
    before = dict(transformer.named_parameters())
    with counting_fetches() as counted, whole.placement.block_by_block("step"):
        made = Engine(whole, keep_latents=True)._loop._fallback.step(started(whole)).outcomes
    assert counted.bytes > 0
    plain = Engine(whole, keep_latents=True)._loop._fallback.step(started(whole)).outcomes
    assert all(torch.equal(ours.latents, theirs.latents) for ours, theirs in zip(made, plain, strict=True))
    assert all(parameter is before[name] for name, parameter in transformer.named_parameters())
    with counting_fetches() as counted:
        assert same(generate(requests()), expected)
    assert counted.bytes == 0


def started(model: Model) -> list[Sample]:
    """Samples before their first step."""
    return [Runner(model, "exact").start(request.for_model(model.limits)) for request in requests()]


# -- what is built on the transformer --------------------------------------------------------------


def test_a_lora_works_on_weights_that_wait_on_disk(tiny_folder: Path) -> None:
    made = []
    for kind in ("none", "block"):
        engine = Engine.from_pretrained(str(tiny_folder), device="cpu", keep_latents=True, offload=kind)
        plain = engine.generate(requests())
        transformer = engine.model.family.transformer
        torch.manual_seed(0)
        transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "proj_mlp"], init_lora_weights=False))
        made.append(engine.generate(requests()))
        assert not same(made[-1], plain)
        transformer.disable_adapters()
        assert same(engine.generate(requests()), plain)
    assert same(*made)


def test_a_lora_keeps_its_digits_beside_weights_that_are_stored_in_fewer(tiny_folder: Path, tmp_path: Path) -> None:
    folder, lora = tmp_path / "model", tmp_path / "lora.safetensors"
    shutil.copytree(tiny_folder, folder)
    for file in folder.glob("transformer/*.safetensors"):
        save_file({name: tensor.bfloat16() for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    transformer = load(folder, "cpu", "float32").family.parts["transformer"]
    torch.manual_seed(0)
    transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    save_lora(transformer, lora)
    options = {"device": "cpu", "dtype": "float32", "keep_latents": True, "lora": [(lora, 1.0)]}
    made = [
        Engine.from_pretrained(str(folder), **options, offload=kind).generate(requests()) for kind in ("none", "block")
    ]
    assert same(*made)


def test_backends_and_the_refusal_of_step_caches_are_as_without(tiny_folder: Path) -> None:
    options = {"device": "cpu", "attention": "math", "keep_latents": True}
    engine = Engine.from_pretrained(str(tiny_folder), **options, offload="block")
    assert engine.info["attention"] == "math"
    assert same(engine.generate(requests()), Engine.from_pretrained(str(tiny_folder), **options).generate(requests()))
    with pytest.raises(NotImplementedError, match="a step cache decides once"):
        engine.model.family.transformer.enable_cache(object())


def test_eight_bit_weights_come_block_by_block_from_memory(tiny_folder: Path) -> None:
    model = load(tiny_folder, "cpu", "int8")
    expected = Engine(model, keep_latents=True).generate(requests())
    stream(model.family.transformer, CPU, None, prefetch=False)
    try:
        assert same(Engine(model, keep_latents=True).generate(requests()), expected)
    finally:
        stop_streaming(model.family.transformer, CPU)


# -- what cannot be --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "device", "int8", "told"),
    [
        ("component", CPU, False, "use offload 'block', which keeps them on disk"),
        ("block", CPU, True, "8-bit weights cannot be offloaded to disk: use a dtype of bfloat16"),
        ("blocks", CPU, False, "offload is 'blocks'; it must be 'none', 'component' or 'block'"),
    ],
)
def test_what_cannot_be_is_refused_with_what_to_use(kind: str, device: torch.device, int8: bool, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        check_offload(kind, device, int8)


def test_what_can_be_is_told_and_refused_before_loading(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert offloads(CPU) == ["none", "block"]
    assert offloads(CPU, int8=True) == ["none"]
    assert offloads(CUDA) == offloads(CUDA, int8=True) == ["none", "component", "block"]
    monkeypatch.setattr(loading_room, "_load_networks", lambda *_: pytest.fail("loaded"))
    with pytest.raises(ValueError, match="this device is the CPU"):
        Engine.from_pretrained(str(tiny_folder), device="cpu", offload="component")
    with pytest.raises(ValueError, match="8-bit"):
        load(tiny_folder, "cpu", "int8", offload="block")


def test_a_full_disk_is_told_before_it_is_written_to(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(ValueError, match=r"0\.98 KiB are free: set TMPDIR to a folder on a larger disk"):
        load(tiny_folder, "cpu", "float32", offload="block")


def test_a_model_that_does_not_fit_whole_may_fit_in_blocks(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = inspect(tiny_folder)
    total = info.weight_bytes("float32", "cpu")
    monkeypatch.setattr(inspection, "device_memory_bytes", lambda device: total - 1)
    assert not info.fits("cpu", "float32")
    assert info.fits("cpu", "float32", "block")
    with pytest.raises(ModelFolderError, match="offload, a dtype of fewer bytes or a larger device is needed"):
        load(tiny_folder, "cpu", "float32")
    load(tiny_folder, "cpu", "float32", offload="block")
    monkeypatch.setattr(inspection, "device_memory_bytes", lambda device: 1000)
    assert not info.fits("cpu", "float32", "block")
    assert device_memory_bytes("cpu") > total


# -- texts -----------------------------------------------------------------------------------------


@pytest.fixture
def visits(by_component: Model) -> Iterator[list[list[int]]]:
    """Lengths of the prompts that Llama reads, visit by visit of the text encoders."""
    found: list[list[int]] = []
    placement, text = by_component.placement, by_component.family.text
    enter = placement.enter

    def entering(phase: str) -> None:
        if phase == "text" and placement.here != "text":
            found.append([])
        enter(phase)

    placement.enter = entering

    handle = text.llama.layers[0].register_forward_pre_hook(lambda module, args: found[-1].append(args[0].shape[1]))
    text.encode("warm")  # the template's beginning is read once
    text.forget()
    placement.leave()
    found.clear()
    yield found
    handle.remove()


def test_five_seeds_of_a_prompt_are_one_encoding(by_component: Model, visits: list[list[int]]) -> None:
    five = [VideoRequest(prompt="a red cat", seed=i, id=f"r{i}", steps=1, frames=5) for i in range(5)]
    engine = Engine(by_component, max_batch_size=2, keep_latents=True)
    made = engine.generate(five)
    assert [len(visit) for visit in visits] == [1]
    for video, request in zip(made, five, strict=True):
        assert same([video], Engine(by_component, keep_latents=True).generate([request]))


def test_the_texts_of_the_next_in_line_are_encoded_in_one_visit(
    by_component: Model, whole: Model, visits: list[list[int]]
) -> None:
    count = TEXT_WINDOW + 4
    many = [VideoRequest(prompt=f"cat {i}", seed=i, id=f"r{i}", steps=1, frames=1) for i in range(count)]
    made = Engine(by_component, max_batch_size=2, keep_latents=True).generate(many)
    assert [len(visit) for visit in visits] == [2 + TEXT_WINDOW, 2]  # the first two, and those behind them
    assert same(made, Engine(whole, keep_latents=True).generate(many))


@pytest.mark.parametrize("error", [ValueError("no such word"), MemoryError()])
def test_a_text_that_fails_fails_its_request_alone_and_at_its_turn(
    by_component: Model, whole: Model, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    names = ["a cat", "a bad dog", "a star", "a circle"]
    four = [VideoRequest(prompt=p, seed=i, id=f"r{i}", steps=1, frames=1) for i, p in enumerate(names)]
    encode = TextEncoder.encode

    def failing(self: object, prompt: str, prompt_2: str | None = None) -> object:
        if "bad" in prompt:
            raise error
        return encode(self, prompt, prompt_2)

    monkeypatch.setattr(TextEncoder, "encode", failing)
    engine = Engine(by_component, max_batch_size=1, keep_latents=True)
    for request in four:
        engine.submit(request)
    assert not [end for end in engine.step() if isinstance(end, Failure)]  # it is read ahead of its turn
    ends = {end.request.id: end for end in engine.run()}
    failure = ends.pop("r1")
    assert isinstance(failure, Failure)
    assert failure.error is error or isinstance(failure.error, OutOfMemory)
    monkeypatch.undo()
    expected = {video.request.id: video for video in Engine(whole, keep_latents=True).generate(four)}
    assert set(ends) == {"r2", "r3"}
    assert same(list(ends.values()), [expected[id] for id in ends])
