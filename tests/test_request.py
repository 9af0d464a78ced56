"""Requests: what is refused at the door and what the message says; defaults, copies."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reelbatch.request import FIELDS, SEED_LIMIT, ModelLimits, Problem, RequestDefaults, RequestError, VideoRequest

REAL = ModelLimits()
LITTLE = ModelLimits(8, 4, RequestDefaults(height=64, width=64, frames=9, steps=20, fps=8))


def refusal(**fields: object) -> str:
    with pytest.raises(RequestError) as caught:
        VideoRequest(**{"prompt": "a cat"} | fields)
    return str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": ""}, "prompt='' must say something"),
        ({"prompt": " \t\n\u3000"}, "must say something"),
        ({"prompt": 7}, "prompt=7 must be text"),
        ({"prompt": "a \ud83d cat"}, "character 3 is half of a pair"),
        ({"seed": -1}, "seed=-1 must be a whole number from 0 to 18446744073709551615; nearest: 0"),
        ({"seed": SEED_LIMIT}, "nearest: 18446744073709551615"),
        ({"seed": True}, "seed=True must be a whole number"),
        ({"seed": "5"}, "seed='5' must be a whole number"),
        ({"seed": None}, "seed=None must be"),
        ({"steps": 0}, "steps=0 must be a whole number from 1 to 1000; nearest: 1"),
        ({"steps": 2.5}, "steps=2.5 must be a whole number from 1 to 1000; nearest: 2 or 3"),
        ({"steps": 20.0}, "nearest: 20"),
        ({"steps": math.nan}, "steps=nan must be"),
        ({"steps": math.inf}, "steps=inf must be"),
        ({"height": 0}, "nearest: 1"),
        ({"width": 10**30}, "nearest: 16384"),
        ({"fps": 0}, "fps=0 must be a whole number from 1 to 240; nearest: 1"),
        ({"guidance": math.nan}, "guidance=nan must be a number, 0 or more, and finite"),
        ({"guidance": 10**400}, "and finite"),
        ({"guidance": -1}, "nearest: 0"),
        ({"guidance": False}, "guidance=False must be a number"),
        ({"true_cfg": 0.5}, "true_cfg=0.5 must be a number, 1 (off) or more; nearest: 1"),
        ({"flow_shift": 0}, "flow_shift=0 must be a number above 0"),
        (
            {"vae_tiling": 100},
            "vae_tiling=100 must be 0 (whole) or a multiple of 32 from 64 to 1024; nearest: 0 or 256",
        ),
        ({"vae_tiling": 32}, "must be 0 (whole) or"),
        ({"vae_tiling": True}, "vae_tiling=True must be 0 (whole) or"),
        ({"flow_shift": -math.inf}, "and finite"),
        ({"id": "a\nb"}, "id='a\\nb' must be printable"),
        ({"id": ""}, "must say something"),
        ({"tags": "cats"}, "must be a list of texts"),
        ({"tags": [" "]}, "must say something"),
        ({"step": 20}, "step: no such field; did you mean steps?"),
        ({"Negative-Prompt": ""}, "did you mean negative_prompt?"),
        ({"zzz": 1}, "the fields are prompt, prompt_2"),
    ],
)
def test_refusal_names_field_value_and_remedy(fields: dict[str, object], message: str) -> None:
    assert message in refusal(**fields)


def test_every_fault_is_named_at_once() -> None:
    with pytest.raises(RequestError) as caught:
        VideoRequest(prompt="", steps=0, sed=1)
    assert {problem.field for problem in caught.value.problems} == {"prompt", "steps", "sed"}
    with pytest.raises(RequestError, match="prompt is missing"):
        VideoRequest()


def test_long_values_are_cut_in_messages() -> None:
    assert len(refusal(steps="x" * 10_000)) < 200


def test_numbers_of_numpy_are_numbers() -> None:
    request = VideoRequest(prompt="a cat", steps=np.int64(7), guidance=np.float32(1.5))
    assert (request.steps, request.guidance) == (7, 1.5)
    assert type(request.steps) is int
    assert type(request.guidance) is float
    assert "seed" in refusal(seed=np.True_)
    assert "steps" in refusal(steps=np.array([1.5]))


def test_a_request_is_frozen_hashable_and_travels() -> None:
    request = VideoRequest(prompt="a cat", tags=["night"])
    with pytest.raises(ValueError, match="frozen"):
        request.seed = 3  # type: ignore[misc]
    assert hash(request) == hash(request.model_copy())
    assert pickle.loads(pickle.dumps(request)) == request
    assert VideoRequest(**request.model_dump(mode="json")) == request


def test_seed_and_id_are_drawn_and_differ() -> None:
    requests = [VideoRequest(prompt="a cat") for _ in range(50)]
    assert len({request.id for request in requests}) == 50
    assert len({request.seed for request in requests}) > 45
    assert all(0 <= request.seed < 2**32 for request in requests)


def test_copies_have_their_own_seeds_and_ids() -> None:
    copies = VideoRequest(prompt="a cat", seed=SEED_LIMIT - 2, id="cat").copies(3)
    assert [copy.seed for copy in copies] == [SEED_LIMIT - 2, SEED_LIMIT - 1, 0]
    assert [copy.id for copy in copies] == ["cat-0", "cat-1", "cat-2"]
    for count in (0, -1, True, 2.0):
        with pytest.raises(RequestError, match="copies="):
            VideoRequest(prompt="a cat").copies(count)  # type: ignore[arg-type]


@pytest.mark.parametrize("length", [190, 198, 200])
def test_copies_of_a_long_id_are_requests_too(length: int) -> None:
    copies = VideoRequest(prompt="a cat", id="x" * length).copies(11)
    assert len({copy.id for copy in copies}) == 11
    assert [VideoRequest(**copy.model_dump()) for copy in copies] == copies
    others = VideoRequest(prompt="a cat", id="x" * (length - 1) + "y").copies(11)
    assert not {copy.id for copy in copies} & {copy.id for copy in others}


def test_open_fields_are_the_models_own() -> None:
    filled = VideoRequest(prompt="a cat", steps=5).for_model(LITTLE)
    assert (filled.height, filled.width, filled.frames, filled.steps, filled.fps) == (64, 64, 9, 5, 8)
    assert filled.guidance == 6.0
    assert filled.flow_shift is None
    assert filled.for_model(LITTLE) == filled
    real = VideoRequest(prompt="a cat").for_model(REAL)
    assert (real.height, real.width, real.frames, real.steps, real.fps) == (720, 1280, 129, 50, 24)


def test_what_the_model_cannot_make_is_refused_with_the_nearest() -> None:
    with pytest.raises(RequestError) as caught:
        VideoRequest(prompt="a cat", height=100, width=8, frames=11).for_model(REAL)
    height, width, frames = (problem.message for problem in caught.value.problems)
    assert height == "height=100 must be a multiple of 16 for this model; nearest: 96 or 112"
    assert width == "width=8 must be a multiple of 16 for this model; nearest: 16"
    assert frames == "frames=11 must be 4·k + 1 (1, 5, 9, …) for this model; nearest: 9 or 13"


def test_attention_rules_are_those_of_the_model() -> None:
    request = VideoRequest(prompt="a cat", attention_rule="own-fram")
    assert request.for_model(REAL).attention_rule == "own-fram"  # a model that names none is not asked
    names = ["own-frame", "sliding-tile"]
    limits = ModelLimits(attention_rules=lambda: names)
    with pytest.raises(RequestError, match="'own-fram' is not registered; did you mean 'own-frame'"):
        request.for_model(limits)
    names.append("own-fram")  # rules may be registered later
    assert request.for_model(limits).attention_rule == "own-fram"


@given(
    height=st.integers(1, 5000),
    width=st.integers(1, 5000),
    frames=st.integers(1, 500),
    spatial=st.sampled_from([8, 16, 32]),
    temporal=st.sampled_from([1, 4, 8]),
)
def test_accepted_exactly_when_on_the_grid_and_the_nearest_are_accepted(
    height: int, width: int, frames: int, spatial: int, temporal: int
) -> None:
    limits = ModelLimits(spatial, temporal, LITTLE.defaults)
    request = VideoRequest(prompt="a cat", height=height, width=width, frames=frames)
    fits = height % spatial == 0 and width % spatial == 0 and frames % temporal == 1 % temporal
    try:
        assert request.for_model(limits).frames == frames
        assert fits
    except RequestError as error:
        assert not fits
        for problem in error.problems:
            for value in problem.message.split("nearest: ")[1].split(" or "):
                good = {"height": spatial, "width": spatial, "frames": 1} | {str(problem.field): int(value)}
                VideoRequest(prompt="a cat", **good).for_model(limits)


@given(prompt=st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])))
def test_any_text_that_says_something_is_kept_as_it_is(prompt: str) -> None:
    if prompt.strip():
        assert VideoRequest(prompt=prompt).prompt == prompt
    else:
        assert "prompt=" in refusal(prompt=prompt)


@given(
    st.dictionaries(
        st.sampled_from(FIELDS) | st.text(min_size=1, max_size=8),
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.lists(st.text(max_size=3)),
        max_size=5,
    )
)
def test_whatever_is_asked_there_is_a_request_or_a_request_error(fields: dict[str, object]) -> None:
    problems: tuple[Problem, ...] = ()
    try:
        request = VideoRequest(**fields)
    except RequestError as error:
        problems = error.problems
    else:
        assert VideoRequest(**request.model_dump(mode="json")) == request
        return
    assert problems
    assert all(str(problem.field) in problem.message for problem in problems)


@pytest.mark.parametrize(
    ("fields", "uses"),
    [
        ({}, False),
        ({"true_cfg": 4.0}, False),
        ({"negative_prompt": "blurry"}, False),
        ({"negative_prompt": "", "true_cfg": 4.0}, True),
    ],
)
def test_cfg_needs_a_scale_and_a_negative_prompt(fields: dict[str, object], uses: bool) -> None:
    assert VideoRequest(prompt="a cat", **fields).uses_cfg is uses


def test_what_earlier_versions_did_not_know_is_written_only_where_it_says_something() -> None:
    request = VideoRequest(prompt="a cat")
    assert "vae_tiling" not in request.model_dump(mode="json")
    assert "vae_tiling" not in request.model_dump_json()
    for side in (0, 256):
        tiled = request.model_copy(update={"vae_tiling": side})
        assert tiled.model_dump(mode="json")["vae_tiling"] == side
        assert VideoRequest(**tiled.model_dump(mode="json")) == tiled


def test_a_character_that_no_database_and_no_file_name_holds_is_refused() -> None:
    with pytest.raises(RequestError, match="must not hold the character NUL, and character 2 is one"):
        VideoRequest(prompt="a\0b")
