"""A result does not depend on where weights and inputs lie in memory, and small products are padded everywhere."""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from addresses import ODD_OFFSETS, bits_by_address, misaligned_weights, no_bits_twice, place, place_weights
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchao.quantization import Int8Tensor, Int8WeightOnlyConfig, quantize_

from reelbatch import Engine, VideoRequest
from reelbatch.loading.lora import save_lora
from reelbatch.memory.alignment import align_weights, aligned
from reelbatch.models.hunyuan_video.branch import Branch
from reelbatch.models.hunyuan_video.transformer import HunyuanVideoTransformer3DModel
from reelbatch.models.linear import FewRowsLinear, linear, padding_of
from reelbatch.repairs.repair import repair, restore


@pytest.fixture(params=["this machine", "bits by address"])
def machine(request: pytest.FixtureRequest) -> Callable[[], Any]:
    return bits_by_address if request.param == "bits by address" else nullcontext


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def ours(seed: int = 0, **changes: Any) -> HunyuanVideoTransformer3DModel:
    reference = tiny.transformer(seed=seed, **changes)
    model = HunyuanVideoTransformer3DModel.from_config(reference.config)
    model.load_state_dict(reference.state_dict())
    return model.eval()


def branch(seed: int, frames: int = 1, height: int = 2, width: int = 2, text: int = 1, offset: int = 0) -> Branch:
    generator = torch.Generator().manual_seed(seed)
    config = tiny.transformer_config()

    def draw(*shape: int) -> Tensor:
        return place(torch.randn(shape, generator=generator), offset)

    return Branch(
        latents=draw(config["in_channels"], frames, height, width),
        text=draw(text, config["text_embed_dim"]),
        pooled=draw(config["pooled_projection_dim"]),
        timestep=place(torch.tensor(500.0 + seed), offset),
        guidance=place(torch.tensor(6000.0), offset),
    )


def requests() -> list[VideoRequest]:
    each = ({"frames": 5}, {"width": 16, "height": 16, "frames": 1}, {"true_cfg": 2.0, "negative_prompt": "blurry"})
    return [
        VideoRequest(**{"prompt": "a red cat", "seed": i, "id": f"r{i}", "steps": 2, **own})
        for i, own in enumerate(each)
    ]


def same(ours: list, theirs: list) -> bool:
    pairs = list(zip(ours, theirs, strict=True))
    return all(np.array_equal(a.frames, b.frames) and torch.equal(a.latents, b.latents) for a, b in pairs)


# -- one product -----------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(
    rows=st.integers(0, 70),
    threads=st.integers(1, 4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    deep=st.booleans(),
)
def test_a_padded_product_has_no_thread_with_few_rows_and_gives_its_own_rows(
    rows: int, threads: int, dtype: torch.dtype, deep: bool
) -> None:
    layer, seen = nn.Linear(6, 5, dtype=dtype), []
    layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[-2]))
    inputs = torch.randn(*([1] if deep else []), rows, 6, dtype=dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = linear(layer, inputs)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(found, F.linear(inputs, layer.weight, layer.bias))
    (count,) = seen
    if dtype == torch.bfloat16:
        assert count == rows
        return
    chunk = math.ceil(count / threads / 4) * 4  # rows of a thread: whole fours, the last one's are what is left
    rests = [min(chunk, count - start) for start in range(0, count, chunk or 1)]
    assert all(rest >= 4 for rest in rests)
    assert count - rows < 4


@pytest.mark.parametrize("features", [(64, 96), (2**15, 7)])
def test_few_rows_are_the_same_wherever_they_lie_and_however_many(features: tuple[int, int]) -> None:
    layer, rows = FewRowsLinear(*features), torch.randn(3, features[0])
    expected = F.linear(rows, layer.weight, layer.bias)
    with torch.no_grad():
        whole = layer(rows)
        torch.testing.assert_close(whole, expected, rtol=1e-5, atol=1e-5)
        for offset in ODD_OFFSETS:
            place_weights(layer, offset)
            for i in range(3):
                assert torch.equal(linear(layer, place(rows[i : i + 1], offset)), whole[i : i + 1])


def test_few_rows_with_a_gradient_or_of_a_quantized_layer_are_padded() -> None:
    layer, row, seen = FewRowsLinear(64, 64), torch.randn(1, 64), []
    layer.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    linear(layer, row)
    with torch.no_grad():
        linear(layer, row)
        quantized = nn.Sequential(copy.deepcopy(layer))
        quantize_(quantized, Int8WeightOnlyConfig())
        assert isinstance(quantized[0], FewRowsLinear)
        linear(quantized[0], row)
    assert seen == [4, 1, 4]


def test_only_small_products_on_a_cpu_are_padded(two_threads: None) -> None:
    assert [padding_of(rows, torch.empty(1)) for rows in (0, 1, 4, 5, 9, 15, 16, 17)] == [0, 3, 0, 3, 3, 1, 0, 0]
    assert padding_of(1, torch.empty(1, device="meta")) == 0
    assert padding_of(1, torch.empty(1, dtype=torch.float16)) == 0
    assert padding_of(1, torch.empty(1, dtype=torch.float64)) == 3


@pytest.mark.parametrize("rows", [1, 2, 3, 5])
@pytest.mark.parametrize("offset", ODD_OFFSETS)
@torch.no_grad()
def test_a_product_is_the_same_wherever_its_operands_lie(
    rows: int, offset: int, machine: Callable[[], Any], two_threads: None
) -> None:
    inputs, layer = torch.randn(rows, 192), nn.Linear(192, 192)
    expected = linear(layer, inputs)
    place_weights(layer, offset)
    with machine():
        assert torch.equal(linear(layer, place(inputs, offset)), expected)


def test_gradients_through_a_padded_product_are_those_of_the_plain_one() -> None:
    inputs, layer = torch.randn(3, 192, requires_grad=True), nn.Linear(192, 64)
    gradients = []
    for product in (layer(inputs), linear(layer, inputs)):
        gradients.append(torch.autograd.grad(product.square().sum(), [inputs, *layer.parameters()]))
    for plain, padded in zip(*gradients, strict=True):
        torch.testing.assert_close(padded, plain)


def test_aligned_copies_only_what_lies_badly() -> None:
    tensor = torch.randn(5, 7).t()
    assert aligned(tensor) is tensor
    moved = aligned(place(tensor, 8))
    assert moved.data_ptr() % 64 == 0
    assert torch.equal(moved, tensor)
    network = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7))
    place_weights(network, *ODD_OFFSETS)
    values = copy.deepcopy(network.state_dict())
    before = list(map(id, (*network.parameters(), *network.buffers())))
    align_weights(network)
    assert list(map(id, (*network.parameters(), *network.buffers()))) == before
    assert misaligned_weights(network) == []
    assert all(torch.equal(value, values[name]) for name, value in network.state_dict().items())


# -- the networks ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape", [{}, {"text": 2, "width": 4}, {"text": 3, "frames": 3, "height": 4}, {"text": 5, "width": 6}]
)
@pytest.mark.parametrize("isolation", ["exact", "packed"])
@pytest.mark.parametrize("adapter", [None, "lora", "dora"])
@torch.no_grad()
def test_a_velocity_is_the_same_wherever_weights_and_inputs_lie(
    shape: dict[str, int], isolation: str, adapter: str | None, machine: Callable[[], Any], two_threads: None
) -> None:
    model = ours()
    if adapter is not None:
        targets = ["to_q", "proj_mlp", "norm1.linear", "norm.linear", "linear_1", "proj"]
        torch.manual_seed(0)
        model.add_adapter(LoraConfig(r=16, target_modules=targets, init_lora_weights=False, use_dora=adapter == "dora"))

    def velocities(offset: int) -> list[Tensor]:
        branches = [branch(seed, **shape, offset=offset) for seed in range(2)]
        packs = [branches] if isolation == "packed" else [[each] for each in branches]
        return [velocity for pack in model(packs=packs) for velocity in pack]

    align_weights(model)
    expected = velocities(0)
    for offset in ODD_OFFSETS:
        place_weights(model, offset)
        with machine():
            for found, right in zip(velocities(offset), expected, strict=True):
                assert torch.equal(found, right)


@pytest.mark.parametrize("image_condition_type", [None, "token_replace"])
@torch.no_grad()
def test_no_product_of_a_forward_has_few_rows(image_condition_type: str | None) -> None:
    model = ours(image_condition_type=image_condition_type)
    for count in range(1, 4):
        with bits_by_address() as calls:
            model(packs=[[branch(seed, text=1 + seed) for seed in range(count)]])
        assert calls == {}


@torch.no_grad()
def test_products_of_8_bit_weights_are_padded_too_and_exact() -> None:
    model = ours()
    quantize_(model, Int8WeightOnlyConfig(), filter_fn=lambda module, name: type(module) is nn.Linear)
    assert isinstance(model.transformer_blocks[0].ff.net[2].weight, Int8Tensor)
    branches = [branch(seed, text=1 + seed) for seed in range(3)]
    with bits_by_address() as calls:
        together = model(packs=[[each] for each in branches])
        alone = [model(packs=[[each]]) for each in branches]
        packed = model(packs=[branches])
    assert calls == {}
    for (ours_together,), ((ours_alone,),), ours_packed in zip(together, alone, packed[0], strict=True):
        assert torch.equal(ours_together, ours_alone)
        torch.testing.assert_close(ours_packed, ours_alone, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_texts_and_frames_are_the_same_wherever_the_weights_lie(tiny_folder: Path, machine: Callable[[], Any]) -> None:
    expected, moved = (Engine.from_pretrained(str(tiny_folder), device="cpu", keep_latents=True) for _ in range(2))
    videos = expected.generate(requests())
    for network in moved.model.family.parts.values():
        place_weights(network, *ODD_OFFSETS)
    with machine():
        assert same(moved.generate(requests()), videos)


@torch.no_grad()
def test_a_text_of_one_new_token_is_no_small_product(tiny_folder: Path) -> None:
    engine = Engine.from_pretrained(str(tiny_folder), device="cpu")
    text = engine.model.family.text
    with bits_by_address() as calls:
        for words in ("cat", "a cat", "a red cat"):
            text.encode(words)
        text.clip(input_ids=torch.tensor([[1]]))
        text.states._states([1])
    assert calls == {}


# -- where weights come from -----------------------------------------------------------------------


def shift_file(path: Path, by: int) -> None:
    """Rewrites a safetensors file so that its tensors begin `by` bytes further on."""
    save_file(load_file(path), path, metadata={"format": "pt", "pad": "x" * by})


@pytest.mark.parametrize("isolation", ["exact", "packed"])
@pytest.mark.parametrize("offload", ["none", "block"])
def test_videos_of_weights_from_disk_are_the_same_wherever_they_lie_in_their_files(
    tiny_folder: Path, tmp_path: Path, isolation: str, offload: str
) -> None:
    options = {"device": "cpu", "dtype": "float32", "isolation": isolation, "keep_latents": True}
    expected = Engine.from_pretrained(str(tiny_folder), **options).generate(requests())
    folder = tmp_path / "shifted"
    shutil.copytree(tiny_folder, folder)
    for number, file in enumerate(sorted(folder.glob("*/*.safetensors"))):
        shift_file(file, 8 * (number + 1))
    with no_bits_twice():
        engine = Engine.from_pretrained(str(folder), **options, offload=offload)
        first, second = engine.generate(requests()), engine.generate(requests())
    assert same(first, expected)
    assert same(second, expected)


def test_loaded_weights_and_those_of_loras_are_aligned(tiny_folder: Path, tmp_path: Path) -> None:
    model = ours()
    model.add_adapter(LoraConfig(r=3, target_modules=["to_q"], init_lora_weights=False))
    save_lora(model, tmp_path / "a.safetensors")
    engine = Engine.from_pretrained(str(tiny_folder), device="cpu", lora=[(tmp_path / "a.safetensors", 1.0)])
    for network in engine.model.family.parts.values():
        assert misaligned_weights(network) == []


@pytest.mark.parametrize("prompts", [["a red cat"], ["a red cat", "dog"]])
def test_a_repaired_pipeline_is_exact_with_weights_at_odd_addresses(
    tiny_folder: Path, prompts: list[str], machine: Callable[[], Any]
) -> None:
    def generate() -> np.ndarray:
        return np.asarray(
            pipe(
                prompts,
                height=16,
                width=16,
                num_frames=1,
                num_inference_steps=2,
                generator=torch.Generator().manual_seed(0),
                output_type="latent",
            ).frames
        )

    pipe = diffusers.HunyuanVideoPipeline.from_pretrained(tiny_folder)
    pipe.set_progress_bar_config(disable=True)
    align_weights(pipe.transformer)
    repair(pipe)
    expected = generate()
    for offset in ODD_OFFSETS[:4]:
        place_weights(pipe.transformer, offset)
        with machine():
            assert np.array_equal(generate(), expected)
    restore(pipe)
