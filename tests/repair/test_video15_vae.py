"""The repaired HunyuanVideo 1.5 VAE: samples of a batch are as alone."""

from __future__ import annotations

import copy

import pytest
import torch
from video15 import differences, repair


@pytest.mark.parametrize("tiling", [False, True], ids=["whole", "tiles"])
@torch.no_grad()
def test_decode_and_encode_equal_solo(vae, tiling):
    if tiling:
        vae.enable_tiling(16, 16, 4, 4, 0.5)
    latents, video = torch.randn(4, 4, 4, 6, 5), torch.randn(4, 3, 5, 24, 20)
    expected_video = torch.cat([vae.decode(one).sample for one in latents.split(1)])
    expected_moments = torch.cat([vae.encode(one).latent_dist.parameters for one in video.split(1)])
    repair(vae=vae)
    assert max(differences(vae.decode(latents).sample, expected_video)) <= 1e-5
    assert max(differences(vae.encode(video).latent_dist.parameters, expected_moments)) <= 1e-5


@torch.no_grad()
def test_unrepaired_raises(vae):
    with pytest.raises(RuntimeError, match="doesn't match the broadcast shape"):
        vae.decode(torch.randn(2, 4, 2, 4, 4))
    with pytest.raises(RuntimeError, match="doesn't match the broadcast shape"):
        vae.encode(torch.randn(2, 3, 3, 16, 16))


@torch.no_grad()
def test_no_mask(vae, attention_calls):
    repair(vae=vae)
    vae.decode(torch.randn(2, 4, 3, 4, 4))
    assert attention_calls == [(None, 2, 16, 16 * frames) for frames in (1, 2, 3)]


def test_gradients_are_those_of_the_solo_runs(vae):
    latents, unrepaired = torch.randn(2, 4, 3, 4, 4), copy.deepcopy(vae)
    repair(vae=vae)
    vae.decode(latents).sample.square().sum().backward()
    torch.cat([unrepaired.decode(one).sample for one in latents.split(1)]).square().sum().backward()
    found, expected = ([p.grad for p in model.decoder.parameters()] for model in (vae, unrepaired))
    largest = max(grad.abs().max() for grad in expected)
    assert all((a - b).abs().max() <= 1e-5 * largest for a, b in zip(found, expected, strict=True))
