"""Prompt files: every prompt comes back as it was written, and every fault is named with its line."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reelbatch.jobs.prompts import Entry, PromptError, make_requests, read_prompts
from reelbatch.request import SEED_LIMIT, ModelLimits, VideoRequest

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def faults(path: Path, **defaults: object) -> list[str]:
    with pytest.raises(PromptError) as caught:
        read_prompts(path, **defaults)
    return [str(fault) for fault in caught.value.faults]


prompts = st.text().filter(str.strip)


@given(prompts=st.lists(prompts, min_size=1), end=st.sampled_from(["\n", "\r\n"]), mark=st.booleans())
def test_any_prompt_in_jsonl_comes_back(
    tmp_path_factory: pytest.TempPathFactory, prompts: list[str], end: str, mark: bool
) -> None:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    lines = [json.dumps({"prompt": prompt}, ensure_ascii=bool(i % 2)) for i, prompt in enumerate(prompts)]
    path.write_bytes(end.join(lines).encode("utf-8-sig" if mark else "utf-8"))
    assert [request.prompt for request in read_prompts(path)] == prompts


@given(prompts=st.lists(prompts, min_size=1), mark=st.booleans())
def test_any_prompt_in_csv_comes_back(tmp_path_factory: pytest.TempPathFactory, prompts: list[str], mark: bool) -> None:
    path = tmp_path_factory.mktemp("prompts") / "prompts.csv"
    text = io.StringIO(newline="")
    csv.writer(text).writerows([["seed", "prompt"], *([i, prompt] for i, prompt in enumerate(prompts))])
    path.write_bytes(text.getvalue().encode("utf-8-sig" if mark else "utf-8"))
    assert [(request.prompt, request.seed) for request in read_prompts(path)] == [(p, i) for i, p in enumerate(prompts)]


lines = st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"])).map(str.strip).filter(bool)


@given(prompts=st.lists(lines, min_size=1), end=st.sampled_from(["\n", "\r\n", "\r"]), mark=st.booleans())
def test_any_line_of_a_txt_comes_back(
    tmp_path_factory: pytest.TempPathFactory, prompts: list[str], end: str, mark: bool
) -> None:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    text = end.join(["# a comment", *("\\" + p if p.startswith(("#", "\\#")) else p for p in prompts)])
    path.write_bytes(text.encode("utf-8-sig" if mark else "utf-8"))
    assert [request.prompt for request in read_prompts(path)] == prompts


def test_txt_skips_comments_and_blank_lines(write: Write) -> None:
    path = write("prompts.txt", "# cats\n\n  a cat  \r\n\t\n   # indented\n\\# first prize\n")
    assert [request.prompt for request in read_prompts(path, steps=7)] == ["a cat", "# first prize"]
    assert all(request.steps == 7 for request in read_prompts(path, steps=7))


EVERYTHING = {
    "prompt": "a cat",
    "prompt_2": "cat",
    "negative_prompt": "a dog",
    "seed": SEED_LIMIT - 1,
    "height": 64,
    "width": 96,
    "frames": 13,
    "steps": 4,
    "guidance": 3.5,
    "true_cfg": 2.0,
    "flow_shift": 5.0,
    "attention_rule": "own-frame",
    "fps": 12,
    "id": "tom",
    "tags": ["night", "fur"],
}


def test_every_field_can_be_set_in_a_line(write: Write) -> None:
    assert set(EVERYTHING) == set(VideoRequest.model_fields)
    expected = VideoRequest(**EVERYTHING)
    cells = EVERYTHING | {"tags": "night; fur"}
    row = ";".join(f'"{cell}"' for cell in cells.values())
    assert read_prompts(write("a.jsonl", json.dumps(EVERYTHING)), steps=9) == [expected]
    assert read_prompts(write("a.csv", ";".join(cells) + "\n" + row), steps=9) == [expected]
    assert read_prompts(write("a.tsv", "\t".join(cells) + "\n" + "\t".join(map(str, cells.values())))) == [expected]


def test_a_line_overrides_the_defaults_and_an_empty_cell_does_not(write: Write) -> None:
    requests = read_prompts(write("a.csv", "prompt,steps,guidance\na,5,\nb,,2\n\n"), steps=9, guidance=1.0)
    assert [(request.steps, request.guidance) for request in requests] == [(5, 1.0), (9, 2.0)]
    (request,) = read_prompts(write("a.jsonl", '{"prompt": "a", "steps": null}'), steps=9)
    assert request.steps is None


def test_jsonl_takes_bare_strings(write: Write) -> None:
    assert [request.prompt for request in read_prompts(write("a.jsonl", '"a cat"\n\n{"prompt": "a dog"}'))] == [
        "a cat",
        "a dog",
    ]


def test_copies_of_a_line(write: Write) -> None:
    requests = read_prompts(write("a.csv", "prompt,copies,seed,id\na cat,3,7,tom\na dog,,1,rex"))
    assert [(request.id, request.seed) for request in requests] == [
        ("tom-0", 7),
        ("tom-1", 8),
        ("tom-2", 9),
        ("rex", 1),
    ]


def test_all_faults_of_a_file_are_said_at_once_with_their_lines(write: Write) -> None:
    text = '{"prompt": "a", "step": 3}\n{"prompt": "a"\n\n[1]\n{"prompt": "b", "guidance": NaN, "steps": 0}'
    assert faults(write("a.jsonl", text)) == [  # first what cannot be read …
        "a.jsonl, line 2: column 15: not JSON: Expecting ',' delimiter",
        'a.jsonl, line 4: expected a JSON object, as in {"prompt": "a cat"}',
    ]
    text = '{"prompt": "a", "step": 3}\n\n{"prompt": "b", "guidance": NaN, "steps": 0}'
    assert faults(write("a.jsonl", text)) == [  # … then what cannot be made
        "a.jsonl, line 1: step: no such field; did you mean steps?",
        "a.jsonl, line 3: steps=0 must be a whole number from 1 to 1000; nearest: 1",
        "a.jsonl, line 3: guidance=nan must be a number, 0 or more, and finite",
    ]


def test_faults_of_a_csv_name_the_line_the_row_begins_at(write: Write) -> None:
    text = 'prompt,steps\n"two\nlines",5\na cat,ten\na cat,2.5\na cat\na, cat,3\n" ",4\n'
    assert faults(write("a.csv", text.replace("a cat\na, cat,3\n", ""))) == [
        "a.csv, line 4: steps='ten' must be a whole number from 1 to 1000",
        "a.csv, line 5: steps=2.5 must be a whole number from 1 to 1000; nearest: 2 or 3",
        "a.csv, line 6: prompt=' ' must say something, and is empty",
    ]
    assert faults(write("a.csv", text)) == [
        "a.csv, line 6: has 1 cells, and the header 2; quote a cell that holds a ','",
        "a.csv, line 7: has 3 cells, and the header 2; quote a cell that holds a ','",
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "promt,steps\na cat,3", "column 'promt': no such field; did you mean prompt?"),
        ("a.csv", "steps\n3", "the header must name a column 'prompt', and names steps"),
        ("a.csv", "", "the header must name a column 'prompt', and names nothing"),
        ("a.csv", "prompt,prompt\na,b", "column 'prompt' is there twice"),
        ("a.csv", 'prompt\n"a cat', "line 2: not CSV"),
        ("a.csv", "prompt,copies\na cat,0", "copies=0 must be a whole number, 1 or more; nearest: 1"),
        ("a.jsonl", '{"prompt": "a", "prompt": "b"}', "prompt is given twice"),
        ("a.jsonl", "[" * 100_000, "line 1: not"),
        ("a.jsonl", '{"prompt": "a", "seed": ' + "9" * 5000 + "}", "not usable JSON"),
        ("a.jsonl", '{"prompt": "\\ud83d"}', "half of a pair"),
        ("a.jsonl", '{"seed": 1}', "line 1: prompt is missing"),
        ("a.json", "[]", "name the file .jsonl"),
        ("a.txt", "# nothing\n", "holds no prompt"),
        ("a.txt", b"a cat\ncaf\xe9\n", "a.txt, line 2: byte 0xe9 is not UTF-8"),
    ],
)
def test_bad_files_are_refused_in_words(write: Write, name: str, content: str | bytes, message: str) -> None:
    assert message in faults(write(name, content))[0]


def test_missing_files_and_folders(tmp_path: Path) -> None:
    assert "no such file" in faults(tmp_path / "none.txt")[0]
    assert "cannot be read" in faults(tmp_path)[0]


def test_utf_16_with_a_mark_is_read(write: Write) -> None:
    assert read_prompts(write("a.txt", "ein Kätzchen\r\n".encode("utf-16")))[0].prompt == "ein Kätzchen"


def test_ids_must_differ(write: Write) -> None:
    assert faults(write("a.csv", "prompt,id\na,x\nb,y\nc,x")) == [
        "a.csv, line 4: id='x' is taken by a.csv, line 2; ids must differ"
    ]


def test_many_faults_are_counted_not_listed(write: Write) -> None:
    with pytest.raises(PromptError, match="… and 80 more") as caught:
        read_prompts(write("a.csv", "prompt,steps\n" + "a,0\n" * 100))
    assert str(caught.value).count("\n") == 20


def seeds(*fields: dict[str, object], **options: int) -> list[int]:
    return [r.seed for r in make_requests([Entry(f"prompt {i}", f) for i, f in enumerate(fields)], **options)]


def test_equal_requests_without_a_seed_get_different_ones_and_always_the_same() -> None:
    cat, dog = {"prompt": "a cat"}, {"prompt": "a dog"}
    assert seeds(cat, dog, cat, cat, first_seed=5) == [5, 5, 6, 7]
    assert seeds(cat | {"copies": 3}, cat, dog, first_seed=0) == [0, 1, 2, 3, 0]
    assert seeds(cat, cat | {"steps": 3}, cat | {"seed": 9}, cat, first_seed=0) == [0, 0, 9, 1]
    assert seeds(cat | {"id": "x"}, cat | {"tags": ["y"]}, first_seed=SEED_LIMIT - 1) == [SEED_LIMIT - 1, 0]


def test_a_first_seed_outside_64_bits_is_refused() -> None:
    for seed in (-1, SEED_LIMIT):
        with pytest.raises(PromptError, match=f"prompt 0: seed={seed} must be"):
            seeds({"prompt": "a cat"}, first_seed=seed)


def test_what_the_model_cannot_make_is_found_with_its_line() -> None:
    with pytest.raises(PromptError, match="line 9: frames=10 must be"):
        make_requests([Entry("line 9", {"prompt": "a cat", "frames": 10})], limits=ModelLimits())
    (request,) = make_requests([Entry("line 9", {"prompt": "a cat"})], limits=ModelLimits())
    assert request.height == 720
