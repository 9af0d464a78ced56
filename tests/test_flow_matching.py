"""The training loss: a pack of samples of any size learns what its samples alone would."""

from __future__ import annotations

import pytest
import tiny
import torch

from reelbatch.models.hunyuan_video import HunyuanVideoTransformer3DModel
from reelbatch.models.text import Conditioning
from reelbatch.train.flow_matching import Example, flow_matching_loss, shifted_sigmas

CONFIG = tiny.transformer_config()


def model() -> HunyuanVideoTransformer3DModel:
    network = HunyuanVideoTransformer3DModel(**CONFIG)
    network.load_state_dict(tiny.transformer().state_dict())
    return network


def example(seed: int, frames: int, text: int) -> Example:
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(CONFIG["in_channels"], frames, 4, 6, generator=generator)
    states = torch.randn(text, CONFIG["text_embed_dim"], generator=generator)
    return Example(latents, Conditioning(states, torch.randn(CONFIG["pooled_projection_dim"], generator=generator)))


def test_the_gradient_of_a_pack_is_the_sum_of_the_gradients_of_its_samples() -> None:
    examples = [example(i, frames=1 + i, text=3 + 4 * i) for i in range(3)]
    sigmas, guidance = torch.tensor([0.2, 0.6, 0.9]), torch.tensor([1.0, 6.0, 3.0])
    together, apart = model(), model()
    losses = flow_matching_loss(together, examples, sigmas, guidance, torch.Generator().manual_seed(1))
    losses.sum().backward()
    noise = torch.Generator().manual_seed(1)  # one after another, the samples draw the same noise
    for i, one in enumerate(examples):
        loss = flow_matching_loss(apart, [one], sigmas[i : i + 1], guidance[i : i + 1], noise)
        torch.testing.assert_close(loss[0], losses[i], rtol=1e-5, atol=1e-6)
        loss.sum().backward()
    for pair in zip(together.parameters(), apart.parameters(), strict=True):
        gradients = [parameter.grad for parameter in pair]
        assert gradients[0] is not None
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5 * float(gradients[0].abs().max()) + 1e-7)


def test_the_target_is_the_velocity_from_the_clip_to_the_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network that knows the answer has no loss: at sigma 1 it sees the noise itself."""
    network, one = model(), example(0, frames=2, text=3)

    def knowing(packs, **kwargs):
        return [[branch.latents - one.latents for branch in pack] for pack in packs]

    monkeypatch.setattr(network, "forward", knowing)
    sigmas, guidance = torch.ones(1), torch.ones(1)
    assert flow_matching_loss(network, [one], sigmas, guidance, torch.Generator().manual_seed(0)).item() == 0


def test_sigmas_follow_the_shift() -> None:
    plain = shifted_sigmas(10_000, 1.0, torch.Generator().manual_seed(0), torch.device("cpu"))
    shifted = shifted_sigmas(10_000, 3.0, torch.Generator().manual_seed(0), torch.device("cpu"))
    torch.testing.assert_close(shifted, 3 * plain / (1 + 2 * plain))
    assert abs(plain.mean().item() - 0.5) < 0.02
