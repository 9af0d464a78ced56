"""A repair of HunyuanVideo 1.5 can be taken back, and refuses what it does not know."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    AutoencoderKLHunyuanVideo15,
    HunyuanVideo15Transformer3DModel,
)
from diffusers.models.transformers.transformer_hunyuan_video15 import HunyuanVideo15AttnProcessor2_0
from video15 import mixed_batch, repair, run

from reelbatch.repairs import hunyuan_video15, hunyuan_video15_pipeline
from reelbatch.repairs.fix import CannotRepair, same_source, source_digest


def classes(model: torch.nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


@torch.no_grad()
def test_transformer_is_what_it_was(transformer):
    batch = {name: tensor[:1] for name, tensor in mixed_batch().items()}
    before, state = run(transformer, batch), {n: p.data_ptr() for n, p in transformer.named_parameters()}
    found, processors = classes(transformer), transformer.attn_processors
    undo = repair(transformer=transformer)
    assert classes(transformer) != found
    assert hunyuan_video15.faults(SimpleNamespace(transformer=transformer, vae=None)) == []
    assert {n: p.data_ptr() for n, p in transformer.named_parameters()} == state
    undo()
    assert classes(transformer) == found
    assert all(transformer.attn_processors[name] is processor for name, processor in processors.items())
    assert torch.equal(run(transformer, batch), before)
    assert len(hunyuan_video15.faults(SimpleNamespace(transformer=transformer, vae=None))) == 1


@torch.no_grad()
def test_vae_is_what_it_was(vae):
    latents = torch.randn(1, 4, 3, 4, 4)
    before, found = vae.decode(latents).sample, classes(vae)
    undo = repair(vae=vae)
    assert classes(vae) != found
    assert hunyuan_video15.faults(SimpleNamespace(transformer=None, vae=vae)) == []
    undo()
    assert classes(vae) == found
    assert torch.equal(vae.decode(latents).sample, before)


def test_names_stay(transformer, vae, tmp_path):
    repair(transformer=transformer)
    repair(vae=vae)
    for model, expected in (
        (transformer, HunyuanVideo15Transformer3DModel),
        (vae, AutoencoderKLHunyuanVideo15),
    ):
        model.save_pretrained(tmp_path)
        assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == expected.__name__
        again = type(model).from_pretrained(tmp_path)
        assert type(again) is expected
        assert isinstance(model, expected)
        assert str(type(model)) == str(expected)


SOURCES = hunyuan_video15.SOURCE + hunyuan_video15_pipeline.VAE_SOURCE


@pytest.mark.parametrize(("owner", "name", "digest"), SOURCES, ids=lambda value: getattr(value, "__name__", ""))
def test_changed_source(transformer, vae, monkeypatch, owner, name, digest):
    assert same_source(getattr(owner, name), digest)
    monkeypatch.setattr(owner, name, lambda *args, **kwargs: None)
    model = {"transformer": transformer} if (owner, name, digest) in SOURCES[:-2] else {"vae": vae}
    (found,) = (classes(module) for module in model.values())
    with pytest.raises(CannotRepair, match=rf"{owner.__name__}\.{name}"):
        repair(**model)
    assert [classes(module) for module in model.values()] == [found]


def test_unknown_processor(transformer):
    class Own(HunyuanVideo15AttnProcessor2_0):
        pass

    transformer.transformer_blocks[1].attn.set_processor(Own())
    found, processors = classes(transformer), transformer.attn_processors
    with pytest.raises(CannotRepair, match="Own"):
        repair(transformer=transformer)
    assert classes(transformer) == found
    assert transformer.attn_processors == processors


def test_unknown_class(vae):
    class Own(type(vae.decoder.mid_block.attentions[0])):
        pass

    vae.decoder.mid_block.attentions[0].__class__ = Own
    found = classes(vae)
    with pytest.raises(CannotRepair, match="Own"):
        repair(vae=vae)
    assert classes(vae) == found


def test_unknown_wrapper(transformer):
    forward = transformer.context_embedder.forward
    transformer.context_embedder.forward = lambda *args: forward(*args)
    found = classes(transformer)
    with pytest.raises(CannotRepair, match="wraps the forward of this HunyuanVideo15TokenRefiner"):
        repair(transformer=transformer)
    assert classes(transformer) == found


def test_source_that_is_not_there():
    assert source_digest(len) == source_digest(None) == ""
