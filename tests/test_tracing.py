"""Tracing: bytes of live tensors, counted without running anything; estimates made of them, for any family."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from reelbatch.engine.engine import Engine
from reelbatch.geometry import Geometry
from reelbatch.loading.hub import DEMO_FOLDER
from reelbatch.loading.load import load
from reelbatch.loading.precision import Precision
from reelbatch.loading.published import HUNYUANVIDEO_13B
from reelbatch.loading.skeleton import from_folder, from_published
from reelbatch.memory.estimate import CPU_MARGIN, GPU_MARGIN, Estimator
from reelbatch.memory.streaming import network_bytes
from reelbatch.models.layers import rotary_table
from reelbatch.request import VideoRequest
from reelbatch.tracing import cached, peak_bytes, run_block, run_tile, tracing

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
FP32 = Precision.parse("float32", CPU)
KIB = 1024


# -- counting --------------------------------------------------------------------------------------


def test_what_is_alive_at_once_is_counted_and_views_once() -> None:
    def work() -> None:
        a = torch.empty(256)  # 1 KiB
        b = a.reshape(16, 16).t()[3:]
        c = a + 1
        del a, b  # 2 KiB were alive
        d = torch.cat([c, c])  # 3 KiB
        d.mul_(2)

    assert peak_bytes(work, CPU) == 3 * KIB


def test_a_network_is_counted_by_hand() -> None:
    network = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))
    rows = torch.randn(32, 64)
    # the input and the weights were there before; the last layer's input and output are alive at the end, and before
    # that the wide layer's output and what ReLU makes of it
    assert peak_bytes(lambda: network(rows), CPU) == 2 * 32 * 256 * 4


def test_real_tensors_are_not_touched_and_nothing_is_drawn() -> None:
    weight, state = torch.randn(8, 8), torch.get_rng_state()
    kept = weight.clone()

    def work() -> None:
        weight.mul_(0).add_(torch.randn(8, 8))

    assert peak_bytes(work, CPU) >= 8 * 8 * 4
    assert torch.equal(weight, kept) and torch.equal(torch.get_rng_state(), state)


def test_values_are_answered_where_there_are_none() -> None:
    def work() -> None:
        values = torch.zeros(4)
        assert bool(values.isfinite().all()) and values.sum().item() == 1.0 and torch.equal(values, values)

    peak_bytes(work, CPU)


def test_another_thread_works_on_real_tensors_meanwhile() -> None:
    layer, rows = nn.Linear(64, 64), torch.randn(8, 64)
    expected = layer(rows)
    results: list[Tensor] = []
    entered, go = threading.Event(), threading.Event()

    def other() -> None:
        entered.wait(60)
        results.append(layer(rows))
        assert not tracing()
        go.set()

    thread = threading.Thread(target=other)
    thread.start()

    def work() -> None:
        entered.set()
        assert go.wait(60) and tracing()
        layer(rows)

    peak_bytes(work, CPU)
    thread.join()
    assert torch.equal(results[0], expected)


def test_caches_keep_nothing_of_a_trace() -> None:
    calls = []

    @cached(maxsize=4)
    def table(size: int) -> Tensor:
        calls.append(size)
        return torch.ones(size)

    real = table(256)
    assert peak_bytes(lambda: (table(256), table(256), table(512)), CPU) == KIB + 2 * KIB  # each once, and kept
    assert calls == [256, 256, 512]
    assert table(256) is real and not isinstance(table(512), torch._subclasses.FakeTensor)


def test_what_fails_leaves_no_trace_behind() -> None:
    with pytest.raises(RuntimeError, match="reduction dim"):
        peak_bytes(lambda: torch.empty(2, 3) @ torch.empty(2, 3), CPU)
    assert not tracing()
    assert peak_bytes(lambda: torch.empty(256), CPU) == KIB


def test_of_equal_blocks_and_tiles_one_runs_and_the_peak_is_that_of_all() -> None:
    ran: list[str] = []

    class Block(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.wide, self.back = nn.Linear(64, width), nn.Linear(width, 64)

        def forward(self, packs: list[Tensor]) -> list[Tensor]:
            ran.append("block")
            return [self.back(self.wide(rows)) for rows in packs]

    blocks = [Block(width) for width in (128, 512, 128, 512)]

    def network(run: Any) -> None:
        packs = [torch.empty(32, 64) for _ in range(2)]
        for block in blocks:
            packs = run(block, packs)

    assert peak_bytes(lambda: network(run_block), CPU) == peak_bytes(lambda: network(lambda b, p: b(p)), CPU)
    assert len(ran) == 2 + 4

    def decoder(tile: Tensor) -> Tensor:
        ran.append("tile")
        return (torch.cat([tile] * 8) + 1)[: 2 * len(tile)].clone()  # most is alive beside the results of others

    def tiles(run: Any) -> None:
        done = [run(torch.empty(size)) for size in (256, 256, 128, 256)]
        torch.cat(done)

    ran.clear()
    shortened = peak_bytes(lambda: tiles(lambda tile: run_tile("decoder", decoder, tile)), CPU)
    assert ran == ["tile"] * 2
    assert shortened == peak_bytes(lambda: tiles(decoder), CPU)


# -- estimates of any family -----------------------------------------------------------------------


class Toy:
    """A family of one linear layer a part."""

    limits, flow_shift, dtype = None, 1.0, torch.float32
    geometry = Geometry(channels=2, spatial=8, temporal=4)
    phases: Mapping[str, Any] = {"words": "text", "net": "step", "out": "decode"}
    blockwise = frozenset({"net"})
    also: Mapping[str, Any] = MappingProxyType({})

    def __init__(self) -> None:
        self.parts = {
            "words": nn.Linear(4, 8),
            "net": nn.Sequential(nn.Linear(2, 64), nn.Linear(64, 2)),
            "out": nn.Linear(2, 3),
        }

    def encode(self, request: VideoRequest) -> Tensor:
        return self.parts["words"](torch.zeros(len(request.prompt), 4))

    def stand_in(self, request: VideoRequest) -> Tensor:
        return torch.empty(8)

    def branches(self, sample: Any) -> list[Tensor]:
        return [sample.latents.flatten(1).t() + sample.conditioning[:2]]

    def velocities(self, packs: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
        out = []
        for pack in packs:
            rows = self.parts["net"](torch.cat(list(pack)))
            out.append([part.t().reshape(2, -1) for part in rows.split([len(b) for b in pack])])
        return out

    def tile_side(self, request: VideoRequest) -> None:
        return None

    def decode(self, latents: Tensor, tile_side: None) -> Tensor:
        if not latents.isfinite().all():
            raise ValueError("not finite")
        return self.parts["out"](latents.flatten(1).t()).to(torch.uint8)


def request(height: int = 64, width: int = 64, frames: int = 9, **fields: Any) -> VideoRequest:
    return VideoRequest(**{"prompt": "a", "height": height, "width": width, "frames": frames, **fields})


class ToyVelocities(Toy):
    def velocities(self, packs: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
        return [[v.reshape(2, 3, 8, 8) for v in pack] for pack in super().velocities(packs)]


def test_a_family_that_nothing_here_knows_is_estimated() -> None:
    family: Any = ToyVelocities()
    estimator = Estimator(family, "exact", CPU)
    one = request()
    rows = 3 * 8 * 8
    latents = rows * 2 * 4
    # the latents, the branch, its rows joined and the wide layer's output, with conditioning and timestep
    kept, work = 2 * latents, latents + rows * 64 * 4 + latents
    assert estimator.step_tensors([one]) == pytest.approx(kept + work, abs=64)
    assert estimator.latent_bytes(one) == latents
    assert estimator.step([one]) == CPU_MARGIN.added_to(estimator.step_tensors([one]))
    assert Estimator(family, "exact", CUDA).step([one]) == GPU_MARGIN.added_to(estimator.step_tensors([one]))
    assert estimator.decode(one, [one, one]) > estimator.decode(one) > rows * 3 * 4
    assert estimator.text(one) > 4096 * 8 * 4
    sizes = {name: network_bytes(part) for name, part in family.parts.items()}
    assert set(estimator.weights().values()) == {sum(sizes.values())}
    assert list(estimator.weights("component").values()) == list(sizes.values())
    with pytest.raises(ValueError, match="one video or more"):
        estimator.step([])


# -- the networks here -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo() -> Any:
    return from_folder(DEMO_FOLDER, FP32, CPU)


@pytest.mark.parametrize("isolation", ["exact", "packed"])
@pytest.mark.parametrize("cfg", [False, True], ids=["", "guided"])
def test_equal_requests_cost_the_same_each(demo: Any, isolation: Any, cfg: bool) -> None:
    estimator = Estimator(demo, isolation, CPU)
    guided = {"negative_prompt": "", "true_cfg": 3.0} if cfg else {}
    one = request(96, 64, 5, **guided)
    counted = estimator.step_tensors([one] * 5)
    traced = estimator._trace_step(((one, 5),))
    assert counted == pytest.approx(traced, rel=0.001)
    other = request(128, 128, 5)
    counted = estimator.step_tensors([one] * 4 + [other] * 4)
    assert counted == pytest.approx(estimator._trace_step(((one, 4), (other, 4))), rel=0.01)


@pytest.fixture(scope="module")
def small(tiny_folder: Path) -> Any:
    return from_folder(tiny_folder, FP32, CPU)


kept_estimator = cache(Estimator)
"""Its text is traced once for all examples."""


@settings(max_examples=3, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(0, 2)), min_size=1, max_size=3),
    st.sampled_from(["exact", "packed"]),
)
def test_more_never_costs_less(small: Any, sizes: list[tuple[int, int, int]], isolation: Any) -> None:
    estimator = kept_estimator(small, isolation, CPU)
    requests = [request(32 * h, 32 * w, 4 * n + 1) for h, w, n in sizes]
    before = estimator.plan(requests)
    assert estimator.plan([*requests, request(32, 32, 1)]).step > before.step
    assert estimator.plan([*requests, requests[0]]).decode >= before.decode
    h, w, n = sizes[0]
    for larger in ((h + 1, w, n), (h, w + 1, n), (h, w, n + 1)):
        changed = [request(32 * larger[0], 32 * larger[1], 4 * larger[2] + 1), *requests[1:]]
        after = estimator.plan(changed)
        assert after.step >= before.step and after.decode >= before.decode


def test_a_loaded_model_and_its_skeleton_are_estimated_alike_and_stay_as_they_are(demo: Any) -> None:
    model = load(DEMO_FOLDER, "cpu", torch.float32)
    engine = Engine(model)
    wanted = request(64, 64, 5, prompt="a large red circle moving left on a black background", steps=2, seed=1, id="a")
    before = engine.generate([wanted])[0].frames
    rotary_table.cache_clear()
    model.family.forget()
    weights = {name: [w.clone() for w in part.parameters()] for name, part in model.family.parts.items()}

    sides = [Estimator(family, "exact", CPU) for family in (model.family, demo)]
    plans = [side.plan([wanted.for_model(demo.limits)] * 2) for side in sides]
    assert plans[0].step == plans[1].step and plans[0].decode == plans[1].decode
    assert plans[0].weights == pytest.approx(dict(plans[1].weights), rel=0.01)

    for name, part in model.family.parts.items():
        assert all(torch.equal(a, b) for a, b in zip(weights[name], part.parameters(), strict=True)), name
    after = Engine(model).generate([wanted])[0].frames
    assert (before == after).all()


# -- HunyuanVideo in full, against formulas that were derived from its code by hand ----------------

FORMULAS = {
    ("exact", 1): 9617807360,
    ("exact", 2): 11128489984,
    ("exact", 4): 14149855232,
    ("packed", 1): 9617807360,
    ("packed", 2): 19174789120,
    ("packed", 4): 38288752640,
}
"""Bytes of a step at 720×1280, 129 frames, bfloat16, by isolation and batch size."""
TILED_DECODE = 4239038464
"""And of decoding in tiles."""


@pytest.fixture(scope="module")
def full() -> Any:
    return from_published(HUNYUANVIDEO_13B, Precision.parse("bfloat16", CUDA), CUDA)


@pytest.mark.parametrize("isolation", ["exact", "packed"])
def test_the_13b_step_agrees_with_the_formulas(full: Any, isolation: Any) -> None:
    estimator = Estimator(full, isolation, CUDA)
    one = request(720, 1280, 129)
    for batch in (1, 2, 4):
        assert estimator.step_tensors([one] * batch) == pytest.approx(FORMULAS[isolation, batch], rel=0.0001)


def test_the_13b_decode_agrees_with_the_formulas(full: Any) -> None:
    estimator = Estimator(full, "exact", CUDA)
    assert estimator._trace_decode(request(720, 1280, 129)) == pytest.approx(TILED_DECODE, rel=0.01)


def test_weights_of_the_13b(full: Any) -> None:
    estimator = Estimator(full, "exact", CUDA)
    sizes = {name: network_bytes(part) for name, part in full.parts.items()}
    assert sizes["transformer"] == 2 * 12_821_012_544
    assert set(estimator.weights().values()) == {sum(sizes.values())}
    component, block = estimator.weights("component"), estimator.weights("block")
    assert component["text"] == sizes["text_encoder"] + sizes["text_encoder_2"]
    assert component["step"] == sizes["transformer"] and component["decode"] == sizes["vae"] == block["decode"]
    assert block["step"] < component["step"] / 8 and block["text"] < component["text"] / 4
    int8 = from_published(HUNYUANVIDEO_13B, Precision.parse("int8", CUDA), CUDA)
    assert network_bytes(int8.parts["transformer"]) == pytest.approx(sizes["transformer"] / 2, rel=0.05)
    one = request(256, 256, 17)
    written_out = Estimator(int8, "exact", CUDA).step_tensors([one]) - estimator.step_tensors([one])
    assert written_out >= 5 * 3072**2 * 2  # the weights of the widest layer, in full while it works
