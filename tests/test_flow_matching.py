"""The training loss: a pack of samples of any size learns what its samples alone would."""

from __future__ import annotations

import pytest
import tiny
import torch

from reelbatch.models.hunyuan_video.family import HunyuanVideo
from reelbatch.models.hunyuan_video.transformer import HunyuanVideoTransformer3DModel
from reelbatch.train.flow_matching import Example, draw_sigmas, flow_matching_loss, shift

CONFIG = tiny.transformer_config()
BRANCH = HunyuanVideo.training_branch


def model() -> HunyuanVideoTransformer3DModel:
    network = HunyuanVideoTransformer3DModel(**CONFIG)
    network.load_state_dict(tiny.transformer().state_dict())
    return network


def example(seed: int, frames: int, text: int) -> Example:
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(CONFIG["in_channels"], frames, 4, 6, generator=generator)
    states = torch.randn(text, CONFIG["text_embed_dim"], generator=generator)
    return Example(
        latents, {"text": states, "pooled": torch.randn(CONFIG["pooled_projection_dim"], generator=generator)}
    )


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_gradient_of_a_pack_is_the_sum_of_the_gradients_of_its_samples(checkpointing: bool) -> None:
    examples = [example(i, frames=1 + i, text=3 + 4 * i) for i in range(3)]
    sigmas, guidance = torch.tensor([0.2, 0.6, 0.9]), torch.tensor([1.0, 6.0, 3.0])
    noise = [torch.randn_like(one.latents) for one in examples]
    together, apart = model(), model()
    if checkpointing:
        together.train().enable_gradient_checkpointing()
    losses = flow_matching_loss(together, BRANCH, examples, sigmas, guidance, noise)
    losses.sum().backward()
    for i, one in enumerate(examples):
        loss = flow_matching_loss(apart, BRANCH, [one], sigmas[i : i + 1], guidance[i : i + 1], noise[i : i + 1])
        torch.testing.assert_close(loss[0], losses[i], rtol=1e-5, atol=1e-6)
        loss.sum().backward()
    for pair in zip(together.parameters(), apart.parameters(), strict=True):
        gradients = [parameter.grad for parameter in pair]
        assert gradients[0] is not None and gradients[1] is not None
        assert (gradients[0] - gradients[1]).norm() <= 1e-5 * gradients[1].norm() + 1e-8


def test_the_target_is_the_velocity_from_the_clip_to_the_noise() -> None:
    """A network that knows the answer has no loss: at sigma 1 it sees the noise itself."""
    one = example(0, frames=2, text=3)

    def knowing(packs):
        return [[branch.latents - one.latents for branch in pack] for pack in packs]

    noise = [torch.randn_like(one.latents)]
    assert flow_matching_loss(knowing, BRANCH, [one], torch.ones(1), torch.ones(1), noise).item() == 0
    assert flow_matching_loss(knowing, BRANCH, [one], torch.full((1,), 0.5), torch.ones(1), noise).item() > 0


def test_levels_are_drawn_as_asked_and_follow_the_shift() -> None:
    def generator() -> torch.Generator:
        return torch.Generator().manual_seed(0)

    plain = draw_sigmas(10_000, generator())
    assert abs(plain.mean().item() - 0.5) < 0.02 and plain.min() >= 0 and plain.max() <= 1
    torch.testing.assert_close(shift(plain, 3.0), 3 * plain / (1 + 2 * plain))
    normal = draw_sigmas(10_000, generator(), logit_normal=True, mean=1.0, std=0.5)
    assert abs(normal.logit().mean().item() - 1.0) < 0.02
    assert abs(normal.logit().std().item() - 0.5) < 0.02
