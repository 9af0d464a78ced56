"""Attention: masks of every form, rules by coordinates, and the kernels, against softmax written out in fp64."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from probes import LargestTensor
from test_hunyuan_video import CONFIG, MODELS, REFERENCES, alone, make_branch, ours_from, relative_error
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from reelbatch.attention import (
    FORMS,
    AttentionBackendError,
    HeadRules,
    MaskShapeError,
    Rule,
    Sizes,
    SlidingTile,
    attention,
    backends,
    canonical,
    compile_rules,
    masks,
    once,
    own_frame,
    own_pixel,
    ragged_attention,
    register_rule,
    rule_named,
    rule_names,
    rules,
)
from reelbatch.attention.rules import RuleMask
from reelbatch.models.hunyuan_video.branch import Branch

CPU = torch.device("cpu")
NEVER = float("-inf")
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}
HEAD_DIM = 8

# -- the reference ---------------------------------------------------------------------------------


def four_axes(mask: Tensor, form: str) -> Tensor:
    return mask.reshape([mask.shape[form.index(axis)] if axis in form else 1 for axis in "BHQK"])


def softmax_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """In fp64, `mask` with four axes; zeros where a query may attend to nothing."""
    query, key, value = query.double(), key.double(), value.double()
    scores = query @ key.mT / math.sqrt(query.shape[-1])
    if mask is not None:
        if mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape).masked_fill(~mask, NEVER)
        scores = scores + mask.double()
    top = scores.amax(-1, keepdim=True).detach()
    weights = (scores - top.where(top > NEVER, 0.0)).exp()
    total = weights.sum(-1, keepdim=True)
    return weights / total.where(total > 0, 1.0) @ value


def off(found: Tensor, expected: Tensor) -> float:
    """The largest difference, as a share of the largest value where that is above 1."""
    return ((found.double() - expected).abs().max() / expected.abs().max().clamp(min=1)).item()


def draw(sizes: Sizes, dtype: torch.dtype = torch.float32, seed: int = 0, grad: bool = False) -> list[Tensor]:
    """A query, a key and a value."""
    generator = torch.Generator().manual_seed(seed)
    rows = (sizes.queries, sizes.keys, sizes.keys)
    shapes = [(sizes.batch, sizes.heads, n, HEAD_DIM) for n in rows]
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_(grad) for shape in shapes]


def draw_mask(shape: tuple[int, ...], kind: str, seed: int = 0) -> Tensor:
    """Some of its rows, as a rule, may attend to nothing."""
    generator = torch.Generator().manual_seed(seed)
    may = torch.rand(shape, generator=generator) < 0.6
    may &= torch.rand((*shape[:-1], 1), generator=generator) < 0.8
    if seed % 3 == 2:
        may.view(-1, shape[-1])[-1] = False
    if kind == "bool":
        return may
    added = torch.randn(shape, generator=generator) if kind == "additive" else torch.zeros(shape)
    return added.masked_fill(~may, NEVER)


def readings(shape: tuple[int, ...], sizes: Sizes) -> dict[str, list[int]]:
    """By the table in the documentation: the forms that a shape fits, and what each says of [B, H, Q, K]."""
    full = dict(zip("BHQK", sizes, strict=True))
    found = {}
    for form in FORMS:
        if len(shape) == len(form) and shape[-1] == sizes.keys:
            given = dict(zip(form, shape, strict=True))
            if all(given[axis] in (1, full[axis]) for axis in form):
                found[form] = [given.get(axis, 1) for axis in "BHQK"]
    return found


SIZES = [
    Sizes(2, 3, 5, 7),
    Sizes(2, 2, 5, 7),
    Sizes(3, 3, 3, 3),
    Sizes(1, 4, 6, 6),
    Sizes(2, 4, 1, 6),
    Sizes(4, 1, 4, 6),
    Sizes(2, 3, 3, 5),
    Sizes(2, 3, 2, 2),
    Sizes(1, 1, 1, 1),
]


def shapes_of(form: str, sizes: Sizes) -> set[tuple[int, ...]]:
    """Of a form's shapes, the full one and all with axes of 1."""
    return set(itertools.product(*({1, size} for size in sizes.of(form[:-1])), [sizes.keys]))


# -- mask tensors ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["bool", "additive", "zeros and -inf"])
@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_every_form_is_softmax_attention_and_a_query_that_sees_nothing_gets_zeros(
    form: str, kind: str, dtype: torch.dtype
) -> None:
    empty = 0
    for seed, sizes in enumerate(SIZES):
        qkv = draw(sizes, dtype, seed)
        for shape in shapes_of(form, sizes):
            mask = draw_mask(shape, kind, seed)
            expected = softmax_attention(*qkv, four_axes(mask, form))
            found = attention(*qkv, mask, axes=form)
            assert found.dtype == dtype
            assert found.isfinite().all()
            assert off(found, expected) < TOLERANCE[dtype], (sizes, shape)
            nothing = (expected == 0).all(-1)
            empty += nothing.sum().item()
            assert (found[nothing] == 0).all()
    assert empty > 50


@pytest.mark.parametrize("kind", ["bool", "additive"])
@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_those_of_softmax_attention_and_finite_where_a_query_sees_nothing(form: str, kind: str) -> None:
    for seed, sizes in enumerate(SIZES):
        for shape in shapes_of(form, sizes):
            mask = draw_mask(shape, kind, seed)
            ours, theirs = draw(sizes, seed=seed, grad=True), draw(sizes, seed=seed, grad=True)
            attention(*ours, mask, axes=form).square().sum().backward()
            softmax_attention(*theirs, four_axes(mask, form)).square().sum().backward()
            for found, expected in zip(ours, theirs, strict=True):
                torch.testing.assert_close(found.grad, expected.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["sdpa", "flash", "math"])
@pytest.mark.parametrize("low", [-1e9, torch.finfo(torch.float32).min, torch.finfo(torch.float16).min])
def test_large_negative_numbers_instead_of_inf_are_no_nan_in_any_dtype(
    low: float, backend: str, dtype: torch.dtype
) -> None:
    sizes = Sizes(2, 3, 5, 7)
    mask = torch.zeros(2, 1, 5, 7).masked_fill(~draw_mask((2, 1, 5, 7), "bool"), low)
    mask[0, 0, 1] = NEVER
    mask[1, 0, 2], mask[1, 0, 2, 3] = NEVER, low  # attends to this one key alone
    query, key, value = draw(sizes, dtype)
    found = attention(query, key, value, mask, backend=backend)
    assert found.isfinite().all()
    torch.testing.assert_close(found[1, :, 2], value[1, :, 3])
    some = (mask == 0).any(-1).expand(2, 3, 5)
    expected = softmax_attention(query, key, value, mask)
    assert (found.double() - expected)[some].abs().max() < TOLERANCE[dtype]


def test_the_error_that_started_this_cannot_happen() -> None:
    """`[B, N, N]` against `[B, H, N, N]`, which broadcasting takes for heads: Diffusers, January 2025."""
    sizes = Sizes(2, 24, 41, 41)
    qkv, mask = draw(sizes), draw_mask((2, 41, 41), "bool")
    with pytest.raises(RuntimeError, match=r"The (expanded )?size of (the )?tensor"):
        torch.nn.functional.scaled_dot_product_attention(*qkv, attn_mask=mask)
    assert off(attention(*qkv, mask), softmax_attention(*qkv, mask[:, None])) < 1e-6


@given(
    sizes=st.builds(Sizes, *(st.integers(1, 4) for _ in range(4))),
    shape=st.lists(st.integers(1, 4), max_size=5).map(tuple),
)
@settings(max_examples=600, deadline=None)
def test_a_shape_is_read_in_its_one_way_or_refused_with_a_cure_that_works(sizes: Sizes, shape: tuple[int, ...]) -> None:
    check_shape(sizes, shape)


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        (Sizes(2, 24, 6, 6), (24, 6)),  # a key mask for each head
        (Sizes(2, 24, 5, 6), (2, 24, 6)),  # and for each sample
        (Sizes(2, 2, 5, 6), (2, 5, 6)),  # samples or heads
        (Sizes(3, 2, 3, 6), (3, 6)),  # samples or queries
        (Sizes(2, 24, 6, 6), (24, 2, 6, 6)),
        (Sizes(2, 24, 6, 8), (2, 8, 6)),  # keys before queries
        (Sizes(2, 24, 6, 6), (1, 2, 24, 6, 6)),
        (Sizes(2, 24, 6, 6), (2, 1)),
        (Sizes(2, 24, 6, 6), ()),
    ],
)
def test_shapes_that_people_get_wrong(sizes: Sizes, shape: tuple[int, ...]) -> None:
    assert check_shape(sizes, shape)


def check_shape(sizes: Sizes, shape: tuple[int, ...]) -> str:
    """The error, if there has to be one; checks that it says all and that every cure it names works."""
    mask, expected = torch.ones(shape, dtype=torch.bool), readings(shape, sizes)
    meanings = {tuple(view) for view in expected.values()}
    if len(meanings) == 1:
        assert canonical(mask, sizes).shape == next(iter(meanings))
        return ""
    with pytest.raises(MaskShapeError) as caught:
        attention(*draw(sizes), mask)
    said = str(caught.value)
    batch, heads, queries, keys = sizes
    assert f"A mask of shape {list(shape)} " in said
    assert f"query [{batch}, {heads}, {queries}, D]" in said
    assert f"key [{batch}, {heads}, {keys}, D]" in said
    if meanings:
        cures = re.findall(r"(\w+) \(mask((?:\.unsqueeze\(\d\))+), or axes='(\w+)'\)", said)
        assert {expected[form] and form for form, _, _ in cures} == {axes for _, _, axes in cures}
        assert {tuple(canonical(mask, sizes, axes).shape) for _, _, axes in cures} == meanings
        for form, calls, _ in cures:
            assert list(eval("mask" + calls, {"mask": mask}).shape) == expected[form]
        return said
    for form in FORMS:
        assert f"{form:<5} {list(sizes.of(form))}" in said
    cures = re.findall(r"mask\.unsqueeze\((\d)\)(?: with axes='(\w+)')?, read as \[B, H, Q, K\] = (\[[\d, ]+\])", said)
    for position, axes, read in cures:
        assert str(list(canonical(mask.unsqueeze(int(position)), sizes, axes or None).shape)) == read
    fitting = [position for position in range(len(shape) + 1) if readings(grown(shape, position), sizes)]
    assert sorted({int(position) for position, _, _ in cures}) == fitting
    return said


def grown(shape: tuple[int, ...], position: int) -> tuple[int, ...]:
    return (*shape[:position], 1, *shape[position:])


def test_named_axes_decide_between_samples_and_heads() -> None:
    sizes = Sizes(2, 2, 5, 7)
    qkv, mask = draw(sizes), draw_mask((2, 5, 7), "bool")
    with pytest.raises(MaskShapeError, match="can be read in two ways"):
        attention(*qkv, mask)
    for axes, expected in (("BQK", mask[:, None]), ("HQK", mask[None])):
        assert off(attention(*qkv, mask, axes=axes), softmax_attention(*qkv, expected)) < 1e-6
    with pytest.raises(MaskShapeError, match=r"(?s)does not fit as BHQK.*This would fit: axes='HQK', or axes='BQK'"):
        attention(*qkv, mask, axes="BHQK")
    with pytest.raises(ValueError, match=r"axes='BHK'; it must be one of K, BK"):
        attention(*qkv, mask, axes="BHK")


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.int32, torch.complex64])
def test_a_mask_that_is_neither_boolean_nor_floating_point_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=r"could be read in two ways.*mask\.bool\(\)"):
        attention(*draw(Sizes(2, 3, 5, 7)), torch.ones(7, dtype=dtype))


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_mask_that_holds_nan_or_plus_inf_is_refused(wrong: float) -> None:
    mask = torch.zeros(5, 7)
    mask[3, 2] = wrong
    with pytest.raises(ValueError, match=r"holds NaN or \+inf"):
        attention(*draw(Sizes(2, 3, 5, 7)), mask)


def test_queries_keys_and_values_that_do_not_go_together_are_refused() -> None:
    query, key, value = draw(Sizes(2, 3, 5, 7))
    for wrong in ((query, key[:1], value[:1]), (query, key, value[:, :, :6]), (query[..., :4], key, value)):
        with pytest.raises(ValueError, match="do not go together"):
            attention(*wrong)
    longer = torch.cat([value, value], -1)  # values may be of another size
    mask = torch.zeros(2, 7, dtype=torch.bool)
    assert off(attention(query, key, longer), softmax_attention(query, key, longer)) < 1e-6
    assert torch.equal(attention(query, key, longer, mask), torch.zeros(2, 3, 5, 2 * HEAD_DIM))


@torch.no_grad()
def test_a_sample_of_a_batch_is_the_sample_alone_bit_for_bit_whatever_its_mates_masks() -> None:
    sizes = Sizes(4, 3, 33, 33)
    query, key, value = draw(sizes)
    mask = draw_mask((4, 3, 33, 33), "bool")
    mask[1], mask[2] = True, mask[2, :1, :1]
    together = attention(query, key, value, mask)
    for i in range(4):
        assert torch.equal(together[i], attention(query[i, None], key[i, None], value[i, None], mask[i, None])[0])
    assert torch.equal(together[1], attention(query[1, None], key[1, None], value[1, None])[0])


def test_a_learned_mask_gets_its_gradient_at_every_step_even_from_zero() -> None:
    qkv, bias = draw(Sizes(2, 3, 5, 7)), torch.zeros(3, 5, 7, requires_grad=True)
    for _ in range(2):
        attention(*qkv, bias).square().sum().backward()
    (expected,) = torch.autograd.grad(softmax_attention(*qkv, bias[None]).square().sum(), bias)
    torch.testing.assert_close(bias.grad, 2 * expected)


# -- what a mask costs -----------------------------------------------------------------------------


class Looks(TorchDispatchMode):
    """Counts the operations that read a tensor's values back: on a GPU, each waits for the device."""

    READS = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "unique")
    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += any(read in func.name() for read in self.READS)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What PyTorch's attention is called with: keys, and the mask."""
    calls: list[dict[str, Any]] = []
    real = backends.scaled_dot_product_attention

    def spy(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        calls.append({"keys": key.shape[2], "mask": attn_mask})
        return real(query, key, value, attn_mask=attn_mask)

    monkeypatch.setattr(backends, "scaled_dot_product_attention", spy)
    return calls


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("additive", [False, True])
@torch.no_grad()
def test_a_mask_that_masks_nothing_runs_the_unmasked_kernel(form: str, additive: bool, kernel: list) -> None:
    sizes = Sizes(2, 3, 5, 7)
    qkv = draw(sizes)
    mask = torch.zeros(sizes.of(form)) if additive else torch.ones(sizes.of(form), dtype=torch.bool)
    assert torch.equal(attention(*qkv, mask, axes=form), attention(*qkv))
    assert [call["mask"] for call in kernel] == [None] * 4


@torch.no_grad()
def test_a_mask_of_keys_alone_leaves_them_out_and_needs_no_mask(kernel: list) -> None:
    qkv, mask = draw(Sizes(2, 3, 5, 7)), torch.ones(2, 7, dtype=torch.bool)
    mask[0, 3:] = False
    for form in (mask, mask[:, None, None], torch.zeros(2, 7).masked_fill(~mask, NEVER)):
        kernel.clear()
        attention(*qkv, form)
        assert kernel == [{"keys": 3, "mask": None}, {"keys": 7, "mask": None}]


@pytest.mark.parametrize("kind", ["bool", "additive", "ones"])
@torch.no_grad()
def test_a_mask_is_looked_into_once_and_again_when_it_was_written_to(kind: str) -> None:
    sizes = Sizes(2, 3, 5, 7)
    qkv = draw(sizes, torch.bfloat16)
    mask = torch.ones(2, 3, 5, 7, dtype=torch.bool) if kind == "ones" else draw_mask((2, 3, 5, 7), kind)
    with Looks() as first:
        attention(*qkv, mask)
    assert first.count
    with Looks() as second:
        attention(*qkv, mask)
    assert not second.count
    mask[1, 2, 3] = False if mask.dtype == torch.bool else NEVER
    assert off(attention(*qkv, mask), softmax_attention(*qkv, mask)) < 2e-2
    assert (attention(*qkv, mask)[1, 2, 3] == 0).all()


def test_what_is_kept_of_a_mask_is_forgotten_with_it_and_is_never_much() -> None:
    gc.collect()
    before = len(masks._RESULTS)
    for kind in ("bool", "additive", "zeros and -inf", "an empty row nowhere"):
        mask = draw_mask((2, 3, 5, 7), kind) if " row" not in kind else torch.ones(5, 7).tril() > 0
        attention(*draw(Sizes(2, 3, 5, 7), torch.bfloat16), mask)
        assert len(masks._RESULTS) > before
        del mask
        gc.collect()
        assert len(masks._RESULTS) == before
    tensor, found = torch.ones(1), []
    for key in range(100):
        once(tensor, key, lambda: found.append(0))
    assert len(found) == 100
    assert len(masks._RESULTS[tensor][1]) <= masks.KEPT


def test_masks_and_rules_that_were_met_in_inference_mode_serve_training_next() -> None:
    sizes = Sizes(1, 3, 29, 29)
    qkv, prepared = draw(sizes, grad=True), (draw_mask((29,), "bool"), draw_mask((29, 29), "additive"))
    heads = HeadRules({0: own_frame, 1: own_pixel})
    rows = [part.detach()[0].transpose(0, 1).contiguous() for part in qkv]
    with torch.inference_mode():
        compiled = compile_rules(heads, 3, (2, 3, 4), 5, CPU)
        assert isinstance(compiled, RuleMask)
        assert not any(tensor.is_inference() for tensor in (*compiled.tokens, compiled.some, compiled.every))
        assert not compiled.block_mask.kv_indices.is_inference()
        ragged_attention(*rows, (29,), [compiled])
        for mask in prepared:
            attention(*(part.detach().clone() for part in qkv), mask)
    for mask in prepared:
        attention(*qkv, mask).sum().backward()
    ragged_attention(*(part.requires_grad_() for part in rows), (29,), [compiled]).sum().backward()
    with torch.inference_mode():
        own = torch.ones(29, dtype=torch.bool)  # counts no versions, so it is looked into each time
        attention(*(part.detach() for part in qkv), own)
        own[:] = False
        assert (attention(*(part.detach() for part in qkv), own) == 0).all()


# -- rules -----------------------------------------------------------------------------------------

SHAPES = [((3, 8, 9), 11), ((2, 16, 16), 0), ((1, 4, 5), 3), ((5, 7, 8), 5), ((4, 8, 16), 128), ((9, 4, 4), 1)]
"""Grids of patches and text tokens; two come to a multiple of 128."""
TILE = SlidingTile(2, 3, 4)


def seen_by(rule: Rule | None, grid: tuple[int, int, int], text: int) -> Tensor:
    """Token by token, from what the rules say of themselves."""
    video = list(itertools.product(*(range(size) for size in grid)))
    count = len(video) + text
    seen = torch.ones(count, count, dtype=torch.bool)
    if rule is None:
        return seen
    places = torch.tensor(video)
    frame, place, tile = places[:, 0], places[:, 1] * grid[2] + places[:, 2], places // torch.tensor([2, 3, 4])
    near = ((tile[:, None] - tile[None]).abs() <= 1).all(-1)
    pairs = {own_frame: frame[:, None] == frame, own_pixel: place[:, None] == place, TILE: near}
    seen[: len(video), : len(video)] = pairs[rule]
    return seen


def draw_rows(count: int, heads: int, seed: int = 0, grad: bool = False) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(count, heads, HEAD_DIM, generator=generator).requires_grad_(grad) for _ in range(3)]


def dense_rules(rows: list[Tensor], chosen: list[Rule | None], grid: tuple[int, int, int], text: int) -> Tensor:
    mask = torch.stack([seen_by(rule, grid, text) for rule in chosen])[None]
    out = softmax_attention(*(part.transpose(0, 1)[None] for part in rows), mask)
    return out[0].transpose(0, 1).flatten(1)


@pytest.mark.parametrize(("grid", "text"), SHAPES)
@pytest.mark.parametrize("backend", ["auto", "math"])
@pytest.mark.parametrize(
    "chosen",
    [
        [own_frame] * 2,
        [own_pixel] * 2,
        [TILE] * 2,
        [own_frame, own_pixel, TILE, None],
        [None, own_pixel, None, own_pixel, own_frame],
    ],
    ids=["own_frame", "own_pixel", "tile", "mixed", "mixed, some free"],
)
def test_rules_are_the_dense_mask_that_they_describe(
    chosen: list[Rule | None], backend: str, grid: tuple[int, int, int], text: int
) -> None:
    heads = HeadRules({head: rule for head, rule in enumerate(chosen) if rule is not None})
    mask, count = compile_rules(heads, len(chosen), grid, text, CPU), math.prod(grid) + text
    ours, theirs = (draw_rows(count, len(chosen), grad=True) for _ in range(2))
    found = ragged_attention(*ours, (count,), [mask], backend)
    expected = dense_rules(theirs, chosen, grid, text)
    assert off(found, expected) < 1e-6
    found.square().sum().backward()
    expected.square().sum().backward()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-5)


@given(
    grid=st.tuples(st.integers(1, 6), st.integers(1, 9), st.integers(1, 9)),
    text=st.integers(0, 140),
    chosen=st.lists(st.sampled_from([own_frame, own_pixel, TILE, None]), min_size=1, max_size=4),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
@torch.no_grad()
def test_any_rules_at_any_shape_are_the_dense_mask(
    grid: tuple[int, int, int], text: int, chosen: list[Rule | None], seed: int
) -> None:
    heads = HeadRules({head: rule for head, rule in enumerate(chosen) if rule is not None})
    mask, count = compile_rules(heads, len(chosen), grid, text, CPU), math.prod(grid) + text
    rows = [part.double() for part in draw_rows(count, len(chosen), seed)]
    found = ragged_attention(*rows, (count,), None if mask is None else [mask])
    assert off(found, dense_rules(rows, chosen, grid, text)) < 1e-12
    seen = torch.stack([seen_by(rule, grid, text) for rule in chosen])
    assert (mask is None) == bool(seen.all())


def test_blocks_that_are_masked_altogether_are_not_computed(kernel: list) -> None:
    mask = compile_rules(HeadRules({0: own_frame, 1: own_pixel}), 2, (8, 8, 16), 0, CPU)
    assert isinstance(mask, RuleMask)
    ragged_attention(*draw_rows(1024, 2), (1024,), [mask])
    frames = [call for call in kernel if call["keys"] == 128]
    assert len(frames) == 8
    assert all(call["mask"] is None for call in frames)  # a frame is a block, and all of it is seen
    assert mask.masked == (1 - 1 / 8) / 2  # the blocks of the one head; the other sees a pixel of each block


def test_rules_are_compiled_once_a_shape_and_rules_that_are_equal_are_the_same() -> None:
    def built() -> HeadRules:
        return HeadRules({range(2): own_frame, (2, 3): SlidingTile(2, 4, 4), 5: own_pixel})

    asked = []

    def counted(query: Any, key: Any) -> Tensor:
        asked.append(0)
        return own_frame(query, key)

    assert compile_rules(built(), 6, (3, 8, 9), 11, CPU) is compile_rules(built(), 6, (3, 8, 9), 11, CPU)
    assert compile_rules(built(), 6, (3, 8, 9), 12, CPU) is not compile_rules(built(), 6, (3, 8, 9), 11, CPU)
    first = compile_rules(HeadRules({0: counted}), 2, (3, 8, 9), 11, CPU)
    times = len(asked)
    assert compile_rules(HeadRules({0: counted}), 2, (3, 8, 9), 11, CPU) is first
    assert len(asked) == times
    assert compile_rules(HeadRules({}), 6, (3, 8, 9), 11, CPU) is None
    assert compile_rules(HeadRules({0: own_frame}), 6, (1, 8, 9), 11, CPU) is None  # one frame sees all of it


def test_no_tensor_of_a_rule_has_a_value_for_every_pair_of_tokens() -> None:
    frames = 512  # of 4 × 4: every block of own_pixel has pairs of both kinds, the worst case
    count = frames * 16
    with LargestTensor() as probe:
        mask = compile_rules(HeadRules({0: own_pixel}), 1, (frames, 4, 4), 0, CPU)
    assert isinstance(mask, RuleMask)
    assert probe.numel <= 2 * rules.BLOCK * count
    with LargestTensor() as probe:
        ragged_attention(*draw_rows(count, 1), (count,), [mask])
    assert probe.numel <= rules.MERGED * rules.BLOCK * count < count**2 / 7
    spans = [span.blocks for call in mask.calls for span in (call.queries, call.keys) if span.blocks is not None]
    assert sum(tensor.numel() for tensor in (*mask.tokens, mask.some, mask.every, *spans)) < 6 * count


def test_a_rule_that_leaves_a_token_nothing_is_refused() -> None:
    def never(query: Any, key: Any) -> Tensor:
        return (query.frame != query.frame) & (key.frame == 0)

    with pytest.raises(ValueError, match=r"never.*let each see at least itself"):
        compile_rules(HeadRules({1: never}), 2, (2, 3, 4), 5, CPU)


@pytest.mark.parametrize(
    ("named", "said"),
    [({0: own_frame, range(2): own_pixel}, r"\[0\]"), ({(1, 1): own_frame}, r"\[1\]"), ({-1: own_frame}, "-1")],
)
def test_heads_are_named_once_and_counted_from_zero(named: dict, said: str) -> None:
    with pytest.raises(ValueError, match=f"wrong are {said}"):
        HeadRules(named)


def test_a_head_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="for head 24, but there are 24: 0 to 23"):
        compile_rules(HeadRules({24: own_frame}), 24, (2, 3, 4), 5, CPU)


def test_rules_have_names_and_anyone_can_give_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "_REGISTERED", dict(rules._REGISTERED))
    register_rule("first-head", lambda heads: HeadRules({0: own_frame}))
    assert rule_named("first-head", 24) == HeadRules({0: own_frame})
    assert set(rule_names()) == {"own-frame", "spatial-temporal", "sliding-tile", "first-head"}
    assert rule_named("own-frame", 3).of_head(3) == [own_frame] * 3
    assert rule_named("spatial-temporal", 5).of_head(5) == [own_frame] * 2 + [own_pixel] * 3
    with pytest.raises(KeyError, match="no attention rule is named 'own frame'; did you mean 'own-frame'"):
        rule_named("own frame", 3)
    with pytest.raises(KeyError, match="registered are first-head, own-frame"):
        rule_named("xyz", 3)


# -- in the network --------------------------------------------------------------------------------

HEADS = CONFIG["num_attention_heads"]
PATCHES = (3, 8, 8)  # with patch 1
VIDEO = math.prod(PATCHES)
MODEL = MODELS[1]


def branch_of(seed: int, mask: Tensor | HeadRules | None = None, text: int = 7) -> Branch:
    return dataclasses.replace(make_branch(seed, *PATCHES, text=text, timestep=900 - 100 * seed), mask=mask)


def masks_of(text: int = 7, seed: int = 0) -> dict[str, Tensor | HeadRules | None]:
    count = VIDEO + text
    return {
        "none": None,
        "own frame": HeadRules({range(HEADS): own_frame}),
        "mixed": HeadRules({0: own_pixel, 1: SlidingTile(1, 4, 4)}),
        "one head": HeadRules({1: own_frame}),
        "keys": draw_mask((count,), "bool", seed),
        "queries and keys": draw_mask((count, count), "additive", seed),
        "heads": draw_mask((HEADS, count, count), "bool", seed),
        "four axes": draw_mask((1, 1, count, count), "zeros and -inf", seed),
        "all ones": torch.ones(count, count, dtype=torch.bool),
    }


@torch.no_grad()
def test_rules_in_the_network_are_their_dense_masks() -> None:
    plain = alone(MODEL, branch_of(0))
    for chosen in ([own_frame, own_frame], [own_pixel, TILE], [None, own_frame]):
        heads = HeadRules({head: rule for head, rule in enumerate(chosen) if rule is not None})
        dense = torch.stack([seen_by(rule, PATCHES, 7) for rule in chosen])
        found = alone(MODEL, branch_of(0, heads))
        assert relative_error(found, alone(MODEL, branch_of(0, dense))) < 1e-5
        assert relative_error(found, plain) > 1e-3


@given(
    names=st.lists(st.sampled_from(list(masks_of())), min_size=1, max_size=4),
    texts=st.lists(st.integers(1, 20), min_size=4, max_size=4),
)
@settings(max_examples=15, deadline=None)
@torch.no_grad()
def test_every_mask_in_a_batch_gives_what_it_gives_alone(names: list[str], texts: list[int]) -> None:
    branches = [branch_of(i, masks_of(text, i)[name], text) for i, (name, text) in enumerate(zip(names, texts))]  # noqa: B905
    solo = [alone(MODEL, branch) for branch in branches]
    for (exact,), packed, expected in zip(
        MODEL(packs=[[branch] for branch in branches]), MODEL(packs=[branches])[0], solo, strict=True
    ):
        assert torch.equal(exact, expected)
        assert relative_error(packed, expected) < 1e-5


@pytest.mark.parametrize("name", list(masks_of()))
@torch.no_grad()
def test_the_mask_of_one_sample_does_not_touch_its_mates(name: str) -> None:
    """In one pack too, bit for bit: only the sample that has another mask may change."""
    mates = [branch_of(1), branch_of(2, masks_of()["mixed"]), branch_of(3, masks_of()["heads"])]
    plain = MODEL(packs=[[branch_of(0), *mates]])[0]
    found = MODEL(packs=[[branch_of(0, masks_of()[name]), *mates]])[0]
    assert all(torch.equal(*pair) for pair in zip(found[1:], plain[1:], strict=True))
    assert torch.equal(found[0], plain[0]) == (name in ("none", "all ones"))


def test_a_mask_of_a_wrong_shape_names_the_samples_own_sizes() -> None:
    with pytest.raises(MaskShapeError, match=r"\[8, 8\] does not fit.*query \[1, 2, 199, D\]"):
        alone(MODEL, branch_of(0, torch.ones(8, 8, dtype=torch.bool)))


def test_the_backend_that_was_set_computes_the_joint_attention_or_refuses() -> None:
    model = ours_from(REFERENCES[1])
    expected = alone(model, branch_of(0, masks_of()["mixed"]))
    model.set_attention_backend("math")
    assert relative_error(alone(model, branch_of(0, masks_of()["mixed"])), expected) < 1e-5
    model.set_attention_backend("varlen")
    with pytest.raises(AttentionBackendError, match="varlen_attn runs on CUDA alone"):
        alone(model, branch_of(0))


@pytest.mark.parametrize("name", ["mixed", "queries and keys"])
def test_training_under_a_mask_gives_finite_gradients_and_they_are_the_samples_own(name: str) -> None:
    model = ours_from(REFERENCES[1]).train()
    branches = [branch_of(0, masks_of()[name]), branch_of(1)]
    model(packs=[branches])[0][0].square().sum().backward()
    packed = {key: parameter.grad.clone() for key, parameter in model.named_parameters()}
    model.zero_grad()
    alone(model, branches[0]).square().sum().backward()
    largest = max(gradient.abs().max().item() for gradient in packed.values())
    for key, parameter in model.named_parameters():
        assert packed[key].isfinite().all()
        torch.testing.assert_close(packed[key], parameter.grad, rtol=1e-3, atol=1e-6 * largest)


# -- Diffusers' signature --------------------------------------------------------------------------

PADDED = 12
JOINT = VIDEO + PADDED
REAL = [[0, 1, 2, 3, 4], list(range(PADDED)), [5, 6, 7, 9, 10, 11]]
"""Which text tokens of three samples are real: padded on the right, not at all, on the left with a hole."""


def padded_call(branches: list[Branch], **kwargs: Any) -> Tensor:
    """The branches' texts at their places in a padded batch."""
    text, real = torch.full((len(branches), PADDED, CONFIG["text_embed_dim"]), 7.0), torch.zeros(len(branches), PADDED)
    for row, branch in enumerate(branches):
        text[row, REAL[row]], real[row, REAL[row]] = branch.text, 1
    model = kwargs.pop("model", MODEL)
    return model(
        hidden_states=torch.stack([branch.latents for branch in branches]),
        timestep=torch.stack([branch.timestep for branch in branches]),
        encoder_hidden_states=text,
        encoder_attention_mask=real,
        pooled_projections=torch.stack([branch.pooled for branch in branches]),
        guidance=torch.stack([branch.guidance for branch in branches]),
        attention_kwargs=kwargs,
        return_dict=False,
    )[0]


def three(chosen: Callable[[int], Tensor | HeadRules | None] = lambda row: None) -> list[Branch]:
    return [branch_of(row, chosen(row), len(REAL[row])) for row in range(3)]


@pytest.mark.parametrize("isolation", ["exact", "packed"])
@pytest.mark.parametrize("kind", ["bool", "additive"])
@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_a_mask_over_video_and_padded_text_is_each_samples_own_part_of_it(form: str, kind: str, isolation: str) -> None:
    model = ours_from(REFERENCES[1])
    model.isolation = isolation
    mask = draw_mask(Sizes(3, HEADS, JOINT, JOINT).of(form), kind)
    read = four_axes(mask, form).expand(3, HEADS, JOINT, JOINT)

    def own(row: int) -> Tensor:
        places = torch.tensor([*range(VIDEO), *(VIDEO + token for token in REAL[row])])
        return read[row][:, places][:, :, places]

    found = padded_call(three(), model=model, attention_mask=mask)
    for row, branch in enumerate(three(own)):
        assert relative_error(found[row], alone(MODEL, branch)) < 1e-5
        assert relative_error(found[row], alone(MODEL, three()[row])) > 1e-4
    if isolation == "exact":
        again = [padded_call([branch], attention_mask=mask_of(mask, form, 0))[0] for branch in three()[:1]]
        assert torch.equal(found[0], again[0])


def mask_of(mask: Tensor, form: str, row: int) -> Tensor:
    return mask[row, None] if form.startswith("B") else mask


@torch.no_grad()
def test_rules_for_all_samples_or_one_a_sample() -> None:
    all_rules = [HeadRules({0: own_frame}), None, HeadRules({0: own_pixel, 1: TILE})]
    for given_rules, own in ((all_rules, all_rules), (all_rules[2], [all_rules[2]] * 3)):
        found = padded_call(three(), attention_rules=given_rules)
        for row, branch in enumerate(three(lambda row, own=own: own[row])):
            assert torch.equal(found[row], alone(MODEL, branch))
    assert torch.equal(padded_call(three(), attention_rules=None), padded_call(three()))


@torch.no_grad()
def test_masks_and_rules_are_looked_into_once_for_all_layers_and_steps() -> None:
    mask = draw_mask((3, JOINT, JOINT), "additive")
    branches = three()
    text, real = torch.randn(3, PADDED, CONFIG["text_embed_dim"]), torch.ones(3, PADDED)

    def step(**kwargs: Any) -> None:
        MODEL(
            torch.stack([branch.latents for branch in branches]),
            torch.stack([branch.timestep for branch in branches]),
            text,
            real,
            torch.stack([branch.pooled for branch in branches]),
            torch.stack([branch.guidance for branch in branches]),
            attention_kwargs=kwargs,
        )

    for kwargs in ({"attention_mask": mask}, {"attention_rules": HeadRules({0: own_frame, 1: TILE})}, {}):
        step(**kwargs)
        with Looks() as later:
            step(**kwargs)
            step(**kwargs)
        assert not later.count


@torch.no_grad()
def test_what_diffusers_signature_refuses() -> None:
    rule, mask = HeadRules({0: own_frame}), draw_mask((2, JOINT, JOINT), "bool")
    with pytest.raises(ValueError, match="both attention_mask and attention_rules"):
        padded_call(three(), attention_mask=mask, attention_rules=rule)
    with pytest.raises(ValueError, match="attention_rules has 2 entries for 3 samples"):
        padded_call(three(), attention_rules=[rule, None])
    with pytest.raises(MaskShapeError, match=r"query \[3, 2, 204, D\]"):
        padded_call(three(), attention_mask=mask[..., :-1])
    with pytest.raises(MaskShapeError, match=r"can be read in two ways.*axes='BQK'"):  # 2 samples and 2 heads
        padded_call(three()[:2], attention_mask=mask)
    by_samples = padded_call(three()[:2], attention_mask=mask, attention_mask_axes="BQK")
    by_heads = padded_call(three()[:2], attention_mask=mask, attention_mask_axes="HQK")
    assert torch.equal(by_samples, padded_call(three()[:2], attention_mask=mask[:, None]))
    assert torch.equal(by_heads, padded_call(three()[:2], attention_mask=mask[None]))
    assert not torch.equal(by_samples, by_heads)
