"""Opens a model folder in the Diffusers layout: what it holds, what is wrong with it, and the loaded components.

A folder has model_index.json, transformer/, vae/, text_encoder/ (Llama), text_encoder_2/ (CLIP), tokenizer/,
tokenizer_2/ and scheduler/. A `reelbatch.json` beside them is optional (`FolderProfile`).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import transformers
from diffusers import AutoencoderKLHunyuanVideo
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from reelbatch.engine.memory import Offload, device_memory_bytes
from reelbatch.engine.offload import Part, Residence, check_offload, network_bytes, streamed, streamed_bytes
from reelbatch.models.lora import load_loras, lora_label
from reelbatch.models.precision import Precision
from reelbatch.models.text import DEFAULT_TEMPLATE, PromptTemplate, TextEncoder
from reelbatch.models.vae import VideoDecoder
from reelbatch.request import ModelLimits, RequestDefaults, RequestError, VideoRequest

if TYPE_CHECKING:
    from reelbatch.models.hunyuan_video import HunyuanVideoTransformer3DModel

REAL_MODEL = "hunyuanvideo-community/HunyuanVideo"
DEMO_FOLDER = Path(__file__).parents[1] / "demo" / "model"

CLASSES = {
    "transformer": ("HunyuanVideoTransformer3DModel",),
    "vae": ("AutoencoderKLHunyuanVideo",),
    "text_encoder": ("LlamaModel",),
    "text_encoder_2": ("CLIPTextModel",),
    "tokenizer": ("LlamaTokenizer", "LlamaTokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend"),
    "tokenizer_2": ("CLIPTokenizer", "CLIPTokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend"),
    "scheduler": ("FlowMatchEulerDiscreteScheduler",),
}
"""The components of a model folder, and the classes that each may have in model_index.json."""

WEIGHTS = {
    "transformer": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
}
"""Components with weights, and what their files are called."""

STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Dtypes by their names in safetensors files."""

OTHER_SCHEDULES = (
    "use_dynamic_shifting",
    "shift_terminal",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "invert_sigmas",
    "stochastic_sampling",
)
"""Scheduler settings that ask for other sigmas or another step than HunyuanVideo's."""


class ModelFolderError(ValueError):
    """A model folder that cannot be used: the message names the file and what to do."""


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

    @property
    def name(self) -> str:
        return _name(self.folder)

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
            text, transformer = ("text_encoder", "text_encoder_2"), ("transformer",)
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


@dataclass(frozen=True)
class Components:
    """A loaded model. All networks compute on `device`, each in its dtype, in evaluation mode.

    residence: moves the weights to and fro, and knows the way of it; None where they are all on the device.
    """

    name: str
    folder: Path
    transformer: HunyuanVideoTransformer3DModel
    decoder: VideoDecoder
    text: TextEncoder
    flow_shift: float
    limits: ModelLimits
    profile: FolderProfile
    device: torch.device
    precision: Precision
    residence: Residence | None = None

    @property
    def offload(self) -> Offload:
        """Which weights are on the device."""
        return "none" if self.residence is None else self.residence.kind

    def visiting_bytes(self, part: Literal["transformer", "vae"]) -> int:
        """Bytes of weights that come to the device, at most at once, for a denoising step or for decoding."""
        if self.offload == "none":
            return 0
        network = self.transformer if part == "transformer" else self.decoder.vae
        in_blocks = self.offload == "block" and part == "transformer"
        return streamed_bytes(network) if in_blocks else network_bytes(network)

    @property
    def vocabulary(self) -> frozenset[str] | None:
        """The words that a little model knows; None for a model that knows language."""
        return frozenset(self.profile.vocabulary) or None

    @contextmanager
    def elsewhere(self, *parts: Part) -> Iterator[None]:
        """While entered, these parts are on the CPU: out of the device's memory, and working there if they must."""
        networks = {
            "text": [self.text.llama, self.text.clip],
            "transformer": [self.transformer],
            "vae": [self.decoder.vae],
        }
        moved = [network for part in parts for network in networks[part]] if self.residence is None else []
        away = nullcontext() if self.residence is None else self.residence.working_on_the_cpu(*parts)
        if "text" in parts:
            self.text.forget(prefix=True)  # what it keeps lies on the device
        for network in moved:
            network.to("cpu")
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        try:
            with away:
                yield
        finally:
            if "text" in parts:
                self.text.forget(prefix=True)
            for network in moved:
                network.to(self.device)

    @contextmanager
    def block_by_block(self) -> Iterator[None]:
        """While entered, the transformer's weights come to the device block by block; the other parts are elsewhere."""
        back = None if self.residence is None else torch.device("cpu")
        blocks = nullcontext() if self.offload == "block" else streamed(self.transformer, self.device, back)
        with self.elsewhere("text", "vae"), blocks:
            yield


def choose_device(device: torch.device | str = "auto") -> torch.device:
    """`auto` is the first CUDA device where there is one, else the CPU. Raises ValueError for a device not there."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device {device!r} is unknown; give auto, cpu, cuda or cuda:N") from None
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {str(chosen)!r} is not there: PyTorch sees {torch.cuda.device_count()} CUDA devices")
    return chosen


def choose_dtype(dtype: torch.dtype | str, device: torch.device) -> torch.dtype:
    """What the transformer computes in; see `Precision.parse`."""
    return Precision.parse(dtype, device).transformer


def resolve(model: str | Path) -> Path:
    """The folder of a model: "demo" (the bundled one), a local path, or a hub id, which is downloaded if need be.

    Raises:
        ModelFolderError: if there is no such folder and none can be fetched.
    """
    if model == "demo":
        if not (DEMO_FOLDER / "model_index.json").is_file():
            raise ModelFolderError(f"{DEMO_FOLDER}: the bundled model is not part of this installation; install again")
        return DEMO_FOLDER
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise ModelFolderError(f"{folder}: is a file; give the model folder, the one with model_index.json in it")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", str(model)):
        raise ModelFolderError(f"{folder}: no such folder; give a model folder, a hub id such as {REAL_MODEL}, or demo")
    return _download(str(model))


def _download(repository: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    wanted = ["model_index.json", "reelbatch.json", *(f"{component}/*" for component in CLASSES)]
    try:
        return Path(snapshot_download(repository, allow_patterns=wanted, ignore_patterns=["*.bin", "*.onnx"]))
    except GatedRepoError:
        remedy = "its owner asks you to accept terms on the model's page first, and to log in (hf auth login)"
    except RepositoryNotFoundError:
        remedy = "the hub has no such model (or it is private: hf auth login)"
    except Exception as error:  # the hub's, the HTTP library's, the file system's
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        remedy = (
            f"it could not be fetched from the hub ({first_line}). Where the network does not allow it, download the "
            f"model elsewhere (hf download {repository} --local-dir FOLDER), copy it here and give its path"
        )
    raise ModelFolderError(f"{repository}: there is no such folder here, and {remedy}") from None


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
    if index.get("_class_name") != "HunyuanVideoPipeline":
        raise ModelFolderError(
            f"{folder / 'model_index.json'}: is a folder for {index.get('_class_name')}, but reelbatch runs "
            f"HunyuanVideoPipeline (text to video), such as {REAL_MODEL}"
        )
    for part in sorted(folder.rglob("*.incomplete")):
        reader.problem(part, "is a download that did not finish; run the download again, it goes on where it stopped")

    components, configs = [], {}
    for name in CLASSES:
        entry = index.get(name)
        class_name = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
        if class_name is None:
            reader.problem("model_index.json", f"lists no {name}; the folder must hold all of {', '.join(CLASSES)}")
        elif class_name not in CLASSES[name]:
            reader.problem("model_index.json", f"has {name} of class {class_name}; expected {CLASSES[name][0]}")
        elif not (folder / name).is_dir():
            reader.problem(name, f"missing: the {name} that model_index.json lists; run the download again")
        else:
            counted: Counter[str] = Counter()
            stored: Counter[str] = Counter()
            if name in WEIGHTS:
                configs[name] = reader.json(f"{name}/config.json")
                counted, stored = reader.weights(name)
            elif name == "scheduler":
                configs[name] = reader.json("scheduler/scheduler_config.json")
            else:
                reader.tokenizer(name)
            sizes = tuple(sorted(stored.items()))
            components.append(ComponentInfo(name, class_name, counted.total(), sizes))
    reader.architecture(configs)

    profile = reader.profile()
    vae, transformer = configs.get("vae", {}), configs.get("transformer", {})
    limits = ModelLimits(
        spatial_stride=vae.get("spatial_compression_ratio", 8) * transformer.get("patch_size", 2),
        temporal_stride=vae.get("temporal_compression_ratio", 4),
        defaults=profile.defaults,
    )
    try:
        VideoRequest(prompt="-", **vars(profile.defaults)).for_model(limits)
    except RequestError as error:
        reader.problem("reelbatch.json", f"has defaults that the model cannot make: {error}")
    flow_shift = float(configs.get("scheduler", {}).get("shift", 1.0))
    return ModelInfo(folder, tuple(components), limits, flow_shift, profile, tuple(reader.problems))


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

    def weights(self, component: str) -> tuple[Counter[str], Counter[str]]:
        """Parameters and bytes by dtype of a component's safetensors files, each checked for completeness."""
        parameters: Counter[str] = Counter()
        size: Counter[str] = Counter()
        base = self.folder / component / WEIGHTS[component]
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
            found = ", ".join(sorted(file.name for file in base.parent.iterdir() if file.suffix in {".bin", ".pt"}))
            besides = f" (there is {found}, but only safetensors are read)" if found else ""
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

    def tokenizer(self, component: str) -> None:
        folder = self.folder / component
        enough = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("tokenizer.model",))
        if not any(all((folder / file).is_file() for file in files) for files in enough):
            self.problem(component, "has neither tokenizer.json nor vocab.json with merges.txt; run the download again")

    def architecture(self, configs: dict[str, dict[str, Any]]) -> None:
        """Whether the components are HunyuanVideo's text-to-video ones and fit together."""
        for name, config in configs.items():
            found = config.get("_class_name") or next(iter(config.get("architectures") or ()), None)
            if found not in (None, *CLASSES[name]):
                self.problem(f"{name}/config.json", f"is of class {found}; expected {CLASSES[name][0]}")
        transformer, scheduler = configs.get("transformer", {}), configs.get("scheduler", {})
        if kind := transformer.get("image_condition_type"):
            self.problem(
                "transformer/config.json",
                f"is an image-to-video model (image_condition_type {kind}); reelbatch runs text to video",
            )
        if transformer.get("patch_size_t", 1) != 1:
            self.problem("transformer/config.json", f"has patch_size_t {transformer['patch_size_t']}; only 1 is known")
        for setting in OTHER_SCHEDULES:
            if scheduler.get(setting):
                self.problem(
                    "scheduler/scheduler_config.json",
                    f"sets {setting}; HunyuanVideo's schedule is shift alone, so the videos would not be this model's",
                )
        for setting, other, other_setting in (
            ("in_channels", "vae", "latent_channels"),
            ("text_embed_dim", "text_encoder", "hidden_size"),
            ("pooled_projection_dim", "text_encoder_2", "hidden_size"),
        ):
            value, expected = transformer.get(setting), configs.get(other, {}).get(other_setting)
            if None not in (value, expected) and value != expected:
                self.problem(
                    "transformer/config.json",
                    f"has {setting} {value}, but {other} has {other_setting} {expected}: these are parts of two models",
                )

    def profile(self) -> FolderProfile:
        path = "reelbatch.json"
        if not (self.folder / path).is_file():
            return FolderProfile()
        content = self.json(path)
        try:
            return FolderProfile.model_validate(content)
        except ValidationError as error:
            for found in error.errors():
                field = ".".join(str(part) for part in found["loc"])
                self.problem(path, f"{field}: {found['msg'].removeprefix('Value error, ')}; got {found['input']!r}")
            return FolderProfile()


def load(
    folder: str | Path,
    device: torch.device | str = "auto",
    dtype: Precision | torch.dtype | str = "auto",
    tile_above_bytes: int | None = None,
    offload: Offload = "none",
    lora: Sequence[tuple[str | Path, float]] = (),
) -> Components:
    """Loads all components of a model folder.

    Args:
        folder: in the Diffusers layout.
        device: "auto" is CUDA where there is one, else the CPU.
        dtype: of all networks, or part by part (`Precision.parse`); "auto" is bfloat16 on CUDA, float32 elsewhere.
        tile_above_bytes: decode in spatial tiles what is estimated to take more than this. None: half of the
            device's memory that the weights leave.
        offload: which weights are on the device: "none" waits elsewhere; "component", only those of the component at
            work; "block", of the transformer and Llama only those of the block at work. The others wait on the CPU, or,
            where the CPU is the device, on disk (in TMPDIR). Videos are the same to the bit.
        lora: LoRA files that act on the transformer, each with its scale (`reelbatch.models.lora.load_loras`).

    Raises:
        LoraError: for a LoRA file that cannot be read, or is not of this model.
        ModelFolderError: for a folder with problems, weights that are not all there, or a model too large.
        ValueError: for a device or a dtype that is not there, or an offload that cannot be here.
    """
    from reelbatch.models.hunyuan_video import HunyuanVideoTransformer3DModel

    info = inspect(folder)
    if info.problems:
        raise ModelFolderError("\n".join(info.problems))
    device = choose_device(device)
    precision = Precision.parse(dtype, device)
    check_offload(offload, device, precision.int8)
    weights = info.weight_bytes(precision, device)
    if tile_above_bytes is None:
        tile_above_bytes = (device_memory_bytes(device) - weights) // 2
        if offload != "none" and tile_above_bytes < 0:  # else as without offload, so that the frames are the same
            tile_above_bytes = device_memory_bytes(device) // 2
    if not info.fits(device, precision, offload):
        raise ModelFolderError(f"{folder}: {info.verdict(device, precision)}")
    folder = info.folder
    residence = None if offload == "none" else Residence(device, offload, weights)

    networks: dict[str, Any] = {}
    stored = {component.name: component.stored_bytes for component in info.components}
    for name, network in {
        "transformer": HunyuanVideoTransformer3DModel,
        "vae": AutoencoderKLHunyuanVideo,
        "text_encoder": transformers.LlamaModel,
        "text_encoder_2": transformers.CLIPTextModel,
    }.items():
        try:
            module, report = network.from_pretrained(
                folder / name,
                dtype=_load_in(stored[name], precision.of(name), residence),
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
                **precision.loading(name),
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise ModelFolderError(f"{folder / name}: cannot be loaded: {error}") from error
        if missing := sorted(report["missing_keys"]):
            raise ModelFolderError(
                f"{folder / name}: lacks {len(missing)} weights that the network needs, such as {missing[0]}; "
                "download it again"
            )
        if name == "transformer" and lora:
            load_loras(module, lora)
        networks[name] = module.eval().requires_grad_(False)
        if residence is None:
            module.to(device)
        else:  # at once, so that no two networks are where one has room
            residence.take(name, module, precision.of(name))

    classes = {component.name: component.class_name for component in info.components}
    try:
        text = TextEncoder(
            networks["text_encoder"],
            _load_tokenizer(folder / "tokenizer", classes["tokenizer"]),
            networks["text_encoder_2"],
            _load_tokenizer(folder / "tokenizer_2", classes["tokenizer_2"]),
            info.profile.prompt_template or DEFAULT_TEMPLATE,
        )
    except ValueError as error:
        raise ModelFolderError(
            f"{folder / 'reelbatch.json'}: its prompt_template (HunyuanVideo's own where it has none) does not fit the "
            f"tokenizer: {error}"
        ) from error
    return Components(
        name=" + ".join([info.name, *(lora_label(path, scale) for path, scale in lora)]),
        folder=folder,
        transformer=networks["transformer"],
        decoder=VideoDecoder(networks["vae"], tile_above_bytes),
        text=text,
        flow_shift=info.flow_shift,
        limits=info.limits,
        profile=info.profile,
        device=device,
        precision=precision,
        residence=residence,
    )


def _load_in(stored_bytes: tuple[tuple[str, int], ...], dtype: torch.dtype, residence: Residence | None) -> torch.dtype:
    """What to load a network in: weights that are to wait on disk come as they are stored, and so take no memory."""
    kinds = {name for name, _ in stored_bytes}
    on_disk = residence is not None and residence.folder is not None
    return STORED[kinds.pop()] if on_disk and len(kinds) == 1 and kinds <= STORED.keys() else dtype


def _load_tokenizer(folder: Path, class_name: str) -> transformers.PreTrainedTokenizerFast:
    # transformers 5 rebuilds a LlamaTokenizer from the vocabulary by Llama 2's rules, and so spells Llama 3's words
    # letter by letter without their spaces. What tokenizer.json says is right.
    if class_name.startswith("Llama") and (folder / "tokenizer.json").is_file():
        class_name = "PreTrainedTokenizerFast"
    tokenizer = getattr(transformers, class_name)
    try:
        return tokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ModelFolderError(f"{folder}: the tokenizer cannot be loaded: {error}") from error


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


def _name(folder: Path) -> str:
    """What to call a model: "demo", the hub id of a cached download, or the folder's name."""
    if folder == DEMO_FOLDER:
        return "demo"
    for part in folder.parts:
        if part.startswith("models--"):
            return part.removeprefix("models--").replace("--", "/")
    return folder.resolve().name
