"""The engine on a fake CUDA device: a step waits once and takes the memory that was estimated."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import tiny
from diffusers import AutoencoderKLHunyuanVideo
from fake_cuda import CUDA, ELSEWHERE, Trace, weightless
from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaModel

from reelbatch import VideoRequest
from reelbatch.demo.tokenizers import clip_tokenizer, llama_tokenizer
from reelbatch.engine.engine import Engine, FailedRequests
from reelbatch.loading.model import Model
from reelbatch.loading.precision import Precision
from reelbatch.loading.skeleton import hunyuanvideo_13b
from reelbatch.memory.estimate import Estimator
from reelbatch.memory.placement import Placement
from reelbatch.models.hunyuan_video.family import HunyuanVideo
from reelbatch.models.hunyuan_video.text import TextEncoder
from reelbatch.models.hunyuan_video.transformer import HunyuanVideoTransformer3DModel
from reelbatch.models.hunyuan_video.vae import VideoDecoder
from reelbatch.request import ModelLimits

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
FIELDS: dict[str, Any] = {"prompt": "a red cat", "height": 480, "width": 832, "frames": 17, "steps": 6}


def model_of(folder: Path, num_layers: int = 1, num_single_layers: int = 1) -> Model:
    """HunyuanVideo at its own widths, with few blocks, and text encoders that are small but for their outputs."""
    tokenizer, tokenizer_2 = llama_tokenizer(tiny.WORDS), clip_tokenizer(tiny.WORDS, folder)
    llama = LlamaConfig(hidden_size=4096, intermediate_size=64, num_hidden_layers=3, num_attention_heads=32)
    clip = CLIPTextConfig(hidden_size=768, intermediate_size=64, num_hidden_layers=1, num_attention_heads=12)
    networks = weightless(
        lambda: (
            HunyuanVideoTransformer3DModel(num_layers=num_layers, num_single_layers=num_single_layers),
            AutoencoderKLHunyuanVideo(),
            LlamaModel(llama),
            CLIPTextModel(clip),
        )
    )
    transformer_, vae, llama_, clip_ = (network.eval().requires_grad_(False) for network in networks)
    text = TextEncoder(llama_, tokenizer, clip_, tokenizer_2)
    family = HunyuanVideo(transformer_, VideoDecoder(vae), text, 7.0, ModelLimits(), CUDA)
    return Model("fake", folder, family, Precision.parse("bfloat16", CUDA), Placement(CUDA, "none", {}))


def requests(count: int, **fields: Any) -> list[VideoRequest]:
    return [VideoRequest(**{**FIELDS, "seed": i, "id": str(i), **fields}) for i in range(count)]


def submitted(model: Model, requests: list[VideoRequest], **options: Any) -> Engine:
    engine = Engine(model, **options)
    for request in requests:
        engine.submit(request)
    return engine


def steps(engine: Engine, trace: Trace, check: Callable[[], None]) -> None:
    """Runs all steps but those at which a sample begins or ends, and checks each."""
    engine.step()
    for _ in range(4):
        trace.reset()
        engine.step()
        check()


@pytest.mark.parametrize("batch", [1, 2, 4])
@pytest.mark.parametrize("isolation", ["exact", "packed"])
@pytest.mark.parametrize("fields", [{}, {"negative_prompt": "blurry", "true_cfg": 2.0}], ids=["distilled", "CFG"])
def test_a_step_waits_once_however_many_samples_share_it(
    fields: dict[str, Any], isolation: str, batch: int, tmp_path: Path, cuda: Trace
) -> None:
    engine = submitted(model_of(tmp_path), requests(batch, **fields), isolation=isolation)

    def check() -> None:
        assert cuda.waits.total() == 1, cuda.waits
        ((_, place),) = cuda.waits
        assert "isfinite" in place.code

    steps(engine, cuda, check)


@pytest.mark.parametrize("rule", ["own-frame", "spatial-temporal"])
def test_a_step_under_rules_waits_once_too(rule: str, tmp_path: Path, cuda: Trace) -> None:
    engine = submitted(model_of(tmp_path), requests(2, attention_rule=rule))

    def check() -> None:
        assert cuda.waits.total() == 1, cuda.waits

    steps(engine, cuda, check)
    assert cuda.kernels["fake_cuda.flex_attention"] == 4


def test_of_a_whole_video_only_checks_and_frames_come_back(tmp_path: Path, cuda: Trace) -> None:
    engine = Engine(model_of(tmp_path))
    with suppress(FailedRequests):  # frames that are fake may not become an array
        engine.generate(requests(1, steps=2))
    copies = {place.file for kind, place in cuda.waits if kind == "copy from cuda to cpu"}
    assert copies == {"models/vae.py"}
    reads = {place.file for kind, place in cuda.waits if kind == "_local_scalar_dense" and place != ELSEWHERE}
    assert reads == {"engine/runner.py", "models/vae.py"}


LARGE: dict[str, Any] = {"height": 720, "width": 1280, "frames": 129}


@pytest.fixture(scope="module")
def estimates() -> dict[tuple[str, int], int]:
    """Bytes of the tensors of a step of HunyuanVideo, made before there is a fake device."""
    skeleton = hunyuanvideo_13b(Precision.parse("bfloat16", CUDA), CUDA)
    return {
        (isolation, batch): Estimator(skeleton, isolation, CUDA).step_tensors(requests(batch, **LARGE))
        for isolation in ("exact", "packed")
        for batch in (1, 2)
    }


@pytest.mark.parametrize("isolation", ["exact", "packed"])
@pytest.mark.parametrize("batch", [1, 2])
def test_the_peak_of_a_step_is_within_5_percent_of_its_estimate(
    batch: int, isolation: str, tmp_path: Path, estimates: dict[tuple[str, int], int], cuda: Trace
) -> None:
    model = model_of(tmp_path, num_layers=2, num_single_layers=2)
    weights, peaks = cuda.live, set()
    engine = submitted(model, requests(batch, **LARGE), isolation=isolation)
    steps(engine, cuda, lambda: peaks.add(cuda.peak_bytes - weights))
    assert len(peaks) == 1
    assert peaks.pop() == pytest.approx(estimates[isolation, batch], rel=0.05)
