"""What `reelbatch doctor` says, and the attention options of a run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_cuda import Trace, clear_caches
from typer.testing import CliRunner

from reelbatch import VideoRequest
from reelbatch.attention import BACKENDS, AttentionBackendError, HeadRules, own_pixel, register_rule, rule_names, rules
from reelbatch.cli import app
from reelbatch.doctor import examine
from reelbatch.engine.engine import Engine
from reelbatch.loading.load import load
from reelbatch.request import ModelLimits, RequestError


def test_the_doctor_names_every_kernel_and_the_one_that_is_chosen() -> None:
    found = json.loads(CliRunner().invoke(app, ["doctor", "--device", "cpu", "--json"]).stdout)
    assert [backend["name"] for backend in found["backends"]] == list(BACKENDS)
    assert {choice["backend"] for choice in found["chosen"].values()} == {"sdpa"}
    assert all(choice["why"] for choice in found["chosen"].values())
    varlen = next(backend for backend in found["backends"] if backend["name"] == "varlen")
    assert "CUDA" in varlen["never"]
    assert found["machine"]["torch"] == torch.__version__


def test_the_doctor_says_where_a_device_is_too_old_for_a_kernel(cuda: Trace, monkeypatch: pytest.MonkeyPatch) -> None:
    on_hopper = examine("cuda")
    assert {name: choice["backend"] for name, choice in on_hopper["chosen"].items()} == {
        "no mask": "sdpa",
        "a mask of keys": "sdpa",
        "a mask tensor": "sdpa",
        "rules": "flex",
    }
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *args: (7, 0))
    clear_caches()
    backends = {backend["name"]: backend for backend in examine("cuda", "float16")["backends"]}
    for name in ("flash", "cudnn", "varlen"):
        assert "needs compute capability 8.0, and this device has 7.0" in str(backends[name])
    assert backends["efficient"]["never"] is None


def test_the_doctor_says_that_one_split_is_refused(cuda: Trace, monkeypatch: pytest.MonkeyPatch) -> None:
    def varlen_attn(*args: object, num_splits: int | None = None) -> object:
        if num_splits is not None:
            raise RuntimeError("num_splits is not supported on ROCm")
        return args[0]

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    (backend,) = (backend for backend in examine("cuda")["backends"] if backend["name"] == "varlen")
    assert "without num_splits=1, which is refused here: num_splits is not supported on ROCm" in backend["what"]


def test_the_doctor_prints_the_same_for_people() -> None:
    result = CliRunner().invoke(app, ["doctor", "--device", "cpu", "--dtype", "bfloat16"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    for word in ("chosen on cpu in bfloat16", "varlen_attn runs on CUDA alone", "own-frame"):
        assert word in result.stdout


def test_a_kernel_that_cannot_run_here_is_refused_before_anything_runs(tiny_folder: Path) -> None:
    with pytest.raises(AttentionBackendError, match=r"varlen_attn runs on CUDA alone.*These can: sdpa"):
        Engine.from_pretrained(str(tiny_folder), device="cpu", attention="varlen")
    with pytest.raises(AttentionBackendError, match="No attention backend 'flesh'"):
        Engine.from_pretrained(str(tiny_folder), device="cpu", attention="flesh")


def test_an_unknown_rule_is_refused_with_the_nearest() -> None:
    with pytest.raises(RequestError, match="did you mean 'own-frame'"):
        VideoRequest(prompt="a cat", attention_rule="own_frame").for_model(ModelLimits(attention_rules=rule_names))


def test_a_request_names_a_rule_that_the_user_registered(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "_REGISTERED", dict(rules._REGISTERED))
    register_rule("first-head-through-time", lambda heads: HeadRules({0: own_pixel}))
    components = load(tiny_folder, "cpu", torch.float32)
    fields = {"prompt": "a red cat", "seed": 1, "frames": 9, "height": 32, "width": 32, "steps": 2}
    ruled = VideoRequest(**fields, attention_rule="first-head-through-time", id="ruled")
    free = VideoRequest(**fields, id="free")
    together = Engine(components).generate([ruled, free])
    for video, request in zip(together, (ruled, free), strict=True):
        assert np.array_equal(video.frames, Engine(components).generate([request])[0].frames)
    assert not np.array_equal(together[0].frames, together[1].frames)


def test_every_kernel_of_this_machine_makes_the_same_video(tiny_folder: Path) -> None:
    request = VideoRequest(prompt="a red cat", seed=1, steps=2, id="r")
    components = load(tiny_folder, "cpu", torch.float32)
    made = {}
    for name in ("auto", "sdpa", "flash", "math"):
        engine = Engine(components, attention=name, keep_latents=True)
        made[name] = engine.generate([request])[0].latents
        assert engine.info["attention"] == name
    for latents in made.values():
        torch.testing.assert_close(latents, made["auto"], rtol=1e-5, atol=1e-5)
