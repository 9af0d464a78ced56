"""Precision: each part in its own dtype, 8-bit weights, and every video of a batch still the one it is alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torchao.quantization import Int8Tensor

from reelbatch import VideoRequest
from reelbatch.engine.engine import Engine
from reelbatch.loading.load import load
from reelbatch.loading.precision import NOT_CONVERTED, Precision

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


@pytest.mark.parametrize(
    ("asked", "device", "expected"),
    [
        ("auto", CPU, Precision(FP32, FP32, FP32)),
        ("auto", CUDA, Precision(BF16, BF16, BF16)),
        ("fp16", CPU, Precision(FP16, FP16, FP16)),
        (torch.bfloat16, CPU, Precision(BF16, BF16, BF16)),
        ("transformer=bf16,vae=fp16", CPU, Precision(BF16, FP16, FP32)),
        (" text = fp16 , transformer = float32 ", CUDA, Precision(FP32, BF16, FP16)),
        ("int8", CUDA, Precision(BF16, BF16, BF16, int8=True)),
        ("transformer=int8,vae=fp32", CUDA, Precision(BF16, FP32, BF16, int8=True)),
        (Precision(FP32, FP16, BF16), CUDA, Precision(FP32, FP16, BF16)),
    ],
)
def test_a_dtype_is_read_for_all_parts_or_part_by_part(
    asked: object, device: torch.device, expected: Precision
) -> None:
    assert Precision.parse(asked, device) == expected


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("float64", "'float64' cannot be used for transformer; give auto, float32"),
        ("transformer=bf16,audio=fp16", "'audio=fp16' is not one of transformer, vae, text"),
        ("transformer=bf16,transformer=fp16", "'transformer=fp16' is not one of"),
        ("vae=", "'vae=' is not one of"),
        ("vae=int8", "'int8' cannot be used for vae"),
    ],
)
def test_what_cannot_be_read_is_refused_with_how_to_write_it(asked: str, said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        Precision.parse(asked, CPU)
    assert "transformer=bfloat16,vae=float16,text=float16" in str(caught.value)


def test_a_precision_is_told_in_short() -> None:
    assert str(Precision(BF16, BF16, BF16)) == "bfloat16"
    assert str(Precision(BF16, FP16, FP32)) == "transformer=bfloat16,vae=float16,text=float32"
    assert str(Precision(BF16, BF16, BF16, int8=True)) == "transformer=int8 in bfloat16,vae=bfloat16,text=bfloat16"
    assert Precision(BF16, FP32, FP32).weight_bytes("vae", 10) == 40
    assert Precision(BF16, FP32, FP32, int8=True).weight_bytes("transformer", 10) == 10


def requests() -> list[VideoRequest]:
    fields = ({"frames": 5}, {"width": 48}, {"true_cfg": 2.0, "negative_prompt": "blurry"})
    return [
        VideoRequest(**{"prompt": "a red cat", "seed": i, "id": f"r{i}", "steps": 2, **each})
        for i, each in enumerate(fields)
    ]


@pytest.mark.parametrize("asked", ["transformer=bf16,vae=fp32,text=fp32", "transformer=fp32,vae=bf16", "int8"])
def test_every_video_of_a_batch_is_the_one_it_is_alone(tiny_folder: Path, asked: str) -> None:
    components = load(tiny_folder, "cpu", asked)
    together = Engine(components).generate(requests())
    for video, request in zip(together, requests(), strict=True):
        assert np.array_equal(video.frames, Engine(components).generate([request])[0].frames)
    assert together[0].provenance["dtype"] == str(Precision.parse(asked, CPU))


def test_each_part_is_loaded_in_its_own_dtype(tiny_folder: Path) -> None:
    components = load(tiny_folder, "cpu", "transformer=bf16,vae=fp16,text=fp32")
    assert components.family.transformer.dtype == BF16
    assert components.family.decoder.vae.dtype == FP16
    assert components.family.text.llama.dtype == components.family.text.clip.dtype == FP32


def test_eight_bit_weights_take_one_byte_and_change_little(tiny_folder: Path) -> None:
    quantized, full = load(tiny_folder, "cpu", "int8"), load(tiny_folder, "cpu", "fp32")
    for name, module in quantized.family.transformer.named_modules():
        if isinstance(module, torch.nn.Linear):
            assert isinstance(module.weight, Int8Tensor) != (name.split(".")[0] in NOT_CONVERTED), name
    weight = quantized.family.transformer.transformer_blocks[0].ff.net[2].weight
    assert weight.qdata.dtype == torch.int8
    assert weight.scale.numel() == weight.shape[0]  # a scale an output row, so that batch-mates share none
    ours, theirs = (Engine(found, keep_latents=True).generate(requests()) for found in (quantized, full))
    for video, expected in zip(ours, theirs, strict=True):
        assert video.latents is not None and expected.latents is not None
        error = (video.latents - expected.latents).norm() / expected.latents.norm()
        assert 0 < error < 0.05


def test_importing_is_silent(tmp_path: Path) -> None:
    words = "from reelbatch import Engine; import torchao; import logging; assert logging.root.manager.disable == 0"
    loud = {"DIFFUSERS_VERBOSITY": "warning", "TRANSFORMERS_VERBOSITY": "error", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", words], capture_output=True, text=True, env={**os.environ, **loud}, cwd=tmp_path
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
