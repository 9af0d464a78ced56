"""Loads the components of a model folder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from diffusers import AutoencoderKLHunyuanVideo

from reelbatch.device import choose_device, device_memory_bytes
from reelbatch.loading.hub import ModelFolderError
from reelbatch.loading.inspection import FolderProfile, inspect
from reelbatch.loading.lora import load_loras, lora_label
from reelbatch.loading.precision import Precision
from reelbatch.memory.placement import Offload, Part, Residence, check_offload, network_bytes, streamed, streamed_bytes
from reelbatch.models.hunyuan_video.text import DEFAULT_TEMPLATE, TextEncoder
from reelbatch.models.hunyuan_video.transformer import HunyuanVideoTransformer3DModel
from reelbatch.models.hunyuan_video.vae import VideoDecoder
from reelbatch.request import ModelLimits

STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Dtypes by their names in safetensors files."""


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
