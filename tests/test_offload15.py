"""HunyuanVideo 1.5 with weights that wait elsewhere, and of 8 bits: each video of a batch is the video alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import tiny15
import torch
from torchao.quantization import Int8Tensor

from reelbatch import Engine
from reelbatch.loading.load import load
from reelbatch.loading.model import Model
from reelbatch.memory.placement import Placement

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny15.make_folder(tmp_path_factory.mktemp("tiny15"))


@pytest.fixture(scope="module")
def plain(folder: Path) -> list[str | None]:
    return sha256s(load(folder, "cpu"))


def sha256s(model: Model) -> list[str | None]:
    return [video.frames_sha256 for video in Engine(model).generate(tiny15.mixed())]


def eight_bit(folder: Path) -> Model:
    return load(folder, "cpu", "int8")


def block_by_block(folder: Path) -> Model:
    return load(folder, "cpu", offload="block")


def by_component(folder: Path) -> Model:
    """Whose parts come and go, as on a GPU, and have nowhere to go."""
    model = load(folder, "cpu")
    family, placement = model.family, Placement(CPU)
    placement.offload = "component"
    for name, network in family.parts.items():
        blockwise, also = name in family.blockwise, family.also.get(name, ())
        placement.take(name, network, torch.float32, family.phases[name], blockwise, also)
    return replace(model, placement=placement)


@pytest.mark.parametrize("made", [eight_bit, block_by_block, by_component], ids=lambda made: made.__name__)
def test_every_video_of_a_mixed_batch_is_the_video_alone(
    folder: Path, plain: list[str | None], made: Callable[[Path], Model]
) -> None:
    model = made(folder)
    together = sha256s(model)
    assert (together == plain) == (made is not eight_bit)
    for request, sha256 in zip(tiny15.mixed(), together, strict=True):
        model.family.forget()
        (alone,) = Engine(model).generate(request)
        assert alone.frames_sha256 == sha256, request.prompt


def test_the_blocks_weights_are_of_8_bits_and_what_comes_before_them_is_not(folder: Path) -> None:
    transformer = eight_bit(folder).family.transformer
    kinds = {name: type(module.weight) for name, module in transformer.named_modules() if hasattr(module, "weight")}
    quantized = {name for name, kind in kinds.items() if issubclass(kind, Int8Tensor)}
    layers = {name for name, module in transformer.transformer_blocks.named_modules() if hasattr(module, "in_features")}
    assert quantized - {"proj_out"} == {f"transformer_blocks.{name}" for name in layers}


def test_images_are_encoded_among_the_texts_without_a_visit_of_the_decoder(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moves: list[str] = []
    enter = Placement.enter

    def watched(self: Placement, phase: str) -> None:
        moves.extend([phase] if self.here != phase else [])
        enter(self, phase)

    monkeypatch.setattr(Placement, "enter", watched)
    sha256s(by_component(folder))
    assert moves[:2] == ["text", "step"] and moves.count("text") == 1
