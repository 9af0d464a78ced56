"""Devices: which can be chosen, and which errors mean that their memory ran out."""

from __future__ import annotations

import errno

import pytest
import torch
from fake_cuda import Trace
from typer.testing import CliRunner

from reelbatch.cli import app
from reelbatch.device import choose_device, gibibytes, is_out_of_memory


@pytest.mark.parametrize("device", ["mps", "xpu", "meta", "vulkan", "hpu:0", "privateuseone"])
def test_a_device_on_which_nothing_ever_ran_is_refused_with_those_that_work(device: str) -> None:
    with pytest.raises(
        ValueError, match=f"device '{device}' is (not supported|unknown); give auto, cpu, cuda or cuda:N"
    ):
        choose_device(device)
    with pytest.raises(ValueError, match=r"not supported|unknown"):
        choose_device(torch.device(device))


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "", "cpu 0"])
def test_a_word_that_is_no_device_is_refused_with_those_that_work(device: str) -> None:
    with pytest.raises(ValueError, match="is unknown; give auto, cpu, cuda or cuda:N"):
        choose_device(device)


def test_the_command_line_refuses_such_a_device_in_one_line() -> None:
    result = CliRunner().invoke(app, ["doctor", "--device", "mps"])
    assert result.exit_code != 0
    assert "give auto, cpu, cuda or cuda:N" in f"{result.output}{result.exception}"


@pytest.mark.parametrize("device", ["cpu", "cpu:0", torch.device("cpu")])
def test_the_cpu_is_always_there(device: str | torch.device) -> None:
    assert choose_device(device).type == "cpu"


def test_a_cuda_device_is_chosen_where_there_is_one(cuda: Trace) -> None:
    assert choose_device() == torch.device("cuda")
    assert choose_device("cuda:0") == torch.device("cuda:0")
    with pytest.raises(ValueError, match="'cuda:1' is not there: PyTorch sees 1 CUDA devices"):
        choose_device("cuda:1")


@pytest.mark.parametrize(
    "message",
    [
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.15 GiB",
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call",
        "CUDA driver error: out of memory",
        "HIP out of memory. Tried to allocate 2.00 GiB",
        "Triton Error [CUDA]: out of memory",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED",
        "cuDNN Frontend error: CUDNN_STATUS_ALLOC_FAILED",
        "Unable to find a valid cuDNN algorithm to run convolution",
        "FIND was unable to find an engine to execute this computation",
        "GET was unable to find an engine to execute this computation",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`",
        "CUDA NVRTC error: NVRTC_ERROR_OUT_OF_MEMORY",
        "miopenStatusAllocFailed",
        "unable to mmap 4096 bytes from file </weights>: Cannot allocate memory (12)",
        "[enforce fail at alloc_cpu.cpp:119] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to",
        "could not create a primitive",
    ],
)
def test_what_libraries_say_when_memory_ran_out(message: str) -> None:
    assert is_out_of_memory(RuntimeError(message))
    assert not is_out_of_memory(ValueError(message))


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("CUDA error: no kernel image is available for execution on the device"),
        RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"),
        RuntimeError(
            "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed in a non-contiguous input."
        ),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx(...)`"),
        RuntimeError("CUDA NVRTC error: NVRTC_ERROR_COMPILATION"),
        RuntimeError("out of resource: shared memory, Required: 131072, Hardware limit: 101376"),
        RuntimeError("Expected canUse32BitIndexMath(input) to be true, but got false"),
        RuntimeError("No available kernel. Aborting execution."),
        OSError(errno.ENOSPC, "No space left on device"),
    ],
)
def test_other_failures_are_not_taken_for_it(error: Exception) -> None:
    assert not is_out_of_memory(error)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (80 * 2**30, "80.00 GiB"),
        (2**29, "0.50 GiB"),
        (2**20, "1.00 MiB"),
        (300, "0.29 KiB"),
        (0, "0 B"),
        (-(2**20), "-1.00 MiB"),
    ],
)
def test_a_size_never_shows_as_nothing(count: int, text: str) -> None:
    assert gibibytes(count) == text
