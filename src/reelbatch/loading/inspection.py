"""What a model folder holds, and what is wrong with it: from its JSON files and the headers of its weight files.

A folder has model_index.json and a folder for each of its family's components (`Layout.classes`). A `reelbatch.json`
beside them is optional (`FolderProfile`).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from reelbatch.device import choose_device, device_memory_bytes
from reelbatch.loading.families import LAYOUTS
from reelbatch.loading.hub import REAL_MODEL, ModelFolderError, model_name
from reelbatch.loading.layout import Layout
from reelbatch.loading.precision import Precision
from reelbatch.memory.placement import Offload
from reelbatch.models.prompts import PromptTemplate
from reelbatch.request import ModelLimits, RequestDefaults, RequestError, VideoRequest

CONFIG_FILES = {
    "scheduler": "scheduler_config.json",
    "guider": "guider_config.json",
    "feature_extractor": "preprocessor_config.json",
}
"""Components that are a configuration alone, and the file that it is in."""


class FolderProfile(BaseModel):
    """The optional `reelbatch.json` of a model folder: what cannot be read from the Diffusers layout.

    Attributes:
        about: a sentence for people.
        defaults: what requests get that leave something open.
        prompt_template: `template` and `crop_start`; None for HunyuanVideo's own.
        vocabulary: every word that the model knows; empty for a model that knows language.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    about: str = ""
    defaults: RequestDefaults = RequestDefaults()
    prompt_template: PromptTemplate | None = None
    vocabulary: tuple[str, ...] = ()

    @field_validator("defaults", mode="before")
    @classmethod
    def _known_defaults(cls, value: Any) -> Any:
        known = [field.name for field in fields(RequestDefaults)]
        if isinstance(value, dict) and (unknown := set(value) - set(known)):
            raise ValueError(f"no such default: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
        return value


@dataclass(frozen=True)
class ComponentInfo:
    """One component as stored. `parameters` and `stored_bytes` (by safetensors dtype) are of its weights, if any."""

    name: str
    class_name: str
    parameters: int = 0
    stored_bytes: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class ModelInfo:
    """What a model folder holds. `problems` says all that keeps it from being loaded, each with file and remedy."""

    folder: Path
    components: tuple[ComponentInfo, ...]
    limits: ModelLimits
    flow_shift: float
    profile: FolderProfile
    problems: tuple[str, ...]
    layout: Layout

    @property
    def name(self) -> str:
        return model_name(self.folder)

    @property
    def parameters(self) -> int:
        return sum(component.parameters for component in self.components)

    def weight_bytes(self, dtype: Precision | torch.dtype | str = "auto", device: torch.device | str = "auto") -> int:
        """Memory that the weights of all components take in `dtype`."""
        precision = Precision.parse(dtype, choose_device(device))
        return sum(precision.weight_bytes(component.name, component.parameters) for component in self.components)

    def fits(
        self,
        device: torch.device | str = "auto",
        dtype: Precision | torch.dtype | str = "auto",
        offload: Offload = "none",
    ) -> bool:
        """Whether the weights fit into the device's memory (what generating takes besides depends on the request).

        With an offload: those that must be there at once, and all of them where they wait, if that is the CPU.
        """
        device = choose_device(device)
        need = total = self.weight_bytes(dtype, device)
        if offload != "none":
            precision = Precision.parse(dtype, device)
            size = {part.name: precision.weight_bytes(part.name, part.parameters) for part in self.components}
            text, transformer = ("text_encoder", "text_encoder_2", "image_encoder"), ("transformer",)
            parts = [("vae",), text, transformer] if offload == "component" else [("vae",), text[1:]]
            need = max(sum(size.get(name, 0) for name in names) for names in parts)
            if device.type != "cpu" and total >= device_memory_bytes("cpu"):
                return False
        return need < device_memory_bytes(device)

    def verdict(self, device: torch.device | str = "auto", dtype: Precision | torch.dtype | str = "auto") -> str:
        """In a sentence: whether this model can run on the device."""
        device = choose_device(device)
        dtype = Precision.parse(dtype, device)
        if self.problems:
            return f"cannot run: {len(self.problems)} problem(s) with the folder"
        need, have = self.weight_bytes(dtype, device) / 2**30, device_memory_bytes(device) / 2**30
        sizes = f"the weights take {need:.2f} GiB in {dtype}, {device} has {have:.1f} GiB"
        if self.fits(device, dtype):
            return f"can run: {sizes}"
        if self.fits(device, dtype, "block"):
            return f"cannot run: {sizes}; offload, a dtype of fewer bytes or a larger device is needed"
        return f"cannot run: {sizes}; a dtype of fewer bytes or a larger device is needed"


def inspect(folder: str | Path) -> ModelInfo:
    """What `folder` holds; reads JSON files and the headers of weight files only.

    Raises:
        ModelFolderError: where nothing can be said: no folder, no model_index.json, another pipeline's folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ModelFolderError(f"{folder}: no such folder")
    reader = _Reader(folder)
    if not (folder / "model_index.json").is_file():
        raise ModelFolderError(f"{folder / 'model_index.json'}: missing. {_why_no_index(folder)}")
    index = reader.json("model_index.json")
    if reader.problems:
        raise ModelFolderError(reader.problems[0])
    layout = LAYOUTS.get(str(index.get("_class_name")))
    if layout is None:
        known = "; ".join(f"{name} ({known.makes}), such as {known.example}" for name, known in LAYOUTS.items())
        raise ModelFolderError(
            f"{folder / 'model_index.json'}: is a folder for {index.get('_class_name')}, but reelbatch runs {known}"
        )
    for part in sorted(folder.rglob("*.incomplete")):
        reader.problem(part, "is a download that did not finish; run the download again, it goes on where it stopped")

    components, configs = [], {}
    for name, classes in layout.classes.items():
        entry = index.get(name)
        class_name = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
        if class_name is None:
            listed = ", ".join(layout.classes)
            reader.problem("model_index.json", f"lists no {name}; the folder must hold all of {listed}")
        elif class_name not in classes:
            reader.problem("model_index.json", f"has {name} of class {class_name}; expected {classes[0]}")
        elif not (folder / name).is_dir():
            reader.problem(name, f"missing: the {name} that model_index.json lists; run the download again")
        else:
            counted: Counter[str] = Counter()
            stored: Counter[str] = Counter()
            if name in layout.weights:
                configs[name] = reader.json(f"{name}/config.json")
                counted, stored = reader.weights(name, layout.weights[name])
            elif name in CONFIG_FILES:
                configs[name] = reader.json(f"{name}/{CONFIG_FILES[name]}")
            else:
                reader.tokenizer(name, class_name)
            sizes = tuple(sorted(stored.items()))
            components.append(ComponentInfo(name, class_name, counted.total(), sizes))
    reader.architecture(configs, layout)

    profile, said = reader.profile()
    limits = layout.limits(configs, said)
    try:
        VideoRequest(prompt="-", **vars(limits.defaults)).for_model(replace(limits, advice=None))
    except RequestError as error:
        reader.problem("reelbatch.json", f"has defaults that the model cannot make: {error}")
    flow_shift = float(configs.get("scheduler", {}).get("shift", 1.0))
    return ModelInfo(folder, tuple(components), limits, flow_shift, profile, tuple(reader.problems), layout)


class _Reader:
    """Reads the files of a folder and collects what is wrong with them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.problems: list[str] = []

    def problem(self, path: str | Path, text: str) -> None:
        self.problems.append(f"{self.folder / path}: {text}")

    def json(self, path: str | Path) -> dict[str, Any]:
        """The JSON object in the file; an empty one, and a problem, if there is none."""
        try:
            content = json.loads((self.folder / path).read_text(encoding="utf-8"))
            if isinstance(content, dict):
                return content
            self.problem(path, "is no JSON object; get the file again")
        except FileNotFoundError:
            self.problem(path, "missing; run the download again")
        except (OSError, ValueError) as error:
            self.problem(path, f"cannot be read ({error}); get the file again")
        return {}

    def weights(self, component: str, file: str) -> tuple[Counter[str], Counter[str]]:
        """Parameters and bytes by dtype of a component's safetensors files, each checked for completeness."""
        parameters: Counter[str] = Counter()
        size: Counter[str] = Counter()
        base = self.folder / component / file
        single, index = base.with_suffix(".safetensors"), base.with_suffix(".safetensors.index.json")
        shards: dict[Path, set[str]] = {}
        if single.is_file():
            shards[single] = set()
        elif index.is_file():
            for tensor, shard in self.json(index).get("weight_map", {}).items():
                shards.setdefault(base.parent / shard, set()).add(tensor)
            if not shards:
                self.problem(index, "lists no files; get it again")
        else:
            others = ", ".join(sorted(file.name for file in base.parent.iterdir() if file.suffix in {".bin", ".pt"}))
            besides = f" (there is {others}, but only safetensors are read)" if others else ""
            self.problem(single, f"missing{besides}; run the download again")
        for shard, expected in shards.items():
            if not shard.is_file():
                self.problem(shard, f"missing: one of {len(shards)} files listed in {index.name}; download it again")
                continue
            try:
                header = _safetensors_header(shard)
            except ValueError as error:
                self.problem(shard, f"{error}; download it again")
                continue
            if absent := sorted(expected - header.keys()):
                self.problem(shard, f"lacks {len(absent)} tensors listed in {index.name}, such as {absent[0]}")
            for tensor in header.values():
                begin, end = tensor["data_offsets"]
                parameters[tensor["dtype"]] += int(torch.Size(tensor["shape"]).numel())
                size[tensor["dtype"]] += end - begin
        return parameters, size

    def tokenizer(self, component: str, class_name: str) -> None:
        folder = self.folder / component
        if class_name == "ByT5Tokenizer":  # has no vocabulary: its tokens are bytes
            return
        enough = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("tokenizer.model",))
        if not any(all((folder / file).is_file() for file in files) for files in enough):
            self.problem(component, "has neither tokenizer.json nor vocab.json with merges.txt; run the download again")

    def architecture(self, configs: dict[str, dict[str, Any]], layout: Layout) -> None:
        """Whether the components are those of the family and fit together."""
        for name, config in configs.items():
            class_name = config.get("_class_name") or next(iter(config.get("architectures") or ()), None)
            if class_name not in (None, *layout.classes[name]):
                file = CONFIG_FILES.get(name, "config.json")
                self.problem(f"{name}/{file}", f"is of class {class_name}; expected {layout.classes[name][0]}")
        for path, text in layout.problems(configs):
            self.problem(path, text)

    def profile(self) -> tuple[FolderProfile, dict[str, Any]]:
        """What `reelbatch.json` says, and which defaults."""
        path = "reelbatch.json"
        if not (self.folder / path).is_file():
            return FolderProfile(), {}
        content = self.json(path)
        try:
            profile = FolderProfile.model_validate(content)
        except ValidationError as error:
            for fault in error.errors():
                field = ".".join(str(part) for part in fault["loc"])
                self.problem(path, f"{field}: {fault['msg'].removeprefix('Value error, ')}; got {fault['input']!r}")
            return FolderProfile(), {}
        said = content.get("defaults", {})
        return profile, {name: getattr(profile.defaults, name) for name in said}


def _safetensors_header(file: Path) -> dict[str, dict[str, Any]]:
    """Name to {dtype, shape, data_offsets}. Raises ValueError if the file is not whole.

    Format: eight bytes with the header's length, the header (JSON), the data.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        if start == b"version ":
            raise ValueError("is a Git LFS pointer, not the weights (git lfs pull gets them)")
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > size - 8:
            raise ValueError(f"is cut short: {size} bytes, less than its header says")
        try:
            header: dict[str, dict[str, Any]] = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            expected = 8 + length + max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"has a damaged header ({error})") from None
    if size < expected:
        raise ValueError(f"is cut short: {size} of {expected} bytes")
    return header


def _why_no_index(folder: Path) -> str:
    if any(_first(folder.rglob(pattern)) for pattern in ("mp_rank_00_model_states*.pt", "hunyuan-video-t2v*")):
        return f"This looks like Tencent's own layout; reelbatch reads the Diffusers layout: get {REAL_MODEL}"
    if _first(folder.rglob("*.incomplete")):
        return "The download did not finish; run it again, it goes on where it stopped"
    return f"Give a model folder in the Diffusers layout, such as a download of {REAL_MODEL}"


def _first(paths: Iterator[Path]) -> Path | None:
    return next(paths, None)
