"""Every video of a batch is the one that its request gives alone."""

from __future__ import annotations

import functools

import pytest
import torch
from pipelines import PROMPTS, SEEDS, batch, difference, frames, generate, with_transformer

import reelbatch
from reelbatch.repairs import hunyuan_video

CFG = {"negative_prompt": "blurry", "true_cfg_scale": 3.0}


def test_exact_is_bit_for_bit(demo):
    reelbatch.repair(demo)
    alone = torch.cat([batch(demo, [i], make=frames) for i in range(4)])
    assert torch.equal(batch(demo, [0, 1, 2, 3], make=frames), alone)


@pytest.mark.parametrize("options", [{}, CFG, {"output_type": "pt"}], ids=["plain", "cfg", "frames"])
def test_exact_whoever_else_is_there(pipe, options):
    reelbatch.repair(pipe)
    alone = [batch(pipe, [i], **options)[0] for i in range(4)]
    for order in ([3, 1, 2, 0], [2, 0], [1, 1, 3]):
        found = batch(pipe, order, **options)
        assert all(torch.equal(video, alone[i]) for video, i in zip(found, order, strict=True))


def test_exact_in_bfloat16(pipe):
    pipe.transformer.to(torch.bfloat16)
    reelbatch.repair(pipe)
    alone = torch.cat([batch(pipe, [i]) for i in range(4)])
    assert torch.equal(batch(pipe, [0, 1, 2, 3]), alone)


@pytest.mark.parametrize("options", [{}, CFG], ids=["plain", "cfg"])
def test_packed_is_the_same_to_rounding(pipe, options):
    reelbatch.repair(pipe, isolation="packed")
    alone = torch.cat([batch(pipe, [i], **options) for i in range(4)])
    assert difference(batch(pipe, [0, 1, 2, 3], **options), alone) <= 1e-5


def test_packed_on_the_demo(demo):
    reelbatch.repair(demo, isolation="packed")
    latents = functools.partial(frames, output_type="latent")
    alone = torch.cat([batch(demo, [i], make=latents) for i in range(4)])
    assert difference(batch(demo, [0, 1, 2, 3], make=latents), alone) <= 1e-5


def test_isolation_is_of_the_pipeline(pipe, monkeypatch):
    packs = []
    monkeypatch.setattr(
        hunyuan_video.Transformer,
        "_packs",
        lambda self, given: packs.append(len(given)) or type(self).__mro__[2]._packs(self, given),
    )
    shared = with_transformer(pipe, pipe.transformer)
    reelbatch.repair(pipe, isolation="packed")
    reelbatch.repair(shared)
    for of in (pipe, shared):
        generate(of, PROMPTS, SEEDS, num_inference_steps=1)
    assert packs == [1, 4]
    reelbatch.repair(pipe)  # again, to set it anew
    generate(pipe, PROMPTS, SEEDS, num_inference_steps=1)
    assert packs[2:] == [4]
    with pytest.raises(ValueError, match="isolation is 'pack'; it must be 'exact' or 'packed'"):
        reelbatch.repair(pipe, isolation="pack")


def test_every_text_is_read_alone_and_once(pipe, monkeypatch):
    reelbatch.repair(pipe)
    reads = []
    forward = type(pipe.text_encoder).forward
    monkeypatch.setattr(
        type(pipe.text_encoder),
        "forward",
        lambda self, input_ids, **options: reads.append(len(input_ids)) or forward(self, input_ids, **options),
    )
    generate(pipe, [PROMPTS[0], PROMPTS[1], PROMPTS[0]], SEEDS[:3], num_inference_steps=1)
    assert reads == [1, 1]
