"""HunyuanVideo 1.5 gives the same bits wherever weights and inputs lie in memory (see `test_addresses`)."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import tiny15
import torch
from addresses import ODD_OFFSETS, bits_by_address, no_bits_twice, place, place_weights
from safetensors.torch import load_file, save_file
from torch import Tensor

from reelbatch import Engine
from reelbatch.loading.model import Model
from reelbatch.memory.alignment import align_weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny15.make_folder(tmp_path_factory.mktemp("tiny15"))


@pytest.fixture(params=["this machine", "bits by address"])
def machine(request: pytest.FixtureRequest) -> Callable[[], Any]:
    return bits_by_address if request.param == "bits by address" else nullcontext


@pytest.fixture
def model() -> Model:
    model = tiny15.model(tiny15.pipeline())
    for network in model.family.parts.values():
        align_weights(network)
    return model


def sha256s(engine: Engine) -> list[str | None]:
    return [video.frames_sha256 for video in engine.generate(tiny15.mixed())]


def test_videos_are_the_same_wherever_the_weights_lie(model: Model, machine: Callable[[], Any]) -> None:
    """All of its networks: towers, transformer and VAE, which encodes images too."""
    expected = sha256s(Engine(model))
    for network in model.family.parts.values():
        place_weights(network, *ODD_OFFSETS)
    model.family.release()
    with machine():
        assert sha256s(Engine(model)) == expected


@torch.no_grad()
def test_frames_and_latents_are_the_same_wherever_weights_and_inputs_lie(
    model: Model, machine: Callable[[], Any]
) -> None:
    decoder = model.family.decoder
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, 1, 1), (2, 1, 2), (3, 3, 2))
    latents = [torch.randn(4, *shape, generator=generator) for shape in shapes]
    image = torch.rand(3, 32, 16, generator=generator) * 2 - 1
    video = torch.randint(0, 256, (5, 16, 32, 3), generator=generator, dtype=torch.uint8)

    def results(offset: int) -> list[Tensor]:
        decoded = [decoder.decode(place(sample, offset)) for sample in latents]
        return [*decoded, decoder.encode_image(place(image, offset)), decoder.encode(place(video, offset))]

    expected = results(0)
    for offset in ODD_OFFSETS[::3]:
        place_weights(decoder.vae, offset, 0)
        with machine():
            for result, right in zip(results(offset), expected, strict=True):
                assert torch.equal(result, right)


def test_no_product_of_a_batch_has_few_rows(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in model.family.images.siglip.modules():
        if hasattr(module, "use_head"):
            monkeypatch.setattr(module, "use_head", False)  # what it gives is not read
    with bits_by_address() as calls:
        sha256s(Engine(model))
    assert calls == {}


@pytest.mark.parametrize("offload", ["none", "block"])
def test_videos_of_weights_from_disk_are_the_same_wherever_they_lie_in_their_files(
    folder: Path, tmp_path: Path, offload: Any
) -> None:
    expected = sha256s(Engine.from_pretrained(str(folder), device="cpu"))
    shutil.copytree(folder, tmp_path / "shifted")
    for number, file in enumerate(sorted((tmp_path / "shifted").glob("*/*.safetensors"))):
        save_file(load_file(file), file, metadata={"format": "pt", "pad": "x" * 8 * (number + 1)})
    with no_bits_twice():
        engine = Engine.from_pretrained(str(tmp_path / "shifted"), device="cpu", offload=offload)
        first, second = sha256s(engine), sha256s(engine)
    assert first == second == expected
