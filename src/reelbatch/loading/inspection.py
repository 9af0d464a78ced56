"""What a model folder holds, and what is wrong with it: from its JSON files and the headers of its weight files.

A folder has model_index.json and a folder for each of its family's components (`Layout.classes`). A `reelbatch.json`
beside them is optional (`FolderProfile`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from reelbatch.device import choose_device, device_memory_bytes
from reelbatch.loading.configs import build, check_config, code_faults, validation_faults
from reelbatch.loading.families import LAYOUTS
from reelbatch.loading.hub import REAL_MODEL, ModelFolderError, model_name
from reelbatch.loading.layout import OTHER_SCHEDULES, Layout, config_file
from reelbatch.loading.precision import Precision
from reelbatch.loading.stored import StoredTensor, differences, read_header
from reelbatch.memory.placement import Offload
from reelbatch.models.prompts import PromptTemplate
from reelbatch.outside_json import read_object
from reelbatch.request import ModelLimits, RequestDefaults, RequestError, VideoRequest
from reelbatch.wording import printable, shown, shown_line


class FolderProfile(BaseModel):
    """The optional `reelbatch.json` of a model folder: what cannot be read from the Diffusers layout.

    Attributes:
        about: a sentence for people.
        defaults: what requests get that leave something open.
        prompt_template: `template` and `crop_start`; None for HunyuanVideo's own.
        guidance: what a request's guidance is (`ModelLimits`), where it is not what the pipeline has: HunyuanVideo's
            own folders do not say that a transformer is SkyReels V1's.
        vocabulary: every word that the model knows; empty for a model that knows language.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    about: Annotated[str, Field(max_length=10_000)] = ""
    defaults: RequestDefaults = RequestDefaults()
    prompt_template: PromptTemplate | None = None
    guidance: Literal["embedded", "classifier-free"] | None = None
    vocabulary: Annotated[tuple[Annotated[str, Field(max_length=200)], ...], Field(max_length=100_000)] = ()

    @field_validator("defaults", mode="before")
    @classmethod
    def _known_defaults(cls, value: Any) -> Any:
        known = [field.name for field in fields(RequestDefaults)]
        if isinstance(value, dict) and (unknown := set(value) - set(known)):
            raise ValueError(f"no such default: {shown_line(', '.join(sorted(unknown)))}; there are {', '.join(known)}")
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
    try:
        return _inspect(folder)
    except OSError as error:
        raise ModelFolderError(f"{error.filename or folder}: cannot be read: {error.strerror or error}") from None


def _inspect(folder: Path) -> ModelInfo:
    if not folder.is_dir():
        raise ModelFolderError(f"{folder}: no such folder")
    reader = _Reader(folder)
    if not (folder / "model_index.json").is_file():
        raise ModelFolderError(f"{folder / 'model_index.json'}: missing. {_why_no_index(folder)}")
    index = reader.json("model_index.json")
    if reader.problems:
        raise ModelFolderError(reader.problems[0])
    pipeline = index.get("_class_name")
    layout = LAYOUTS.get(pipeline) if isinstance(pipeline, str) else None
    if layout is None:
        known = "; ".join(f"{name} ({known.makes}), such as {known.example}" for name, known in LAYOUTS.items())
        raise ModelFolderError(
            f"{folder / 'model_index.json'}: is a folder for {_named(pipeline)}, but reelbatch runs {known}"
        )
    reader.layout = layout
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
            reader.problem("model_index.json", f"has {name} of class {_named(class_name)}; expected {classes[0]}")
        elif not (folder / name).is_dir():
            reader.problem(name, f"missing: the {name} that model_index.json lists; run the download again")
        else:
            if name in layout.configs:
                configs[name] = reader.config(name)
            else:
                reader.tokenizer(name, class_name)
            components.append(_component(name, class_name, reader.weights(name) if name in layout.weights else {}))
    for path, text in layout.problems(configs):
        reader.problem(path, text)
    reader.networks(configs)

    profile, said = reader.profile()
    limits = layout.limits(configs, said)
    limits = replace(limits, guidance=profile.guidance or limits.guidance)
    try:
        VideoRequest(prompt="-", **vars(limits.defaults)).for_model(replace(limits, advice=None, image_required=False))
    except RequestError as error:
        reader.problem("reelbatch.json", f"has defaults that the model cannot make: {error}")
    flow_shift = float(configs.get("scheduler", {}).get("shift", 1.0))
    return ModelInfo(folder, tuple(components), limits, flow_shift, profile, tuple(reader.problems), layout)


def _component(name: str, class_name: str, stored: dict[str, StoredTensor]) -> ComponentInfo:
    size: Counter[str] = Counter()
    for tensor in stored.values():
        size[tensor.dtype] += tensor.size
    parameters = sum(tensor.parameters for tensor in stored.values())
    return ComponentInfo(name, class_name, parameters, tuple(sorted(size.items())))


def _named(value: object) -> str:
    """A class's name in a message, whatever stands in its place."""
    return shown(value).strip("'") if isinstance(value, str) else shown(value)


TOKENIZER_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


class _Reader:
    """Reads the files of a folder and collects what is wrong with them. layout: once model_index.json has been read."""

    layout: Layout

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.problems: list[str] = []
        self.stored: dict[str, dict[str, StoredTensor]] = {}

    def problem(self, path: str | Path, text: str) -> None:
        self.problems.append(printable(f"{self._at(path)}: {text}"))

    def _at(self, path: str | Path) -> Path:
        return Path(path) if Path(path).is_relative_to(self.folder) else self.folder / path

    def json(self, path: str | Path) -> dict[str, Any]:
        """The JSON object in the file; an empty one, and a problem, if there is none."""
        try:
            return read_object(self._at(path))
        except FileNotFoundError:
            self.problem(path, "missing; run the download again")
        except ValueError as error:
            self.problem(path, str(error))
        return {}

    def config(self, component: str) -> dict[str, Any]:
        """What a component's configuration says, where it can be used."""
        path, classes = config_file(component), self.layout.classes[component]
        content = self.json(path)
        listed = content.get("architectures")
        class_name = content.get("_class_name") or (listed[0] if isinstance(listed, list) and listed else listed)
        if class_name not in (None, *classes):
            self.problem(path, f"is of class {_named(class_name)}; expected {classes[0]}")
        for setting in OTHER_SCHEDULES if component == "scheduler" else ():
            if content.get(setting):
                self.problem(
                    path,
                    f"sets {setting}; HunyuanVideo's schedule is shift alone, so the videos would not be this model's",
                )
        known, faults = check_config(self.layout.configs[component], content)
        for fault in faults:
            self.problem(path, fault)
        return known

    def weights(self, component: str) -> dict[str, StoredTensor]:
        """The tensors of a component's safetensors files, each file checked for completeness."""
        base = self.folder / component / self.layout.weights[component]
        single, index = base.with_suffix(".safetensors"), base.with_suffix(".safetensors.index.json")
        shards: dict[Path, set[str]] = {}
        if single.is_file() and index.is_file():
            self.problem(index, f"stands beside {single.name}, and only one of the two can be meant; remove the other")
        elif single.is_file():
            shards[single] = set()
        elif index.is_file():
            shards = self._shards(index)
        else:
            others = ", ".join(sorted(file.name for file in base.parent.iterdir() if file.suffix in {".bin", ".pt"}))
            besides = f" (there is {others}, but only safetensors are read)" if others else ""
            self.problem(single, f"missing{besides}; run the download again")
        tensors: dict[str, StoredTensor] = {}
        for shard, expected in shards.items():
            if not shard.is_file():
                self.problem(shard, f"missing: one of {len(shards)} files listed in {index.name}; download it again")
                continue
            try:
                header = read_header(shard)
            except ValueError as error:
                self.problem(shard, f"{error}; download it again")
                continue
            if absent := sorted(expected - header.keys()):
                self.problem(shard, f"lacks {len(absent)} tensors listed in {index.name}, such as {absent[0]}")
            if twice := sorted(tensors.keys() & header.keys()):
                self.problem(shard, f"has {len(twice)} tensors that another file has as well, such as {twice[0]}")
            tensors |= header
        self.stored[component] = tensors
        if (base.parent / "adapter_config.json").exists():
            self.problem(f"{component}/adapter_config.json", "is of an adapter; give adapters as --lora, and remove it")
        return tensors

    def _shards(self, index: Path) -> dict[Path, set[str]]:
        """The files that an index lists, and the tensors that should be in each."""
        shards: dict[Path, set[str]] = {}
        problems = len(self.problems)
        listed = self.json(index).get("weight_map")
        for tensor, shard in listed.items() if isinstance(listed, dict) else ():
            if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
                self.problem(index, f"lists {shown(shard)}, which is no safetensors file beside it; get it again")
                return {}
            shards.setdefault(index.parent / shard, set()).add(tensor)
        if not shards and len(self.problems) == problems:
            self.problem(index, "lists no files; get it again")
        return shards

    def tokenizer(self, component: str, class_name: str) -> None:
        folder = self.folder / component
        enough = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("tokenizer.model",))
        bytes_alone = class_name == "ByT5Tokenizer"  # has no vocabulary
        if not bytes_alone and not any(all((folder / file).is_file() for file in files) for files in enough):
            self.problem(component, "has neither tokenizer.json nor vocab.json with merges.txt; run the download again")
        for file in (folder / name for name in TOKENIZER_SETTINGS):
            for fault in code_faults(self.json(file)) if file.is_file() else ():
                self.problem(file, fault)

    def networks(self, configs: dict[str, dict[str, Any]]) -> None:
        """Whether the stored weights are those of the networks, of components that nothing else is wrong with."""
        for component, stored in self.stored.items():
            if any(problem.startswith(f"{self.folder / component}/") for problem in self.problems):
                continue
            try:
                network = build(self.layout.networks[component], configs[component])
            except ValueError as error:
                self.problem(config_file(component), str(error))
                continue
            for difference in differences(stored, network):
                self.problem(component, difference)

    def profile(self) -> tuple[FolderProfile, dict[str, Any]]:
        """What `reelbatch.json` says, and which defaults."""
        path = "reelbatch.json"
        if not (self.folder / path).is_file():
            return FolderProfile(), {}
        content = self.json(path)
        try:
            profile = FolderProfile.model_validate(content)
        except ValidationError as error:
            for fault in validation_faults(error):
                self.problem(path, fault)
            return FolderProfile(), {}
        said = content.get("defaults", {})
        return profile, {name: getattr(profile.defaults, name) for name in said}


def _why_no_index(folder: Path) -> str:
    if any(_first(folder.rglob(pattern)) for pattern in ("mp_rank_00_model_states*.pt", "hunyuan-video-t2v*")):
        return (
            f"This looks like Tencent's own layout; make a model folder of it (reelbatch convert), or get {REAL_MODEL}"
        )
    if _first(folder.rglob("*.incomplete")):
        return "The download did not finish; run it again, it goes on where it stopped"
    return f"Give a model folder in the Diffusers layout, such as a download of {REAL_MODEL}"


def _first(paths: Iterator[Path]) -> Path | None:
    return next(paths, None)
