"""Attention kernels: each computes softmax attention or says why it cannot, and FlexAttention compiles seldom."""

from __future__ import annotations

import itertools
import math
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attention import (
    CPU,
    SHAPES,
    TILE,
    dense_rules,
    draw,
    draw_mask,
    draw_rows,
    four_axes,
    off,
    seen_by,
    softmax_attention,
)
from torch import Tensor
from torch._dynamo.utils import counters

from reelbatch.attention import (
    BACKENDS,
    FORMS,
    AttentionBackendError,
    HeadRules,
    Setting,
    Sizes,
    attention,
    choose,
    compile_rules,
    flex,
    own_frame,
    own_pixel,
    per_sample,
    ragged_attention,
    varlen,
)
from reelbatch.attention.rules import BLOCK, RuleMask, bucket

HAS_COMPILER = any(shutil.which(name) for name in flex.COMPILERS)
needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="FlexAttention on the CPU needs a C++ compiler")


@pytest.mark.parametrize("backend", ["sdpa", "flash", "math"])
@torch.no_grad()
def test_the_kernels_of_this_device_are_softmax_attention_for_every_kind_of_mask(backend: str) -> None:
    grid, text, heads = (3, 5, 6), 7, 2
    lengths, count = (97, 97, 97, 97), 4 * 97
    rows = draw_rows(count, heads)
    dense, keys = draw_mask((heads, 97, 97), "additive"), draw_mask((97,), "bool")
    sizes = Sizes(1, heads, 97, 97)
    prepared = [
        None,
        *per_sample(dense, sizes),
        *per_sample(keys, sizes),
        compile_rules(HeadRules({1: own_frame}), heads, grid, text, CPU),
    ]
    seen = torch.stack([seen_by(None, grid, text), seen_by(own_frame, grid, text)])
    found = ragged_attention(*rows, lengths, prepared, backend).split(lengths)
    samples = zip(*(part.split(lengths) for part in rows), strict=True)
    parts = [[part.transpose(0, 1)[None] for part in qkv] for qkv in samples]
    for ours, qkv, mask in zip(found, parts, (None, dense, keys, seen), strict=True):
        reading = None if mask is None else four_axes(mask, "K" if mask.ndim == 1 else "HQK")
        expected = softmax_attention(*qkv, reading)[0].transpose(0, 1).flatten(1)
        assert off(ours, expected) < 1e-6


@torch.no_grad()
def test_flex_is_sdpa_or_says_that_there_is_no_compiler() -> None:
    if not HAS_COMPILER:
        with pytest.raises(AttentionBackendError, match=r"no C\+\+ compiler.*These can: sdpa"):
            choose(Setting("cpu", torch.float32, "rules"), "flex")
        return
    grid, text, heads = (3, 8, 9), 11, 3
    count = math.prod(grid) + text
    mask = compile_rules(HeadRules({0: own_frame, 1: TILE}), heads, grid, text, CPU)
    for seed in range(2):
        rows = draw_rows(count, heads, seed)
        with torch._dynamo.config.patch(error_on_recompile=seed > 0):
            found = ragged_attention(*rows, (count,), [mask], "flex")
        assert off(found, ragged_attention(*rows, (count,), [mask], "sdpa")) < 1e-5
        assert off(found, dense_rules(rows, [own_frame, TILE, None], grid, text)) < 1e-5


def test_block_masks_hold_the_blocks_of_each_head() -> None:
    """FlexAttention's own way to make them looks at every pair."""
    from torch.nn.attention.flex_attention import create_block_mask

    for chosen in ([own_frame] * 3, [own_frame, TILE, None]):
        for grid, text in SHAPES[:4]:
            heads = HeadRules({head: rule for head, rule in enumerate(chosen) if rule is not None})
            mask, count = compile_rules(heads, 3, grid, text, CPU), math.prod(grid) + text
            if mask is None:
                continue
            ours, of_heads = mask.block_mask, mask.block_mask.kv_num_blocks.shape[1]
            assert of_heads == len(set(chosen)) if len(set(chosen)) > 1 else of_heads == 1
            theirs = create_block_mask(ours.mask_mod, 1, of_heads, count, count, device="cpu")
            assert torch.equal(ours.to_dense(), theirs.to_dense())
            assert torch.equal(ours.full_kv_num_blocks, theirs.full_kv_num_blocks)
            seen = torch.stack([seen_by(rule, grid, text) for rule in chosen])
            places = torch.arange(count)
            for head in range(3):
                asked = ours.mask_mod(torch.tensor(0), torch.tensor(head), places[:, None], places)
                assert torch.equal(asked, seen[head])


HALF, SINGLE = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    ("named", "setting", "reason"),
    [
        ("varlen", Setting("cpu", HALF, "none"), "varlen_attn runs on CUDA alone, and this is cpu"),
        ("varlen", Setting("cuda", SINGLE, "none"), "float16 and bfloat16, and this is torch.float32"),
        ("varlen", Setting("cuda", HALF, "keys"), "varlen_attn takes no mask"),
        ("flash", Setting("cuda", SINGLE, "none"), "float16 and bfloat16 on CUDA, and this is torch.float32"),
        ("flash", Setting("cuda", HALF, "dense"), "the flash kernel takes no mask on CUDA"),
        ("flash", Setting("cuda", HALF, "rules"), "the flash kernel takes no mask on CUDA"),
        ("cudnn", Setting("cpu", HALF, "none"), "the cudnn kernel runs on CUDA alone"),
        ("cudnn", Setting("cuda", SINGLE, "none"), "float16 and bfloat16, and this is torch.float32"),
        ("efficient", Setting("cpu", SINGLE, "none"), "the efficient kernel runs on CUDA alone"),
        ("flex", Setting("cuda", HALF, "dense"), "FlexAttention here takes rules, not mask tensors"),
        ("flex", Setting("cpu", SINGLE, "rules", training=True), "no backward pass on the CPU"),
    ],
)
def test_a_backend_that_cannot_says_why_and_what_can(named: str, setting: Setting, reason: str) -> None:
    with pytest.raises(AttentionBackendError) as caught:
        choose(setting, named)
    said = str(caught.value)
    assert said.startswith(f"Attention backend {named!r}: ")
    assert reason in said
    can = said.partition("These can: ")[2].removesuffix(", or 'auto'.").split(", ")
    assert can
    assert named not in can
    for other in can:
        assert choose(setting, other).backend.name == other


def test_flex_on_the_cpu_needs_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    reason = BACKENDS["flex"].refuses(Setting("cpu", SINGLE, "rules"))
    assert reason is not None and "no C++ compiler (g++ or clang++)" in reason


VOLTA, AMPERE = (7, 0), (8, 0)
UNRESTRICTED, PACK = Setting("cuda", HALF, "none"), Setting("cuda", HALF, "none", samples=4)


@pytest.mark.parametrize(
    ("given_setting", "expected"),
    [
        (UNRESTRICTED, "sdpa"),
        (PACK, "varlen"),
        (PACK._replace(training=True), "varlen"),
        (PACK._replace(head_dim=128, value_dim=128), "varlen"),
        (PACK._replace(head_dim=12, value_dim=12), "sdpa"),
        (PACK._replace(head_dim=320, value_dim=320), "sdpa"),
        (PACK._replace(head_dim=64, value_dim=32), "sdpa"),
        (PACK._replace(capability=VOLTA), "sdpa"),
        (PACK._replace(capability=(7, 5), dtype=torch.float16), "sdpa"),
        (Setting("cuda", SINGLE, "none", samples=4), "sdpa"),
        (Setting("cuda", HALF, "keys"), "sdpa"),
        (Setting("cuda", HALF, "dense"), "sdpa"),
        (Setting("cuda", HALF, "rules"), "flex"),
        (Setting("cuda", HALF, "rules", training=True), "flex"),
        (Setting("cuda", torch.float64, "rules"), "sdpa"),
        (Setting("cpu", SINGLE, "none", samples=4), "sdpa"),
        (Setting("cpu", SINGLE, "rules"), "sdpa"),
        (Setting("cpu", SINGLE, "rules", training=True), "sdpa"),
    ],
)
def test_the_backend_that_is_chosen_and_why(given_setting: Setting, expected: str) -> None:
    chosen = choose(given_setting)
    assert chosen.backend.name == expected
    assert chosen.why


SIZES_OF_HEADS = st.sampled_from([None, 1, 12, 64, 128, 256, 512])


@given(
    given_setting=st.builds(
        Setting,
        st.sampled_from(["cpu", "cuda"]),
        st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
        st.sampled_from(["none", "keys", "dense", "rules"]),
        st.integers(1, 4),
        st.booleans(),
        st.sampled_from([None, VOLTA]),
        SIZES_OF_HEADS,
        SIZES_OF_HEADS,
        st.booleans(),
    )
)
def test_auto_never_chooses_what_refuses(given_setting: Setting) -> None:
    assert choose(given_setting).backend.refuses(given_setting) is None


@pytest.mark.parametrize("named", ["flash", "cudnn", "varlen", "efficient"])
def test_kernels_that_need_ampere_say_so(named: str) -> None:
    with pytest.raises(AttentionBackendError, match=r"needs compute capability 8\.0, and this device has 7\.0\. These"):
        choose(UNRESTRICTED._replace(capability=VOLTA), named)
    assert BACKENDS[named].refuses(UNRESTRICTED) is None


@given(
    dtypes=st.tuples(*[st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64])] * 2),
    head_dim=st.sampled_from([1, 3, 7, 8, 9, 64, 129, 256, 300]),
    value_dim=st.sampled_from([None, 1, 8, 64]),
    form=st.sampled_from([None, *FORMS]),
    kind=st.sampled_from(["bool", "additive", "zeros and -inf"]),
    learned=st.booleans(),
    strided=st.booleans(),
    queries=st.integers(0, 9),
    backend=st.sampled_from(list(BACKENDS)),
)
@settings(max_examples=400, deadline=None)
def test_a_kernel_that_is_named_computes_softmax_attention_or_says_why_not(
    dtypes: tuple[torch.dtype, torch.dtype],
    head_dim: int,
    value_dim: int | None,
    form: str | None,
    kind: str,
    learned: bool,
    strided: bool,
    queries: int,
    backend: str,
) -> None:
    """Every head size, dtype, mask and stride: never an error of PyTorch's own."""
    if backend == "flex":  # has its own tests: each shape would be compiled
        return
    dtype, mask_dtype = dtypes
    sizes = Sizes(2, 3, queries, 9)
    generator = torch.Generator().manual_seed(queries)
    shapes = [(2, 3, n, d) for n, d in ((queries, head_dim), (9, head_dim), (9, value_dim or head_dim))]
    qkv = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    if strided:
        qkv = [part.mT.contiguous().mT for part in qkv]
    mask = None if form is None or not queries else draw_mask(sizes.of(form), kind, queries)
    if mask is not None and mask.is_floating_point():
        mask = mask.to(mask_dtype).requires_grad_(learned)
    try:
        result = attention(*qkv, mask, axes=form, backend=backend)
    except AttentionBackendError:
        assert backend not in ("sdpa", "math")
        return
    assert backend in ("sdpa", "math", "flash")
    if not queries:
        assert result.shape == (2, 3, 0, value_dim or head_dim)
        return
    expected = softmax_attention(*qkv, None if mask is None or form is None else four_axes(mask, form))
    assert off(result, expected) < {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 5e-2)


@pytest.mark.parametrize("backend", ["sdpa", "flash", "math"])
@pytest.mark.parametrize("query_dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_mask_of_a_narrower_dtype_adds_what_it_says(query_dtype: torch.dtype, backend: str) -> None:
    """Also numbers near the end of its own range, which are finite in the wider one."""
    qkv = draw(Sizes(1, 2, 5, 7), query_dtype)
    mask = draw_mask((5, 7), "additive").half()
    mask[:, 1] += 60000
    mask[2, 3] = torch.finfo(torch.float16).min
    result = attention(*qkv, mask, backend=backend)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 2e-2}[query_dtype]
    assert off(result, softmax_attention(*qkv, mask)) < tolerance


# -- varlen_attn on devices that take it, take it in part, or not at all


@pytest.fixture
def varlen_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """A kernel in the place of `varlen_attn`, which `refused` makes refuse; every call's keywords."""
    calls: list[dict[str, Any]] = []

    def varlen_attn(q: Tensor, k: Tensor, v: Tensor, *rest: Any, num_splits: int | None = None) -> Tensor:
        calls.append({"num_splits": num_splits})
        for keywords, error in REFUSED:
            if keywords is None or keywords == num_splits:
                raise error
        starts = rest[0].tolist()
        spans = [slice(*pair) for pair in itertools.pairwise(starts) if pair[0] < pair[1]]
        parts = [softmax_attention(*(x[span].transpose(0, 1)[None] for x in (q, k, v)))[0] for span in spans]
        return torch.cat([part.transpose(0, 1) for part in parts]).to(q.dtype)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    monkeypatch.setattr(varlen, "_device", lambda: CPU)
    yield calls
    REFUSED.clear()
    varlen.support.cache_clear()
    choose.cache_clear()


REFUSED: list[tuple[int | None, Exception]] = []
ON_AMPERE = PACK._replace(capability=AMPERE)


def test_one_split_is_asked_for_where_it_is_taken(varlen_device: list[dict[str, Any]]) -> None:
    assert choose(ON_AMPERE).backend.name == "varlen"
    assert varlen.support(AMPERE) == varlen.Support({"num_splits": 1})
    assert varlen.note(AMPERE) is None
    assert len(varlen_device) == 1  # tried once


def test_a_device_that_refuses_num_splits_is_called_without_and_the_doctor_says_so(
    varlen_device: list[dict[str, Any]],
) -> None:
    REFUSED.append((1, RuntimeError("num_splits is not supported on ROCm\nat line 5")))
    assert choose(ON_AMPERE).backend.name == "varlen"
    assert varlen.support(AMPERE).options == {}
    note = varlen.note(AMPERE)
    assert note is not None and note.endswith("refused here: num_splits is not supported on ROCm")
    assert len(varlen_device) == 2
    varlen.note(AMPERE)
    assert len(varlen_device) == 2


def test_a_device_that_refuses_altogether_falls_back_to_sdpa(varlen_device: list[dict[str, Any]]) -> None:
    REFUSED.append((None, NotImplementedError("no kernel image")))
    assert choose(ON_AMPERE).backend.name == "sdpa"
    with pytest.raises(AttentionBackendError, match="does not run on this device: no kernel image"):
        choose(ON_AMPERE, "varlen")


def test_memory_that_ran_out_in_the_trial_is_not_remembered_as_a_refusal(varlen_device: list[dict[str, Any]]) -> None:
    REFUSED.append((None, torch.OutOfMemoryError("CUDA out of memory")))
    with pytest.raises(torch.OutOfMemoryError):
        choose(ON_AMPERE)
    REFUSED.clear()
    assert choose(ON_AMPERE).backend.name == "varlen"


@pytest.mark.parametrize(("refused", "expected"), [(None, {"num_splits": 1}), (1, {"num_splits": None})])
def test_a_pack_in_one_call_is_each_sample_alone(
    refused: int | None, expected: dict[str, Any], varlen_device: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    if refused is not None:
        REFUSED.append((refused, RuntimeError("no")))
    monkeypatch.setattr(varlen, "compute_capability", lambda device: AMPERE)
    rows, lengths = [part.half() for part in draw_rows(12, 2)], (3, 0, 9)
    result = varlen.attend_all(*rows, lengths).flatten(1)
    assert varlen_device[-1] == expected
    torch.testing.assert_close(result, ragged_attention(*rows, lengths), rtol=1e-2, atol=1e-2)


# -- FlexAttention's buckets


@given(tokens=st.integers(1, 10**6))
def test_a_bucket_is_whole_blocks_and_at_most_an_eighth_more(tokens: int) -> None:
    blocks = -(-tokens // BLOCK)
    assert bucket(tokens) % BLOCK == 0
    assert blocks <= bucket(tokens) // BLOCK <= blocks * 9 / 8
    assert bucket(bucket(tokens)) == bucket(tokens)


def test_all_lengths_up_to_those_of_the_largest_videos_are_few_buckets() -> None:
    assert len({bucket(tokens) for tokens in range(1, 130_000)}) <= 64  # 720 × 1280, 129 frames: 118,800 and the text


@needs_compiler
@torch.no_grad()
def test_300_text_lengths_compile_a_few_times_and_each_is_sdpa() -> None:
    rules_of_heads = HeadRules({0: own_frame, 1: own_pixel})
    before = counters["stats"]["unique_graphs"]
    for text in range(300):
        mask, rows = compile_rules(rules_of_heads, 3, (3, 8, 8), text, CPU), draw_rows(192 + text, 3, text)
        result = ragged_attention(*rows, (192 + text,), [mask], "flex")
        assert off(result, ragged_attention(*rows, (192 + text,), [mask], "sdpa").double()) < 1e-5, text
    assert counters["stats"]["unique_graphs"] - before <= len({bucket(192 + text) for text in range(300)}) == 3


@needs_compiler
@torch.no_grad()
def test_blocks_beyond_a_sample_are_neither_computed_nor_seen() -> None:
    grid, text, heads = (8, 16, 16), 200, 2
    count = math.prod(grid) + text  # 18 blocks; the tables reach to the bucket
    mask = compile_rules(HeadRules({0: own_frame, 1: TILE}), heads, (8, 16, 16), text, CPU)
    assert isinstance(mask, RuleMask)
    shorter = compile_rules(HeadRules({0: own_frame, 1: TILE}), heads, (8, 16, 16), text - 100, CPU)
    assert isinstance(shorter, RuleMask)
    assert (bucket(count), bucket(count - 100)) == (18 * BLOCK, 18 * BLOCK)
    assert len(shorter) == 17 * BLOCK - 28
    for counts in (shorter.block_mask.kv_num_blocks, shorter.block_mask.full_kv_num_blocks):
        assert not counts[..., 17:].any()
    for ready in (mask, shorter):
        rows = draw_rows(len(ready), heads)
        result = ragged_attention(*rows, (len(ready),), [ready], "flex")
        assert off(result, ragged_attention(*rows, (len(ready),), [ready], "sdpa").double()) < 1e-5


@needs_compiler
@torch.no_grad()
def test_flex_without_rules_is_softmax_attention_over_any_counts() -> None:
    for queries, keys in ((1, 1), (5, 200), (127, 128), (128, 128), (129, 7), (0, 3), (3, 0)):
        qkv = draw(Sizes(1, 2, queries, keys))
        result = attention(*qkv, backend="flex")
        assert result.shape == (1, 2, queries, 8)
        if queries and keys:
            assert off(result, softmax_attention(*qkv)) < 1e-5
        else:
            assert (result == 0).all()


def test_a_name_that_is_no_backend_is_refused() -> None:
    with pytest.raises(AttentionBackendError, match="No attention backend 'xformers'; there are sdpa, flash"):
        attention(*draw(Sizes(1, 2, 3, 4)), backend="xformers")
