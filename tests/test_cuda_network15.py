"""HunyuanVideo 1.5's network on a fake CUDA device: no wait in a forward, no more kernels than stated."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from fake_cuda import CUDA, Trace, weightless
from test_cuda_network import check_no_wait, packs_of, second

from reelbatch.models.hunyuan_video15.branch import Branch
from reelbatch.models.hunyuan_video15.transformer import HunyuanVideo15Transformer3DModel

SIZE = (65, 3, 30, 52)
"""9 frames of 480 × 832 pixels."""
KERNELS = {"exact": 258, "packed": 176}
"""At most, for two branches and one block. Measured were 248 and 166."""

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=CUDA)


def make() -> HunyuanVideo15Transformer3DModel:
    """As wide as the published network, with fewer blocks."""
    model = weightless(lambda: HunyuanVideo15Transformer3DModel(num_layers=1))
    return model.eval().requires_grad_(False)


def branches_of(model: HunyuanVideo15Transformer3DModel, count: int) -> list[Branch]:
    config = model.config
    return [
        Branch(
            empty(*SIZE),
            empty(30 + i, config.text_embed_dim),
            empty(dtype=torch.float32),
            glyphs=empty(9, config.text_embed_2_dim) if i % 2 else None,
            image=empty(729, config.image_embed_dim) if i % 3 == 1 else None,
        )
        for i in range(count)
    ]


def test_a_forward_waits_for_nothing_and_launches_as_many_kernels_as_its_blocks(cuda: Trace) -> None:
    model = make()
    branches = branches_of(model, 2)
    for isolation, kernels in KERNELS.items():
        velocities = second(cuda, partial(model, packs=packs_of(branches, isolation)))
        check_no_wait(cuda)
        assert [tuple(v.shape) for pack in velocities for v in pack] == [(32, *SIZE[1:])] * 2
        assert cuda.launches <= kernels, cuda.kernels


def test_diffusers_padded_signature_waits_for_nothing_once_its_masks_are_known(cuda: Trace) -> None:
    model, batch = make(), 2
    config = model.config
    given = {
        "hidden_states": empty(batch, *SIZE),
        "timestep": empty(batch),
        "encoder_hidden_states": empty(batch, 100, config.text_embed_dim),
        "encoder_attention_mask": empty(batch, 100),
        "encoder_hidden_states_2": empty(batch, 25, config.text_embed_2_dim),
        "encoder_attention_mask_2": empty(batch, 25),
        "image_embeds": empty(batch, 729, config.image_embed_dim),
    }
    sample = second(cuda, lambda: model(**given).sample)
    check_no_wait(cuda)
    assert sample.shape == (batch, 32, *SIZE[1:])
    assert sample.device.type == "cuda"
