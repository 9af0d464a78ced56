"""The samples of a training run: what is drawn for each, from its own number alone, and what the network is told."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from reelbatch.geometry import Geometry
from reelbatch.models.hunyuan_video.family import HunyuanVideo
from reelbatch.request import ModelLimits, RequestDefaults
from reelbatch.train.cache import Encoded
from reelbatch.train.config import make_config
from reelbatch.train.data import Clip
from reelbatch.train.dataset import Dataset
from reelbatch.train.flow_matching import Example, flow_matching_loss, shift
from reelbatch.train.samples import Samples

NUMBERS = range(400)


class Encodings:
    """A caption's rows are as many as it has characters."""

    def caption(self, text: str) -> dict[str, torch.Tensor]:
        return {"text": torch.zeros(len(text), 2), "pooled": torch.zeros(2)}

    def clip(self, clip: Clip) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return torch.zeros(1, 1, 4, 4), {"image": torch.zeros(3, 2)}


def samples(**changes: Any) -> Samples:
    """Of three clips of 4, 16 and 64 tokens in two wordings, of a model whose own size has 12 tokens and shift 3."""
    clips = tuple(Encoded(Clip(Path(str(tokens)), ("a", "a cat")), (1, 1, 4, 4), tokens, 5) for tokens in (4, 16, 64))
    limits = ModelLimits(16, 4, RequestDefaults(frames=9, height=32, width=32))
    family: Any = SimpleNamespace(flow_shift=3.0, limits=limits, geometry=Geometry(1, spatial=8, temporal=4, patch=2))
    encoded: Any = Encodings()
    return Samples(make_config(changes), Dataset(clips, clips[:2], (), encoded), family)


def test_a_sample_is_the_same_by_its_number_and_seed_and_no_other_is() -> None:
    drawn = [samples(guidance_max=8.0).draw(number) for number in NUMBERS]
    again = samples(guidance_max=8.0)
    for number in reversed(NUMBERS[:20]):  # in any order
        found = again.draw(number)
        assert torch.equal(found.noise, drawn[number].noise) and found.sigma == drawn[number].sigma
        assert found.guidance == drawn[number].guidance
    for name in ("sigma", "guidance"):
        assert len({float(getattr(one, name)) for one in drawn}) > 390
    assert len({float(one.noise.sum()) for one in drawn}) > 390
    assert all(1 <= float(one.guidance) <= 8 for one in drawn)
    other = samples(guidance_max=8.0, seed=1).draw(0)
    assert other.sigma != drawn[0].sigma and not torch.equal(other.noise, drawn[0].noise)
    assert {float(samples().draw(number).guidance) for number in NUMBERS[:9]} == {1.0}


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_share_of_samples_is_without_caption_and_the_others_have_any_of_the_wordings(share: float) -> None:
    found = samples(caption_dropout=share)
    rows = [len(found.draw(number).example.conditioning["text"]) for number in NUMBERS]
    assert rows.count(0) / len(rows) == pytest.approx(share, abs=0.08 * (0 < share < 1))
    for wording in ("a", "a cat"):
        assert rows.count(len(wording)) / len(rows) == pytest.approx((1 - share) / 2, abs=0.08 * (share < 1))


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_a_share_of_samples_is_shown_without_first_frame_and_is_else_the_same(share: float) -> None:
    one, other = samples(image_dropout=share), samples(image_dropout=0.0)
    shown = ["image" in one.draw(number).example.conditioning for number in NUMBERS]
    assert shown.count(False) / len(shown) == pytest.approx(share, abs=0.08 * (0 < share < 1))
    for number in reversed(NUMBERS[:20]):
        found, expected = one.draw(number), other.draw(number)
        assert torch.equal(found.noise, expected.noise) and found.sigma == expected.sigma
        assert ("image" in found.example.conditioning) == shown[number]  # drawn again, in another order
    assert ("image" in one.draw_held_out(0, 0).example.conditioning) == (share < 1)


def test_levels_are_shifted_as_the_model_or_the_config_says_or_by_size() -> None:
    levels = [samples(flow_shift=1.0).draw(number).sigma for number in NUMBERS]
    assert float(torch.stack(levels).mean()) == pytest.approx(0.5, abs=0.05)
    by_size = samples(shift_by_size=True)
    for number in NUMBERS[:9]:
        torch.testing.assert_close(samples().draw(number).sigma, shift(levels[number], 3.0))
        torch.testing.assert_close(samples(flow_shift=5.0).draw(number).sigma, shift(levels[number], 5.0))
        own = 3.0 * math.sqrt(by_size.of(number).video_tokens / 12)
        torch.testing.assert_close(by_size.draw(number).sigma, shift(levels[number], own))
    normal = torch.stack(
        [samples(timesteps="logit-normal", logit_mean=1.0, flow_shift=1.0).draw(number).sigma for number in NUMBERS]
    )
    assert float(normal.logit().mean()) == pytest.approx(1.0, abs=0.2)
    assert float(normal.logit().std()) == pytest.approx(1.0, abs=0.2)


def test_every_epoch_has_every_clip_once_in_an_order_of_its_own() -> None:
    found = samples()
    epochs = [tuple(found.of(3 * epoch + i).video_tokens for i in range(3)) for epoch in range(20)]
    assert {tuple(sorted(epoch)) for epoch in epochs} == {(4, 16, 64)} and len(set(epochs)) > 2


def test_packs_hold_what_fits_and_one_at_least() -> None:
    assert [len(samples().pack(0)), len(samples(batch_size=7).pack(0))] == [4, 7]
    found = samples(batch_tokens=40)
    for first in range(6):
        pack = found.pack(first)
        rows = [found.of(number).tokens for number in (*pack, pack.stop)]
        assert sum(rows[:-1]) <= 40 or len(pack) == 1
        assert sum(rows) > 40  # no further one would have fitted
    held_out = samples(batch_size=4).held_out()
    assert [len(pack) for pack in held_out] == [4, 4, 2]
    assert [one for pack in held_out for one in pack] == [(clip, level) for clip in (0, 1) for level in range(5)]


def test_the_network_is_told_each_samples_level_and_guidance() -> None:
    given = []

    def network(packs: list[list[Any]]) -> list[list[torch.Tensor]]:
        given.extend(packs[0])
        return [[branch.latents for branch in packs[0]]]

    ones = [torch.ones(1, 1, 2, 2)] * 2
    examples = [Example(2 * one, {"text": torch.zeros(1, 2), "pooled": torch.zeros(2)}) for one in ones]
    sigmas, guidance = torch.tensor([0.25, 0.5]), torch.tensor([1.0, 6.0])
    losses = flow_matching_loss(network, HunyuanVideo.training_branch, examples, sigmas, guidance, ones)
    assert [float(branch.timestep) for branch in given] == [250.0, 500.0]
    assert [float(branch.guidance) for branch in given] == [1000.0, 6000.0]
    assert [float(branch.latents.mean()) for branch in given] == [1.75, 1.5]
    # what was given is (1 - sigma) 2 + sigma 1, what is asked for is 1 - 2
    assert losses.tolist() == [2.75**2, 2.5**2]
