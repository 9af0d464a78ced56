"""Loads a model folder: its networks and tokenizers, put together as a family and placed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from reelbatch.device import choose_device
from reelbatch.loading.configs import check_config, transformers_config
from reelbatch.loading.hashing import weights_hash
from reelbatch.loading.hub import ModelFolderError
from reelbatch.loading.inspection import ModelInfo, inspect
from reelbatch.loading.layout import PROCESSORS, Contents, config_file
from reelbatch.loading.lora import check_loras, load_loras, lora_label, lora_record
from reelbatch.loading.model import Model
from reelbatch.loading.precision import Precision
from reelbatch.loading.stored import UNUSED
from reelbatch.memory.placement import Offload, Placement, check_offload
from reelbatch.outside_json import read_object
from reelbatch.wording import shown_line

STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Dtypes by their names in safetensors files."""


def load(
    folder: str | Path,
    device: torch.device | str = "auto",
    dtype: Precision | torch.dtype | str = "auto",
    offload: Offload = "none",
    lora: Sequence[tuple[str | Path, float]] = (),
) -> Model:
    """Loads all components of a model folder.

    Args:
        folder: in the Diffusers layout.
        device: "auto" is CUDA where there is one, else the CPU.
        dtype: of all networks, or part by part (`Precision.parse`); "auto" is bfloat16 on CUDA, float32 elsewhere.
        offload: which weights are on the device: "none" waits elsewhere; "component", only those of the component at
            work; "block", of networks of blocks only those of the block at work. The others wait on the CPU, or, where
            the CPU is the device, on disk (in TMPDIR). Videos are the same to the bit.
        lora: LoRA files that act on the transformer, each with its scale (`reelbatch.loading.lora.load_loras`).

    Raises:
        LoraError: for a LoRA file that cannot be read, or is not of this model.
        ModelFolderError: for a folder with problems, weights that are not all there, or a model too large.
        ValueError: for a device or a dtype that is not there, or an offload that cannot be here.
    """
    info, device, precision = check(folder, device, dtype, offload, lora)
    placement = Placement(device, offload, info.weight_bytes(precision, device), storable=not precision.int8)
    with quiet_progress():
        networks = _load_networks(info, precision, placement, lora)
    contents = Contents(
        networks, _load_tokenizers(info, networks), info.profile.prompt_template, info.limits, info.flow_shift, device
    )
    try:
        family = info.layout.build(contents)
    except ValueError as error:
        raise ModelFolderError(
            f"{info.folder / 'reelbatch.json'}: its prompt_template (HunyuanVideo's own where it has none) does not "
            f"fit the tokenizer: {error}"
        ) from error
    name = " + ".join([info.name, *(lora_label(path, scale) for path, scale in lora)])
    loras = tuple(lora_record(path, scale) for path, scale in lora)
    weights = weights_hash(info.folder)
    return Model(name, info.folder, family, precision, placement, info.profile, weights, loras)


def check(
    folder: str | Path,
    device: torch.device | str = "auto",
    dtype: Precision | torch.dtype | str = "auto",
    offload: Offload = "none",
    lora: Sequence[tuple[str | Path, float]] = (),
) -> tuple[ModelInfo, torch.device, Precision]:
    """What a model is loaded with, after all is refused that can be before a weight is read; raises as `load`."""
    info = inspect(folder)
    if info.problems:
        raise ModelFolderError("\n".join(info.problems))
    device = choose_device(device)
    precision = Precision.parse(dtype, device)
    check_offload(offload, device, precision.int8)
    if not info.fits(device, precision, offload):
        raise ModelFolderError(f"{folder}: {info.verdict(device, precision)}")
    if lora:
        transformer = info.layout.networks["transformer"]
        with torch.device("meta"):  # the shapes of its layers are enough
            check_loras(transformer.from_config(transformer.load_config(str(info.folder / "transformer"))), lora)
    return info, device, precision


def _load_networks(
    info: ModelInfo, precision: Precision, placement: Placement, lora: Sequence[tuple[str | Path, float]]
) -> dict[str, Any]:
    networks: dict[str, Any] = {}
    stored = {component.name: component.stored_bytes for component in info.components}
    for name, network in info.layout.networks.items():
        dtype = precision.of(name)
        with_lora = (
            name == "transformer" and len(lora) > 0
        )  # a LoRA comes in the dtype of the weights that it is beside
        as_stored = placement.waits_on_disk and not with_lora
        try:
            module, report = network.from_pretrained(
                info.folder / name,
                dtype=_stored_dtype(stored[name], dtype) if as_stored else dtype,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
                **_own_config(info, name),
                **precision.loading(name),
            )
        except MemoryError:
            raise
        except Exception as error:  # of any of the libraries
            raise ModelFolderError(f"{info.folder / name}: cannot be loaded: {shown_line(str(error), 2000)}") from error
        for keys, fault in (("missing_keys", "lacks"), ("unexpected_keys", "has unexpected")):
            if names := sorted(name for name in report[keys] if not UNUSED.fullmatch(name)):
                raise ModelFolderError(
                    f"{info.folder / name}: {fault} {len(names)} weights, such as {names[0]}; download it again"
                )
        if with_lora:
            load_loras(module, lora)
        networks[name] = module.eval().requires_grad_(False)
        # at once, so that no two networks are where one has room
        layout = info.layout
        placement.take(name, module, dtype, layout.phases[name], name in layout.blockwise, layout.also.get(name, ()))
    return networks


def _own_config(info: ModelInfo, component: str) -> dict[str, Any]:
    """transformers reads no config.json by itself: any entry of it would become an attribute of the configuration."""
    own = transformers_config(info.layout.networks[component], _checked_config(info, component))
    return {} if own is None else {"config": own}


def _checked_config(info: ModelInfo, component: str) -> dict[str, Any]:
    config, _ = check_config(info.layout.configs[component], read_object(info.folder / config_file(component)))
    return config


def _stored_dtype(stored_bytes: tuple[tuple[str, int], ...], dtype: torch.dtype) -> torch.dtype:
    """What to load a network in whose weights are to wait on disk: as they are stored, so that they take no memory."""
    kinds = {name for name, _ in stored_bytes}
    return STORED[kinds.pop()] if len(kinds) == 1 and kinds <= STORED.keys() else dtype


def _load_tokenizers(info: ModelInfo, networks: dict[str, Any]) -> dict[str, Any]:
    """And the image processor, of folders that have one."""
    classes = {component.name: component.class_name for component in info.components}
    tokenizers: dict[str, Any] = {}
    for name in ("tokenizer", "tokenizer_2"):
        config = networks[name.replace("tokenizer", "text_encoder")].config
        tokens = getattr(config, "text_config", config).vocab_size
        tokenizers[name] = _load_tokenizer(info.folder / name, classes[name], tokens)
    for name in classes.keys() & PROCESSORS.keys():
        tokenizers[name] = PROCESSORS[name](**_checked_config(info, name))
    return tokenizers


def _load_tokenizer(folder: Path, class_name: str, tokens: int) -> Any:
    """tokens: that the text encoder knows."""
    # transformers 5 rebuilds a LlamaTokenizer from the vocabulary by Llama 2's rules, and so spells Llama 3's words
    # letter by letter without their spaces. What tokenizer.json says is right.
    if class_name.startswith("Llama") and (folder / "tokenizer.json").is_file():
        class_name = "PreTrainedTokenizerFast"
    try:
        tokenizer = getattr(transformers, class_name).from_pretrained(folder, local_files_only=True)
        used = {*tokenizer.get_vocab().values(), *tokenizer("a cat").input_ids}  # a template may add others
    except MemoryError:
        raise
    except Exception as error:  # tokenizers raises Exception itself, and transformers whatever a wrong type leads to
        reason = shown_line(" ".join(f"{type(error).__name__}: {error}".split()))
        raise ModelFolderError(f"{folder}: the tokenizer cannot be loaded: {reason}; get it again") from error
    if (last := max(used, default=0)) >= tokens:
        raise ModelFolderError(f"{folder}: has a token {last}, and the text encoder has {tokens}: parts of two models")
    return tokenizer


@contextmanager
def quiet_progress() -> Iterator[None]:
    """While entered, Diffusers and transformers show no progress bars of their own; as before afterwards."""
    undo: list[Callable[[], None]] = []
    for logging in (diffusers.utils.logging, transformers.utils.logging):
        if logging.is_progress_bar_enabled():
            logging.disable_progress_bar()
            undo.append(logging.enable_progress_bar)
    try:
        yield
    finally:
        for enable in undo:
            enable()
