"""Placement: weights leave and come back as they were; every rung of the out-of-memory ladder is climbed for real."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from reelbatch import Video, VideoRequest
from reelbatch.engine.engine import Engine, FailedRequests, Failure
from reelbatch.engine.events import Event, FellBack
from reelbatch.loading.load import load
from reelbatch.loading.model import Model
from reelbatch.memory.placement import Placement
from reelbatch.memory.streaming import DiskGroup, groups_of, stream
from reelbatch.models.family import PHASES, Phase

FREED = "after memory was freed"
EVICTED = "with the other networks moved to disk"
IN_BLOCKS = "with weights that come block by block"


@pytest.fixture
def model(tiny_folder: Path) -> Model:
    return load(tiny_folder, "cpu", torch.float32)


def weights(model: Model) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{key}": tensor.clone()
        for name, network in model.family.parts.items()
        for key, tensor in network.state_dict().items()
    }


def assert_as_before(model: Model, before: dict[str, torch.Tensor]) -> None:
    after = weights(model)
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name
    assert not any(groups_of(network) for network in model.family.parts.values())


def in_memory(network: nn.Module) -> int:
    """Bytes of a network's weights that take memory."""
    return sum(parameter.untyped_storage().nbytes() for parameter in network.parameters())


def away(model: Model) -> set[str]:
    """Parts whose weights are not in memory."""
    return {name for name, part in model.family.parts.items() if in_memory(part) < 16 * len([*part.parameters()])}


def requests() -> list[VideoRequest]:
    return [
        VideoRequest(prompt="a red cat", seed=i, id=f"r{i}", height=32, width=32, frames=5, steps=2) for i in range(3)
    ]


# -- weights that leave for a while ----------------------------------------------------------------


@pytest.mark.parametrize("phase", PHASES)
def test_evicted_weights_take_no_memory_and_come_back_as_they_were(model: Model, phase: Phase) -> None:
    before = weights(model)
    (expected,) = Engine(model).generate(requests()[:1])
    others = {name for name, of in model.family.phases.items() if of != phase}
    with model.placement.evicted(*(other for other in PHASES if other != phase)):
        assert away(model) == others
    assert_as_before(model, before)
    (video,) = Engine(model).generate(requests()[:1])
    assert np.array_equal(video.frames, expected.frames)


def test_a_network_comes_block_by_block_for_a_while_and_is_as_before_afterwards(model: Model) -> None:
    before = weights(model)
    transformer = model.family.parts["transformer"]
    with model.placement.block_by_block("step"):
        assert groups_of(transformer)
        assert in_memory(transformer) < sum(tensor.nbytes for tensor in transformer.parameters()) / 2
        assert away(model) == {"vae", "text_encoder", "text_encoder_2"} | ({"transformer"} & away(model))
    assert_as_before(model, before)


def test_what_cannot_be_written_to_disk_is_left_where_it_is(
    model: Model, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before = weights(model)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    with pytest.raises(OSError, match="gone"), model.placement.evicted("text", "decode"):
        pass
    assert_as_before(model, before)


def test_a_disk_that_fills_in_the_middle_leaves_all_weights_as_they_were(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers.hooks import group_offloading

    before, written, save = weights(model), [], group_offloading.safetensors.torch.save_file

    def full(tensors: dict[str, torch.Tensor], path: str) -> None:
        if written:
            raise OSError(28, "No space left on device")
        written.append(path)
        save(tensors, path)

    monkeypatch.setattr(group_offloading.safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match="No space"), model.placement.evicted("text", "decode"):
        pass
    monkeypatch.undo()
    assert len(written) == 1
    assert_as_before(model, before)


def test_weights_that_cannot_come_back_at_once_give_no_wrong_video_and_come_back_later(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, onload = weights(model), DiskGroup._onload_from_disk
    (expected,) = Engine(model).generate(requests()[:1])
    refused: list[object] = []

    def scarce(group: DiskGroup) -> None:
        if len(refused) < 2:
            refused.append(group)
            raise MemoryError("cannot allocate 9 GiB")
        onload(group)

    monkeypatch.setattr(DiskGroup, "_onload_from_disk", scarce)
    engine = Engine(model)
    engine.submit(requests()[0])
    engine.submit(requests()[1])
    model.family.forget()
    with failing(model, "encode", 2, []):  # the text is encoded while the others are on disk, and these do not return
        ended = engine.step()
    assert len(refused) == 2
    ended += engine.run()
    assert {end.request.id for end in ended} == {"r0", "r1"}
    for end in ended:  # what was computed meanwhile fails, and is never taken for a video
        assert not isinstance(end, Video) or end.request.id == "r1" or np.array_equal(end.frames, expected.frames)
    assert_as_before(model, before)
    (video,) = Engine(model).generate(requests()[:1])
    assert np.array_equal(video.frames, expected.frames)


def test_what_helps_depends_on_where_weights_can_go(model: Model) -> None:
    def what(placement: Placement, phase: Phase) -> list[str]:
        for name, network in model.family.parts.items():
            blockwise = name in model.family.blockwise
            placement.take(name, network, torch.float32, model.family.phases[name], blockwise)
        return [relief.what for relief in placement.reliefs(phase)]

    cpu = torch.device("cpu")
    assert what(Placement(cpu), "text") == [EVICTED, IN_BLOCKS]
    assert what(Placement(cpu), "step") == [EVICTED, IN_BLOCKS]
    assert what(Placement(cpu), "decode") == [EVICTED]
    assert what(Placement(cpu, storable=False), "step") == []


# -- the ladder ------------------------------------------------------------------------------------


@contextmanager
def failing(model: Model, work: str, times: int, seen: list[set[str]]) -> Iterator[None]:
    """A family whose work runs out of memory the first times; notes which parts were away each time."""
    done = getattr(model.family, work)

    def scarce(*args: object) -> object:
        seen.append(away(model) | {name for name, part in model.family.parts.items() if groups_of(part)})
        if len(seen) <= times:
            raise MemoryError("cannot allocate 9 GiB")
        return done(*args)

    setattr(model.family, work, scarce)
    try:
        yield
    finally:
        delattr(model.family, work)


def run(model: Model, **options: object) -> tuple[list[Video], list[str]]:
    """One video, and in which ways memory was found for it."""
    engine = Engine(model, **options)
    events: list[Event] = []
    engine.subscribe(events.append)
    return engine.generate(requests()[:1]), [event.how for event in events if isinstance(event, FellBack)]


@pytest.mark.parametrize(
    ("work", "ways", "gone"),
    [
        ("encode", [FREED, EVICTED, IN_BLOCKS], {"transformer", "vae"}),
        ("velocities", [FREED, EVICTED, IN_BLOCKS], {"text_encoder", "text_encoder_2", "vae"}),
        ("decode", [FREED, EVICTED], {"transformer", "text_encoder", "text_encoder_2"}),
    ],
)
def test_every_rung_is_climbed_and_each_gives_the_same_video(
    model: Model, work: str, ways: list[str], gone: set[str]
) -> None:
    before = weights(model)
    (expected,), none = run(model)
    assert none == []
    for times in range(1, len(ways) + 1):
        seen: list[set[str]] = []
        model.family.forget()
        with failing(model, work, times, seen):
            (video,), used = run(model, keep_latents=True)
        tried = [set(), *([set()] if FREED in ways[:times] else []), *([gone] if EVICTED in ways[:times] else [])]
        assert used == ways[:times]
        assert seen[: min(times + 1, 3)] == tried[: times + 1]
        if IN_BLOCKS in used:
            assert seen[3] > gone  # and the network at work comes block by block
        assert np.array_equal(video.frames, expected.frames)
        assert video.provenance["fallbacks"] == []
        assert_as_before(model, before)


def test_smaller_tiles_are_the_last_rung_and_can_be_forbidden(model: Model) -> None:
    (expected,), _ = run(model)
    seen: list[set[str]] = []
    with failing(model, "decode", 3, seen):
        (video,), used = run(model)
    assert used == [FREED, EVICTED, "in VAE tiles of 128 pixels"]
    assert video.provenance["fallbacks"] == ["decoded in VAE tiles of 128 pixels"]
    assert video.provenance["vae_tiles"] == 128
    assert np.array_equal(video.frames, expected.frames)  # of a video that is smaller than a tile
    with failing(model, "decode", 3, []), pytest.raises(FailedRequests, match="cannot allocate 9 GiB"):
        run(model, keep_pixels=True)


def test_a_rung_that_cannot_be_stood_on_is_passed_over(
    model: Model, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (expected,), _ = run(model)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    with failing(model, "decode", 2, []):
        (video,), used = run(model)
    assert used == [FREED, EVICTED, "in VAE tiles of 128 pixels"]
    assert np.array_equal(video.frames, expected.frames)


# -- weights that cannot come back at once ---------------------------------------------------------


@pytest.mark.parametrize("tries", [2, 3])
@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_weights_that_cannot_come_back_at_once_do_before_the_next_work(
    model: Model, monkeypatch: pytest.MonkeyPatch, error: type[BaseException], tries: int
) -> None:
    before = weights(model)
    (expected,), _ = run(model)
    onload, left = DiskGroup._onload_from_disk, [1]

    def short(group: DiskGroup) -> None:
        if left and groups_of(model.family.parts["transformer"]) == []:
            left.pop()
            raise error
        onload(group)

    monkeypatch.setattr(DiskGroup, "_onload_from_disk", short)
    engine = Engine(model)
    engine.submit(requests()[0])
    videos: list[Video | Failure] = []
    with failing(model, "velocities", tries, []):
        while engine.busy:
            try:
                videos += engine.step()
            except KeyboardInterrupt:
                assert error is KeyboardInterrupt
    assert not left
    (video,) = videos
    assert isinstance(video, Video)
    assert np.array_equal(video.frames, expected.frames)
    assert_as_before(model, before)


@pytest.mark.parametrize("place", ["save", "leave"])
def test_an_interrupt_while_weights_leave_brings_them_back(
    model: Model, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    from diffusers.hooks import group_offloading

    before, calls = weights(model), [0]
    owner, name = (
        (group_offloading.safetensors.torch, "save_file") if place == "save" else (DiskGroup, "_offload_to_disk")
    )
    done = getattr(owner, name)

    def interrupted(*args: object) -> None:
        calls[0] += 1
        if calls[0] == 2 and place == "save":
            raise KeyboardInterrupt
        done(*args)
        if calls[0] == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(owner, name, interrupted)
    with pytest.raises(KeyboardInterrupt), model.placement.evicted("text", "decode"):
        pass
    monkeypatch.undo()
    assert_as_before(model, before)


def test_what_is_on_disk_is_never_computed_with(model: Model) -> None:
    with model.placement.evicted("decode"):
        assert all(weight.isnan().all() for weight in model.family.parts["vae"].parameters())


def test_weights_whose_file_was_cut_are_refused(model: Model, tmp_path: Path) -> None:
    network = nn.Linear(64, 64)
    stream(nn.Sequential(nn.ModuleList([network])), torch.device("cpu"), tmp_path)
    (file,) = (path for path in tmp_path.iterdir() if path.stat().st_size > 4096)
    with file.open("r+b") as cut:
        cut.truncate(file.stat().st_size - 4)
    with pytest.raises(OSError, match="cut short"):
        network(torch.zeros(1, 64))
