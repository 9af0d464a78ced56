"""Prompt files: every prompt comes back as it was written, and every fault is named with its place."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from reelbatch.jobs.prompts import (
    MAX_COPIES,
    Entry,
    Fault,
    PromptError,
    make_requests,
    named_after,
    only_those,
    read_entries,
    read_prompts,
    shuffled,
)
from reelbatch.request import SEED_LIMIT, ModelLimits, VideoRequest
from reelbatch.wording import printable

Write = Callable[..., Path]

VBENCH = Path(__file__).parents[1] / "shared" / "data" / "vbench"
if not VBENCH.exists():
    VBENCH = Path(__file__).parents[2] / "shared" / "data" / "vbench"


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("prompts")


def faults(path: Path, **defaults: object) -> list[str]:
    with pytest.raises(PromptError) as caught:
        read_prompts(path, **defaults)
    return [str(fault) for fault in caught.value.faults]


# -- what is written comes back --------------------------------------------------------------------

letters = st.characters(exclude_characters="\0", exclude_categories=["Cs"])
prompts = st.lists(st.text(letters).filter(str.strip), min_size=1)
marks = st.booleans().map({True: "utf-8-sig", False: "utf-8"}.__getitem__)


@settings(deadline=None)
@given(prompts=prompts, end=st.sampled_from(["\n", "\r\n", "\r", "\n\n# a comment\n"]), codec=marks)
def test_any_prompt_in_jsonl_comes_back(folder: Path, prompts: list[str], end: str, codec: str) -> None:
    path = folder / "prompts.jsonl"
    lines = [json.dumps({"prompt": prompt}, ensure_ascii=bool(i % 2)) for i, prompt in enumerate(prompts)]
    path.write_bytes(end.join(lines).encode(codec))
    assert [request.prompt for request in read_prompts(path)] == prompts


@settings(deadline=None)
@given(prompts=prompts, indent=st.sampled_from([None, 1]), ascii=st.booleans(), codec=marks, vbench=st.booleans())
def test_any_prompt_in_a_json_array_comes_back(
    folder: Path, prompts: list[str], indent: int | None, ascii: bool, codec: str, vbench: bool
) -> None:
    path = folder / "prompts.json"
    entries: list[Any] = [prompt if i % 2 else {"seed": i, "prompt": prompt} for i, prompt in enumerate(prompts)]
    if vbench:
        entries = [{"prompt_en": prompt, "dimension": ["a", "b"], "auxiliary_info": {"a": {}}} for prompt in prompts]
    path.write_bytes(json.dumps(entries, indent=indent, ensure_ascii=ascii).encode(codec))
    found = read_prompts(path)
    assert [request.prompt for request in found] == prompts
    assert {request.tags for request in found} == {("a", "b") if vbench else ()}


@settings(deadline=None)
@given(prompts=prompts, codec=marks, kind=st.sampled_from([",", ";", "\t"]), quoting=st.sampled_from([0, 1]))
@example(prompts=["a\rb", "a\r\n\nb", '"', " a;b,c\td ", "# a"], codec="utf-8", kind=",", quoting=0)
def test_any_prompt_in_csv_comes_back(folder: Path, prompts: list[str], codec: str, kind: str, quoting: int) -> None:
    path = folder / ("prompts.tsv" if kind == "\t" else "prompts.csv")
    text = io.StringIO(newline="")
    rows = [["seed", "prompt"], *([i, prompt] for i, prompt in enumerate(prompts))]
    csv.writer(text, delimiter=kind, quoting=quoting).writerows(rows)
    path.write_bytes(text.getvalue().encode(codec))
    assert [(request.prompt, request.seed) for request in read_prompts(path)] == [(p, i) for i, p in enumerate(prompts)]


lines = st.text(st.characters(exclude_characters="\r\n\0", exclude_categories=["Cs"])).map(str.strip).filter(bool)


@settings(deadline=None)
@given(prompts=st.lists(lines, min_size=1), end=st.sampled_from(["\n", "\r\n", "\r"]), codec=marks)
@example(prompts=["#1", "\\#1", "\\\\#1", "\\", "\\a#"], end="\n", codec="utf-8")
def test_any_line_of_a_txt_comes_back(folder: Path, prompts: list[str], end: str, codec: str) -> None:
    path = folder / "prompts.txt"
    text = end.join(["# a comment", *("\\" + p if p.lstrip("\\").startswith("#") else p for p in prompts)])
    path.write_bytes(text.encode(codec))
    assert [request.prompt for request in read_prompts(path)] == prompts


TEXTS = [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())]


@settings(deadline=None)
@given(prompts=prompts, text=st.sampled_from(TEXTS), number=st.sampled_from([pa.int8(), pa.uint64(), pa.float64()]))
def test_any_prompt_in_parquet_comes_back(
    folder: Path, prompts: list[str], text: pa.DataType, number: pa.DataType
) -> None:
    path = folder / "prompts.parquet"
    plain = pa.array(prompts)
    columns = {
        "prompt": plain.dictionary_encode() if pa.types.is_dictionary(text) else plain.cast(text),
        "seed": pa.array([i if i % 2 else None for i in range(len(prompts))], number),
        "tags": pa.array([["a", prompt] for prompt in prompts], pa.list_(pa.string())),
        "fps": pa.nulls(len(prompts)),
    }
    pq.write_table(pa.table(columns), path, row_group_size=3)
    found = make_requests(read_entries(path), first_seed=500)
    assert [(r.prompt, r.tags) for r in found] == [(prompt, ("a", prompt)) for prompt in prompts]
    assert [r.seed for r in found if r.seed < 500] == list(range(1, len(prompts), 2))


# -- what is broken is named -----------------------------------------------------------------------

GOOD = {
    "a.txt": b"# cats\n\na cat\r\n\\#1 dog\n",
    "a.csv": 'prompt,seed,tags,guidance\na cat,1,a;b,2.5\n"a ""dog"",\nrunning",2,,\n'.encode("utf-8-sig"),
    "a.tsv": b"prompt\tseed\na cat\t1\n",
    "a.jsonl": '{"prompt": "a cät", "seed": 3, "tags": ["x"]}\n"a \\ud83d\\ude00 dog"\n'.encode(),
    "a.json": b'[{"prompt_en": "a cat", "dimension": ["color"], "auxiliary_info": {"color": {}}},\n "a dog"]',
}
with io.BytesIO() as stream:
    pq.write_table(pa.table({"prompt": ["a cat", "a dog"], "seed": [1, None], "tags": [["a"], []]}), stream)
    GOOD["a.parquet"] = stream.getvalue()

edits = st.lists(
    st.tuples(st.sampled_from(["put", "insert", "cut", "end"]), st.floats(0, 1), st.binary(min_size=1, max_size=4)),
    max_size=4,
)


def edited(data: bytes, edits: list[tuple[str, float, bytes]]) -> bytes:
    for kind, share, new in edits:
        at = int(share * len(data))
        kept = {"put": at + len(new), "insert": at, "cut": at + len(new), "end": len(data)}[kind]
        data = data[:at] + (new if kind in ("put", "insert") else b"") + data[kept:]
    return data


def refusal(path: Path) -> PromptError | None:
    try:
        found = make_requests(read_entries(path), first_seed=0, limits=ModelLimits())
    except PromptError as error:
        return error
    assert found and all(isinstance(request, VideoRequest) for request in found)
    return None


def made_or_refused_by_place(path: Path) -> None:
    refused = refusal(path)
    assert refused is None or refused.faults
    for fault in refused.faults if refused else ():
        assert fault.where.startswith((path.name, str(path)))
        assert printable(str(fault)) == str(fault) and len(str(fault).splitlines()) == 1
        str(fault).encode()


def test_the_files_that_are_then_broken_are_good(folder: Path) -> None:
    for name, data in GOOD.items():
        (folder / name).write_bytes(data)
        assert len(read_prompts(folder / name)) == (1 if name == "a.tsv" else 2)


@settings(deadline=None, max_examples=300)
@given(name=st.sampled_from(sorted(GOOD)), edits=edits)
def test_any_edited_file_is_read_or_refused_with_the_place(
    folder: Path, name: str, edits: list[tuple[str, float, bytes]]
) -> None:
    (folder / name).write_bytes(edited(GOOD[name], edits))
    made_or_refused_by_place(folder / name)


@settings(deadline=None, max_examples=200)
@given(name=st.sampled_from(sorted(GOOD)), data=st.binary(max_size=200) | st.text().map(str.encode))
def test_any_bytes_are_read_or_refused_with_the_place(folder: Path, name: str, data: bytes) -> None:
    (folder / name).write_bytes(data)
    made_or_refused_by_place(folder / name)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters()), inner, max_size=3),
)
names = st.sampled_from([*VideoRequest.model_fields, "copies", "self", "cls", "prompt_en", "dimension"])


@settings(deadline=None, max_examples=100)
@given(entries=st.lists(st.dictionaries(names | st.text(st.characters(), max_size=3), values, max_size=4) | values))
def test_any_json_is_read_or_refused_with_the_place(folder: Path, entries: list[Any]) -> None:
    lines = [json.dumps(entry) for entry in entries]
    (folder / "a.jsonl").write_text("\n".join(lines))
    (folder / "a.json").write_text("[" + ",\n".join(lines) + "]")
    made_or_refused_by_place(folder / "a.jsonl")
    made_or_refused_by_place(folder / "a.json")


# -- one by one ------------------------------------------------------------------------------------


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
    "vae_tiling": 128,
    "fps": 12,
    "id": "tom",
    "tags": ["night", "fur"],
    "name": "the first",
}


def test_every_field_can_be_set_in_a_line(write: Write) -> None:
    assert {*EVERYTHING, "image"} == set(VideoRequest.model_fields)  # of images in prompt files: test_image.py
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


def test_all_faults_of_a_file_are_said_at_once_with_their_places(write: Write) -> None:
    text = (
        '{"prompt": "a", "step": 3, "seed": -1}\n{"prompt": "a"\n\n[1]\n'
        '{"prompt": "b", "guidance": NaN, "steps":\t0, "frames": 10, "copies": 0}\n{"seed": "1"} x\n{"prompt": 5}\n'
    )
    path = write("a.jsonl", text.encode() + b'"\xe9"\n')
    with pytest.raises(PromptError) as caught:
        make_requests(read_entries(path), limits=ModelLimits())
    assert [str(fault) for fault in caught.value.faults] == [
        "a.jsonl, line 1, column 25: step: no such field; did you mean steps?",
        f"a.jsonl, line 1, column 36: seed=-1 must be a whole number from 0 to {SEED_LIMIT - 1}; nearest: 0",
        "a.jsonl, line 2, column 15: not JSON: Expecting ',' delimiter",
        'a.jsonl, line 4, column 1: expected a text or a JSON object, as in {"prompt": "a cat"}',
        "a.jsonl, line 5, column 43: steps=0 must be a whole number from 1 to 1000; nearest: 1",
        "a.jsonl, line 5, column 29: guidance=nan must be a number, 0 or more, and finite",
        "a.jsonl, line 5, column 56: frames=10 must be 4·k + 1 (1, 5, 9, …) for this model; nearest: 9 or 13",
        f"a.jsonl, line 5, column 70: copies=0 must be a whole number from 1 to {MAX_COPIES}",
        "a.jsonl, line 6, column 15: not JSON: Extra data",
        "a.jsonl, line 7, column 12: prompt=5 must be text",
        "a.jsonl, line 8, column 2: byte 0xe9 is not UTF-8; save the file as UTF-8 text",
    ]


def test_faults_of_a_json_array_name_the_entry_and_the_line(write: Write) -> None:
    text = '[\n  "a cat", 5,\n  {\n    "prompt": "b",\n    "steps": 0, "id": "a", "id": "b"},\r\n {"steps": 0},\n'
    text += ' {"prompt_en": "c", "dimension": 3},\n "a'
    assert faults(write("a.json", text)) == [
        'a.json, entry 2 (line 2, column 12): expected a text or a JSON object, as in {"prompt": "a cat"}',
        "a.json, entry 3 (line 5, column 34): id is given twice",
        "a.json, entry 4 (line 6, column 2): prompt is missing",
        "a.json, entry 4 (line 6, column 12): steps=0 must be a whole number from 1 to 1000; nearest: 1",
        'a.json, entry 5 (line 7, column 34): tags=3 must be a list of texts, as in ["cats", "night"]',
        "a.json, entry 6 (line 8, column 2): not JSON: Unterminated string starting at",
    ]


def test_faults_of_a_csv_name_the_line_the_row_begins_at(write: Write) -> None:
    text = 'prompt,steps\n"two\nlines",5\na cat,ten\na cat,2.5\na cat\na, cat,3\n" ",4\n"a"b,5\nc,"6\n'
    assert faults(write("a.csv", text)) == [
        "a.csv, line 4: steps='ten' must be a whole number from 1 to 1000",
        "a.csv, line 5: steps=2.5 must be a whole number from 1 to 1000; nearest: 2 or 3",
        "a.csv, line 6: has 1 cells, and the header 2; quote a cell that holds a ','",
        "a.csv, line 7: has 3 cells, and the header 2; quote a cell that holds a ','",
        "a.csv, line 8: prompt=' ' must say something, and is empty",
        "a.csv, line 9: not CSV: ',' expected after '\"'",
        "a.csv, line 10, column 'steps': not CSV: a quote is opened and never closed",
    ]


def test_csv_as_spreadsheets_write_it(write: Write) -> None:
    (request,) = read_prompts(write("a.csv", '\ufeff# "cats\r\n\r\n prompt ; steps \r\na;5.0\r\n\r\n'))
    assert (request.prompt, request.steps) == ("a", 5)


HUGE = "9" * 5000


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "promt,steps\na cat,3", "a.csv, line 1: column 'promt': no such field; did you mean prompt?"),
        ("a.csv", ",prompt\n0,a cat", "a.csv, line 1: column 1 has no name"),
        ("a.csv", "\n\nsteps\n3", "a.csv, line 3: there must be a column 'prompt', and there is steps"),
        ("a.csv", "", "there must be a column 'prompt', and there is none"),
        ("a.csv", "prompt,prompt\na,b", "column 'prompt' is there twice"),
        ("a.csv", 'prompt\n"a cat', "a.csv, line 2, column 'prompt': not CSV: a quote is opened and never closed"),
        ("a.csv", '"prompt', "a.csv, line 1: not CSV: a quote is opened and never closed"),
        ("a.csv", "prompt,copies\na cat,0", f"copies=0 must be a whole number from 1 to {MAX_COPIES}"),
        ("a.csv", "prompt,copies\na cat,1000000000000", "copies=1000000000000 must be a whole number from 1 to"),
        ("a.csv", f"prompt,seed\na cat,{HUGE}", "a.csv, line 2: seed='9999"),
        ("a.csv", "prompt,guidance\na cat,1e999", "guidance=inf must be a number, 0 or more, and finite"),
        ("a.csv", "prompt\na\0cat", "a.csv, line 2, column 2: NUL; save the file as UTF-8 text"),
        ("a.csv", f"prompt\n{'x' * 200_000}", "a.csv, line 2: not CSV: field larger than field limit"),
        ("a.jsonl", '{"prompt": "a", "prompt": "b"}', "a.jsonl, line 1, column 27: prompt is given twice"),
        ("a.jsonl", '{"prompt": {"x": 1, "x": 2}}', "a.jsonl, line 1, column 1: x is given twice"),
        ("a.jsonl", "[" * 100_000, "a.jsonl, line 1, column 1: not usable JSON: it is nested too deeply"),
        ("a.json", "[" * 100_000, "a.json, entry 1 (line 1, column 2): not usable JSON: it is nested too deeply"),
        ("a.jsonl", '{"prompt": "a", "seed": ' + HUGE + "}", "line 1, column 25: seed=inf must be a whole number"),
        ("a.jsonl", '{"prompt": -' + HUGE + "}", "line 1, column 12: prompt=-inf must be text"),
        ("a.jsonl", '{"prompt": "\\ud83d"}', "half of a pair"),
        ("a.jsonl", '{"prompt": "a", "\\ud83d\\n": 1}', r"line 1, column 29: \ud83d\n: no such field"),
        ("a.jsonl", '{"prompt": "a", "self": 1}', "a.jsonl, line 1, column 25: self: no such field"),
        ("a.jsonl", '{"seed": 1}', "a.jsonl, line 1: prompt is missing"),
        ("a.jsonl", '{"prompt": "a", "copies": {"a": 1}}', "line 1, column 27: copies=dict must be a whole number"),
        ("a.jsonl", '{"prompt": "a", "copies": true}', "copies=True must be a whole number"),
        ("a.json", '{"prompt": "a"}', "a.json, line 1, column 1: expected a JSON array"),
        ("a.json", '["a"] 5', "a.json, line 1, column 7: not JSON: Extra data"),
        ("a.json", '["a",]', "a.json, entry 2 (line 1, column 6): not JSON: Expecting value"),
        ("a.json", '["a" "b"]', "a.json, entry 1 (line 1, column 6): not JSON: Expecting ',' delimiter"),
        ("a.json", '[{"prompt_en": "a", "image_name": "a.png"}]', "(line 1, column 35): image_name: no such field"),
        ("a.json", "[]", "a.json: holds no prompt"),
        ("a.json", "", "a.json: holds no prompt"),
        ("a.txt", "# nothing\n", "a.txt: holds no prompt"),
        ("a.txt", b"a cat\ncaf\xe9\n", "a.txt, line 2, column 4: byte 0xe9 is not UTF-8"),
        ("a.txt", "a cat\na dog".encode("utf-16-le"), "a.txt: is no text, or UTF-16 without a byte order mark"),
        ("a.txt", "a cat\na".encode("utf-16") + b"\0", "a.txt, line 2: not UTF-16, as its first bytes say: truncated"),
        ("a.parquet", b"", "a.parquet: not a Parquet file that can be read"),
        ("a.parquet", GOOD["a.parquet"][:-20], "a.parquet: not a Parquet file that can be read"),
    ],
)
def test_bad_files_are_refused_in_words(write: Write, name: str, content: str | bytes, message: str) -> None:
    fault = faults(write(name, content))[0]
    assert message in fault
    assert len(fault) < 1000


def test_every_line_that_is_no_utf_8_is_named(write: Write) -> None:
    told = faults(write("a.txt", "ein Kätzchen\na dog\nein Bär\n".encode("latin-1")))
    assert [fault.split(":")[0] for fault in told] == ["a.txt, line 1, column 6", "a.txt, line 3, column 6"]


def parquet(write: Write, **columns: Any) -> Path:
    stream = io.BytesIO()
    pq.write_table(pa.table(columns), stream)
    return write("a.parquet", stream.getvalue())


def test_every_field_can_be_set_in_a_parquet_row(write: Write) -> None:
    columns = {name: pa.array([value, None]) for name, value in EVERYTHING.items() if name not in ("prompt", "seed")}
    seed = pa.array([EVERYTHING["seed"], None], pa.uint64())
    path = parquet(write, prompt=["a cat", "b"], seed=seed, __index_level_0__=[1, 2], **columns)
    first, second = read_prompts(path, steps=9)
    assert first == VideoRequest(**EVERYTHING)
    assert (second.prompt, second.steps, second.tags) == ("b", 9, ())
    (request,) = read_prompts(parquet(write, prompt=["a"], tags=["x; y"], steps=[4.0], guidance=[3]))
    assert (request.tags, request.steps, request.guidance) == (("x", "y"), 4, 3.0)


def test_faults_of_parquet_name_the_row_and_the_column(write: Write) -> None:
    path = parquet(
        write, prompt=["a", None, "c", " "], steps=[0.0, 2.5, math.nan, None], tags=[["a"], None, [None], []]
    )
    assert faults(path) == [
        "a.parquet, row 1: steps=0 must be a whole number from 1 to 1000; nearest: 1",
        "a.parquet, row 2: prompt is missing",
        "a.parquet, row 2: steps=2.5 must be a whole number from 1 to 1000; nearest: 2 or 3",
        "a.parquet, row 3: steps=nan must be a whole number from 1 to 1000",
        "a.parquet, row 3: tags=[None] must be text",
        "a.parquet, row 4: prompt=' ' must say something, and is empty",
    ]
    path = parquet(write, prompt=[["a"]], step=[1], seed=["1"], tags=[[1]], fps=[True], guidance=[datetime(2020, 1, 1)])
    assert faults(path) == [
        "a.parquet: column 'step': no such field; did you mean steps?",
        "a.parquet: column 'prompt': holds list<element: string>, and must hold texts",
        "a.parquet: column 'seed': holds string, and must hold whole numbers",
        "a.parquet: column 'tags': holds list<element: int64>, and must hold lists of texts",
        "a.parquet: column 'fps': holds bool, and must hold whole numbers",
        "a.parquet: column 'guidance': holds timestamp[us], and must hold numbers",
    ]
    path = parquet(write, prompt=[{"a": 1}], prompt_2=[b"a"], id=pa.array([1], pa.timestamp("ns")))
    assert [fault.split(", and")[0] for fault in faults(path)] == [
        "a.parquet: column 'prompt': holds struct<a: int64>",
        "a.parquet: column 'prompt_2': holds binary",
        "a.parquet: column 'id': holds timestamp[ns]",
    ]
    text = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pa.py_buffer(b"a\xe9")]
    )
    assert faults(parquet(write, prompt=text)) == ["a.parquet, row 2: column 'prompt': is not UTF-8"]
    assert "holds no prompt" in faults(parquet(write, prompt=pa.array([], pa.string())))[0]


def test_damaged_parquet_is_found_by_its_checksums(write: Write) -> None:
    stream = io.BytesIO()
    pq.write_table(pa.table({"prompt": ["a cat"]}), stream, write_page_checksum=True, compression="none")
    told = faults(write("a.parquet", stream.getvalue().replace(b"a cat", b"a car", 1)))
    assert told[0].startswith("a.parquet: column 'prompt': cannot be read: ")


def test_parquet_without_pyarrow_says_what_to_install(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert 'pip install "reelbatch[parquet]"' in faults(write("a.parquet", GOOD["a.parquet"]))[0]


def test_the_real_suites_are_read_whole() -> None:
    if not VBENCH.exists():
        pytest.skip("needs VBench's prompt files")
    for name in ("all_dimension.txt", "hunyuan_all_dimension.txt"):
        found = make_requests(read_entries(VBENCH / name), first_seed=0)
        assert (len(found), len({request.prompt for request in found})) == (946, 944)
        assert len({(request.prompt, request.seed) for request in found}) == 946


def test_rewritten_prompts_are_named_after_those_they_were_written_from(write: Write) -> None:
    entries = read_entries(
        write("new.jsonl", '"a cat. Realistic"\n{"prompt": "a dog. Casual", "copies": 2}\n"a cat. Realistic"')
    )
    named = make_requests(named_after(entries, write("old.txt", "a cat\n# none\na dog\nA cat")), first_seed=0)
    assert [(request.prompt, request.name, request.seed) for request in named] == [
        ("a cat. Realistic", "a cat", 0),
        ("a dog. Casual", "a dog", 0),
        ("a dog. Casual", "a dog", 1),
        ("a cat. Realistic", "A cat", 1),  # asked for twice: another video, whatever it is called
    ]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("old.txt", "a cat", "old.txt: holds 1 prompts to name videos after, and there are 2 entries to be named"),
        ("old.jsonl", '"a cat"\n{"seed": 1}', "old.jsonl, line 2: has no prompt to name a video after"),
        ("old.jsonl", '"a cat"\n{', "old.jsonl, line 2, column 2: not JSON"),
        ("old.txt", "a cat\na dog", "new.jsonl, line 2, column 29: has a name already"),
    ],
)
def test_names_that_do_not_fit_the_prompts_are_refused(write: Write, name: str, content: str, told: str) -> None:
    last = {"prompt": "a dog", "name": "rex"} if "already" in told else "a dog"
    entries = read_entries(write("new.jsonl", f'"a cat"\n{json.dumps(last)}'))
    with pytest.raises(PromptError, match=re.escape(told)):
        named_after(entries, write(name, content))


def test_vbench_dimensions_become_tags(write: Write) -> None:
    entries = [
        {"prompt_en": "a bird and a cat", "dimension": ["multiple_objects"], "auxiliary_info": {"a": {"a": "b"}}},
        {"prompt_en": "The bund Shanghai", "dimension": ["overall_consistency", "imaging_quality"], "seed": 4},
    ]
    first, second = read_prompts(write("VBench_full_info.json", json.dumps(entries)))
    assert (first.prompt, first.tags) == ("a bird and a cat", ("multiple_objects",))
    assert (second.tags, second.seed) == (("overall_consistency", "imaging_quality"), 4)


def test_missing_files_and_folders(tmp_path: Path) -> None:
    assert "no such file" in faults(tmp_path / "none.txt")[0]
    assert "cannot be read" in faults(tmp_path)[0]


@pytest.mark.parametrize("codec", ["utf-16", "utf-32"])
def test_utf_16_and_utf_32_with_a_mark_are_read(write: Write, codec: str) -> None:
    assert read_prompts(write("a.txt", "ein Kätzchen\r\n".encode(codec)))[0].prompt == "ein Kätzchen"


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


def test_a_line_that_cannot_be_read_is_told_among_the_others() -> None:
    bad = Entry("line 2", {}, (Fault("line 2", "not JSON"),))
    entries = [Entry("line 1", {"prompt": "a", "steps": 0}), bad, Entry("line 3", {})]
    with pytest.raises(PromptError) as caught:
        make_requests(entries)
    assert [fault.where for fault in caught.value.faults] == ["line 1", "line 2", "line 3"]


# -- which of them, in what order ------------------------------------------------------------------

ZOO = [
    VideoRequest(prompt="a cat", seed=1, tags=("animal", "night"), guidance=1.5),
    VideoRequest(prompt="a car", seed=1, tags=("vehicle", "night")),
    VideoRequest(prompt="a cat=dog", seed=2, tags=("animal",), negative_prompt=""),
]


@pytest.mark.parametrize(
    ("selectors", "left"),
    [
        ([], [0, 1, 2]),
        (["tag=animal"], [0, 2]),
        (["tag=animal", "tag=night"], [0]),
        (["seed=1"], [0, 1]),
        (["seed=01", " tag =vehicle"], [1]),
        (["prompt=a cat=dog"], [2]),
        (["prompt=a"], []),
        (["guidance=1.50"], [0]),
        (["negative_prompt="], [2]),
        (["tag=nothing"], []),
    ],
)
def test_selectors_choose_by_field_and_any_tag(selectors: list[str], left: list[int]) -> None:
    assert only_those(ZOO, selectors) == [ZOO[i] for i in left]


@pytest.mark.parametrize(
    ("selector", "message"),
    [
        ("animal", "'animal' must be field=value, as in tag=animal; fields: tag, prompt"),
        ("tags=animal", "nothing is called 'tags'; did you mean tag?"),
        ("sede=1", "did you mean seed?"),
        ("=1", "the fields are tag, prompt"),
        ("seed=one", "seed is a whole number, and 'one' is none"),
        ("guidance=", "guidance is a number, and '' is none"),
    ],
)
def test_bad_selectors_are_refused_with_what_is_possible(selector: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        only_those([], [selector])


def test_shuffled_is_a_random_order_and_always_the_same() -> None:
    requests = [VideoRequest(prompt=f"prompt {i}", seed=i) for i in range(100)]
    found = shuffled(requests, 7)
    assert found == shuffled(requests, 7) != requests
    assert sorted(found, key=lambda request: request.seed) == requests
    assert shuffled(requests, 8) != found
    assert [request.seed for request in shuffled(requests[:6], 7)] == SHUFFLED_6


SHUFFLED_6 = [3, 1, 0, 5, 4, 2]
"""The order must not change with a version of Python or of this project: jobs are gone on with."""
