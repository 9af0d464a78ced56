"""What a file or a folder of another layout is, for a person who asks before converting it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reelbatch.loading.checkpoints.convert import REST
from reelbatch.loading.checkpoints.kinds import KINDS, choose, possible
from reelbatch.loading.checkpoints.layouts import find
from reelbatch.loading.checkpoints.parts import config_of, recognise
from reelbatch.loading.checkpoints.scales import whole_weights
from reelbatch.loading.checkpoints.towers import encoders_of
from reelbatch.loading.checkpoints.weight_files import WeightFile, open_weights
from reelbatch.loading.families import LAYOUTS
from reelbatch.loading.lora_names import SPELLINGS
from reelbatch.loading.parameter_names import HUNYUAN_VIDEO, HUNYUAN_VIDEO_15, without_prefix


@dataclass(frozen=True)
class Explanation:
    """Attributes:
    about: a sentence. layout: in words. model: of the family, where it is known. kind: the published model's name.
    possible: names for `--as`, where several are possible. holds: components that are in it, and those beside it.
    stored_bytes: by dtype. config: what the shapes say. missing: components that are not there, and their sources.
    verdict: what can be done with it.
    """

    path: Path
    about: str
    layout: str
    model: str | None
    kind: str | None
    possible: tuple[str, ...]
    holds: tuple[str, ...]
    parameters: int
    stored_bytes: dict[str, int]
    config: dict[str, Any]
    missing: dict[str, str]
    verdict: str


def explain(path: Path, asked: str | None = None) -> Explanation:
    """What lies there; reads headers only.

    Raises:
        ModelFolderError: where it is nothing that is known, or is damaged.
    """
    if path.is_file() and (lora := _lora(path)):
        return lora
    found = find(path, asked)
    parts = recognise(whole_weights(found.weights, found.scales, None))
    count = sum(tensor.parameters for part in parts for tensor in part.file.tensors.values())
    holds = [part.component for part in parts]
    if found.vae is not None and "vae" not in holds:
        holds.append("vae")
    names = parts[0].names
    facts: dict[str, Any] = {
        "path": path,
        "layout": found.name,
        "model": names.model,
        "holds": (*holds, *encoders_of(found.towers)),
        "parameters": count,
        "stored_bytes": _stored_bytes(found.weights),
    }
    if "transformer" not in holds:
        verdict = "give it as --vae to reelbatch convert, with the file of a transformer"
        nothing: dict[str, Any] = {"kind": None, "possible": (), "config": {}, "missing": {}}
        return Explanation(**facts, **nothing, about=f"the VAE of {names.model}", verdict=verdict)
    config = config_of(parts[0])
    kinds = possible(names, config, path)
    if asked is not None or found.hint in {kind.name for kind in KINDS}:
        kinds = [choose(names, config, asked, found.hint, path)]
    runnable = [LAYOUTS[kind.pipeline] for kind in kinds if kind.pipeline in LAYOUTS]
    layout = runnable[0] if runnable else None
    kind = kinds[0] if len(kinds) == 1 else None
    about = f"the transformer of {names.model}" if kind is None else kind.about
    needed = [] if layout is None else [name for name in layout.classes if name in REST[names.model]]
    missing = {name: REST[names.model][name] for name in needed if name not in facts["holds"]}
    several = () if kind is not None else tuple(kind.name for kind in kinds)
    if layout is None:
        verdict = f"cannot run: it is {about}, which reelbatch does not run"
    else:
        which = f" --as NAME (one of {', '.join(several)})" if several else ""
        rest = f" --rest {layout.example}" if missing else ""
        verdict = f"cannot run as it is; make a model folder of it: reelbatch convert {path} OUT{which}{rest}"
    return Explanation(
        **facts,
        kind=None if kind is None else kind.name,
        possible=several,
        config=config,
        missing=missing,
        about=about,
        verdict=verdict,
    )


def _stored_bytes(file: WeightFile) -> dict[str, int]:
    sizes: Counter[str] = Counter()
    for tensor in file.tensors.values():
        sizes[tensor.dtype] += tensor.size
    return dict(sizes)


def _lora(path: Path) -> Explanation | None:
    """A file of a LoRA, of which it says for which model it is."""
    file = open_weights(path)
    layers = {
        without_prefix(name).removesuffix(end) for name in file.tensors for end in SPELLINGS if name.endswith(end)
    }
    if not layers or len(layers) < len(file.tensors) / 8:
        return None
    fits = {names.model: sum(layer in names.targets for layer in layers) for names in (HUNYUAN_VIDEO, HUNYUAN_VIDEO_15)}
    most = max(fits.values())
    models = [model for model, number in fits.items() if number == most and most]
    if not models:
        return None
    model = models[0] if len(models) == 1 else _by_width(file)
    return Explanation(
        path=path,
        about=f"a LoRA of {model or ' or '.join(models)}, for {most} layers",
        layout=f"one file ({file.format})",
        model=model,
        kind=None,
        possible=(),
        holds=("lora",),
        parameters=sum(tensor.parameters for tensor in file.tensors.values()),
        stored_bytes=_stored_bytes(file),
        config={},
        missing={},
        verdict=f"give it to a model: reelbatch generate PROMPT --model MODEL --lora {path}",
    )


def _by_width(file: WeightFile) -> str | None:
    """The model whose published width a LoRA's layers take."""
    for name, tensor in file.tensors.items():
        if "attn" in name and name.endswith(("lora_A.weight", "lora_down.weight")) and len(tensor.shape) == 2:
            for names in (HUNYUAN_VIDEO, HUNYUAN_VIDEO_15):
                if tensor.shape[1] == names.width:
                    return names.model
    return None
