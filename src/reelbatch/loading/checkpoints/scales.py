"""8-bit floating-point weights with the scales that belong to them, made whole.

    Tencent's 1.0     …_fp8.pt, and in …_fp8_map.pt a scale for each linear layer of the blocks
    ComfyUI's         `….scale_weight` beside `….weight` (and a `scaled_fp8` that says so); later `….weight_scale`, and
                      the format in `….comfy_quant` or in the metadata's `_quantization_metadata`
    musubi-tuner's    `….scale_weight` for the whole weight, for each row, or for each part of a row

As those programs do, a weight is `weight.to(dtype) * scale.to(dtype)` (Tencent's hyvideo/modules/fp8_optimization.py,
ComfyUI's comfy/ops.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from reelbatch.loading.checkpoints.weight_files import TORCH_NAMES, WeightFile
from reelbatch.loading.hub import ModelFolderError
from reelbatch.loading.stored import StoredTensor
from reelbatch.outside_json import parse
from reelbatch.wording import shown, shown_line

SCALES = (".scale_weight", ".weight_scale")
BESIDE = (".scale_input", ".input_scale", ".comfy_quant")
"""What else is stored beside such a weight, and is not needed: scales of inputs, and the format's name."""
FP8 = ("F8_E4M3", "F8_E5M2")
FORMATS = ("float8_e4m3fn", "float8_e5m2")
WHOLE = ("F64", "F32", "F16", "BF16")
MOST_NOTE = 65_536
"""Bytes of a format's description."""


def whole_weights(file: WeightFile, scales: WeightFile | None, dtype: torch.dtype | None) -> WeightFile:
    """The weights of a file, in floating point of 16 bits or more.

    Args:
        scales: Tencent's map, where there is one.
        dtype: of all weights; None leaves those that are whole as they are, and makes bfloat16 of others.

    Raises:
        ModelFolderError: for a format that is not read, and for scales that are missing or do not fit.
    """
    _check_formats(file)
    found = dict(_scales(file, scales))
    tensors = {
        name: tensor
        for name, tensor in file.tensors.items()
        if not name.endswith((*SCALES, *BESIDE)) and name.rpartition(".")[2] != "scaled_fp8"
    }
    for name, tensor in tensors.items():
        if name in found:
            _check_shape(file, name, tensor, found[name][1])
        elif scales is not None and tensor.dtype in FP8:
            raise ModelFolderError(f"{scales.path}: has no scale for {name}, which is stored in 8 bits")
        if tensor.dtype not in (*WHOLE, *FP8) and file.format != "GGUF":
            raise ModelFolderError(
                f"{file.path}: holds {name[:200]} in {tensor.dtype}, which is not read; get weights in one of "
                f"{', '.join((*WHOLE, *FP8))}"
            )

    def kept(tensor: StoredTensor) -> torch.dtype:
        return dtype or (
            next(own for own, name in TORCH_NAMES.items() if name == tensor.dtype)
            if tensor.dtype in WHOLE
            else torch.bfloat16
        )

    def read(name: str) -> Tensor:
        weight = file.read(name).to(kept(tensors[name]))
        if name in found:
            origin, scale_name = found[name][0]
            weight = _times(file, name, weight, origin.read(scale_name).to(weight.dtype))
        return weight

    after = {
        name: StoredTensor(TORCH_NAMES[kept(tensor)], tensor.shape, tensor.parameters * kept(tensor).itemsize)
        for name, tensor in tensors.items()
    }
    return replace(file, tensors=after, read=read)


def _scales(
    file: WeightFile, scales: WeightFile | None
) -> Iterator[tuple[str, tuple[tuple[WeightFile, str], StoredTensor]]]:
    """By the weight they are of: where each scale is."""
    for name, tensor in file.tensors.items():
        for ending in SCALES:
            if name.endswith(ending):
                yield name.removesuffix(ending) + ".weight", ((file, name), tensor)
    if scales is None:
        return
    for name, tensor in scales.tensors.items():
        weight = f"{name}.weight"
        if weight in file.tensors and file.tensors[weight].dtype in FP8:
            yield weight, ((scales, name), tensor)


def _check_shape(file: WeightFile, name: str, weight: StoredTensor, scale: StoredTensor) -> None:
    shape, of = scale.shape, weight.shape
    whole = scale.parameters == 1
    rows = len(of) >= 1 and shape in ((of[0],), (of[0], *[1] * (len(of) - 1)))
    parts = (
        len(shape) == 3 and len(of) == 2 and shape[0] == of[0] and shape[2] == 1 and shape[1] and not of[1] % shape[1]
    )
    if scale.dtype not in WHOLE or not (whole or rows or parts):
        raise ModelFolderError(
            f"{file.path}: the scale of {name} is {scale.dtype} {list(shape)}, which does not fit {list(of)}"
        )


def _times(file: WeightFile, name: str, weight: Tensor, scale: Tensor) -> Tensor:
    if not bool(scale.isfinite().all()):
        raise ModelFolderError(f"{file.path}: the scale of {name} is not finite; download it again")
    if scale.numel() == 1:
        return weight * scale.reshape(())
    if scale.ndim == 3:
        return (weight.unflatten(1, (scale.shape[1], -1)) * scale).flatten(1)
    return weight * scale.reshape(-1, *[1] * (weight.ndim - 1))


def _check_formats(file: WeightFile) -> None:
    """Raises ModelFolderError where ComfyUI's notes say another format than 8-bit floating point."""
    for name, tensor in file.tensors.items():
        if name.endswith(".comfy_quant"):
            if tensor.size > MOST_NOTE:
                raise ModelFolderError(f"{file.path}: {name} has {tensor.size} bytes; it is a note of a format")
            _check_format(file, name, bytes(file.read(name).flatten().to(torch.uint8).tolist()))
    if note := file.metadata.get("_quantization_metadata"):
        try:
            layers = parse(note)["layers"]
            items = list(layers.items())
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ModelFolderError(
                f"{file.path}: its _quantization_metadata cannot be read ({shown_line(str(error))})"
            ) from None
        for name, said in items:
            _check_said(file, name, said)


def _check_format(file: WeightFile, name: str, text: bytes) -> None:
    try:
        said = parse(text)
    except ValueError as error:
        raise ModelFolderError(f"{file.path}: {name} cannot be read ({shown_line(str(error))})") from None
    _check_said(file, name, said)


def _check_said(file: WeightFile, name: str, said: object) -> None:
    kind = said.get("format") if isinstance(said, Mapping) else said
    if kind not in FORMATS:
        raise ModelFolderError(
            f"{file.path}: holds {name[:200]} as {shown(kind)}; of ComfyUI's formats of few bits only "
            f"{' and '.join(FORMATS)} are read: get one of those, or 16 bits"
        )
