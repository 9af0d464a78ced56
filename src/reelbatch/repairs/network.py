"""Diffusers' transformers, repaired: their modules become ours where they stand, around their own parameters.

Our names of parameters are those of Diffusers, so only the classes change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from diffusers.models import attention_processor, normalization
from diffusers.utils.torch_utils import is_compiled_module
from torch import nn

from reelbatch.attention import AUTO
from reelbatch.models import layers
from reelbatch.models.linear import FewRowsLinear
from reelbatch.models.packed import DIFFUSERS_BACKENDS
from reelbatch.repairs.fix import CannotRepair, Undo, require_source
from reelbatch.repairs.reclass import reclass_all, stands_in


class _NoProcessors:
    """What Diffusers offers on its attention processors, of which a repaired transformer has none in use."""

    def set_attn_processor(self, processor: Any) -> None:
        raise NotImplementedError(
            "A repaired transformer computes its attention itself, so a processor would have no effect. Choose a "
            "kernel with set_attention_backend, or call reelbatch.restore(pipe) first."
        )

    def fuse_qkv_projections(self) -> None:
        raise NotImplementedError(
            "A repaired transformer has no fused projections: call reelbatch.restore(pipe) first."
        )


def stand_in(our: type, their: type, *bases: type) -> type:
    """Our class under the name of Diffusers' and derived from both."""
    return stands_in(type(their.__name__, (*bases, our, their), {}))


def transformer_stand_in(our: type, their: Any) -> Any:
    """`stand_in` for a whole transformer."""
    transformer: Any = stand_in(our, their, _NoProcessors)
    for names in ("_repeated_blocks", "_no_split_modules"):  # blocks go by the names of the classes they stand in for
        setattr(transformer, names, getattr(their, names))
    return transformer


MODULATIONS: dict[type, type] = {
    their: stand_in(layers.Modulation, their)
    for their in (normalization.AdaLayerNormZero, normalization.AdaLayerNormContinuous)
}
REFINER_ATTENTION = stand_in(layers.RefinerAttention, attention_processor.Attention)
JOINT_ATTENTION = stand_in(layers.JointAttention, attention_processor.Attention)

Sources = tuple[tuple[type, str, str], ...]

# What the repair was written for: the source of these methods, by SHA-256, in Diffusers 0.42.1
MODULATION_SOURCE: Sources = (
    (normalization.AdaLayerNormZero, "forward", "93374820c014f8127713d1ba0a6be6bba27e7040238781fd56e42e87bb5366cb"),
    (
        normalization.AdaLayerNormContinuous,
        "forward",
        "da3e50ebcd024fc2040e7e4afc211c8717142198b743486e507c0770fa4b2909",
    ),
)
ATTENTION_SOURCE: Sources = (
    (attention_processor.Attention, "forward", "e6822ac3500626c7318b56f135752693a1222976154cbcc8c2e6b5f840d82b6b"),
    (
        attention_processor.AttnProcessor2_0,
        "__call__",
        "bf23ea5ae40404272695b752532af4cef782d7626168f17e9f0d6652a941dd67",
    ),
)


@dataclass(frozen=True)
class Network:
    """Which classes of a transformer of Diffusers become which.

    Args:
        their: the transformer's class.
        stand_ins: new classes by Diffusers' own, the transformer's among them.
        processor: of the joint attention; the refiner has `AttnProcessor2_0`.
        source: of all methods that are replaced.
    """

    their: Any
    stand_ins: Mapping[type, type]
    processor: type
    source: Sources

    @property
    def processors(self) -> dict[type, type]:
        return {JOINT_ATTENTION: self.processor, REFINER_ATTENTION: attention_processor.AttnProcessor2_0}

    def repair(self, transformer: Any) -> Undo:
        """Raises `CannotRepair`, with nothing changed, for a transformer or a Diffusers that is not as expected."""
        require_source(self.source)
        if type(transformer) is not self.their:
            raise CannotRepair(
                f"the transformer is a {_class_name(transformer)}; the repair is for {self.their.__name__}. "
                "Nothing was changed."
            )
        backend = _attention_backend(transformer)
        modules = self._changes(transformer)
        self._refuse_processors(modules)
        undo = reclass_all((module, new_class) for _, module, new_class in modules)
        vars(transformer)["attention_backend"] = backend
        return partial(_restore, transformer, undo)

    def _changes(self, transformer: nn.Module) -> list[tuple[str, nn.Module, type]]:
        """Name, module and new class of every module whose class changes."""
        changes: list[tuple[str, nn.Module, type]] = []
        kinds = (*self.stand_ins, attention_processor.Attention)
        for name, module in transformer.named_modules():
            their = next((kind for kind in kinds if isinstance(module, kind)), None)
            if their is None:
                continue
            if type(module) is not their:
                raise CannotRepair(f"{name} is a {_class_name(module)}, not a {their.__name__}. Nothing was changed.")
            if their is attention_processor.Attention:
                attention = REFINER_ATTENTION if name.startswith("context_embedder.") else JOINT_ATTENTION
                changes.append((name, module, attention))
                continue
            changes.append((name, module, self.stand_ins[their]))
            product = getattr(module, "linear", None)
            if issubclass(self.stand_ins[their], layers.Modulation) and type(product) is nn.Linear:
                changes.append((f"{name}.linear", product, FewRowsLinear))
        return changes

    def _refuse_processors(self, modules: Sequence[tuple[str, nn.Module, type]]) -> None:
        """Refuse attention that another processor computes than the one that Diffusers gives it."""
        for attention, expected in self.processors.items():
            others = {
                name: _class_name(module.processor)
                for name, module, new_class in modules
                if new_class is attention and type(module.processor) is not expected
            }
            if others:
                raise CannotRepair(
                    f"found the attention processor {' and '.join(sorted(set(others.values())))} where "
                    f"{expected.__name__} was expected. Put Diffusers' own back first, with {expected.__name__} of "
                    f"{expected.__module__}: for name in {list(others)}: "
                    f"pipe.transformer.get_submodule(name).set_processor({expected.__name__}()). Nothing was changed."
                )


def original(module: Any) -> Any:
    """The module itself, where `torch.compile` has wrapped it."""
    return module._orig_mod if module is not None and is_compiled_module(module) else module


def _restore(transformer: Any, undo: Undo) -> None:
    undo()
    vars(transformer).pop("attention_backend", None)


def _class_name(instance: object) -> str:
    return f"{type(instance).__module__}.{type(instance).__qualname__}"


def _attention_backend(transformer: nn.Module) -> str:
    """Ours for the backend that was set on the attention processors."""
    for module in transformer.modules():
        chosen = getattr(getattr(module, "processor", None), "_attention_backend", None)
        if chosen is not None:
            name = str(getattr(chosen, "value", chosen))
            if name not in DIFFUSERS_BACKENDS:
                raise CannotRepair(
                    f"the attention backend {name!r} is set, which the repair does not have: call "
                    "pipe.transformer.reset_attention_backend() first. Nothing was changed."
                )
            return DIFFUSERS_BACKENDS[name]
    return AUTO
