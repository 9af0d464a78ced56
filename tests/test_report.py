"""The report page: what it holds is what the rows say, whatever prompts, names and errors are like."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes, urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reelbatch.jobs import report as room
from reelbatch.jobs.manifest import JobRow, State, VideoRow
from reelbatch.jobs.report import page, write_report
from reelbatch.jobs.report_data import as_json, file_url, group_faults, stretches, throughput

HOSTILE = (
    "</script><script>alert(1)</script>",
    "<!-- <script> a --> ]]> &amp; &lt;",
    "line\u2028separator\u2029 and \r\n and \x00 and \x1b",
    "\"quotes\" 'single' \\back\\ {{data}} {{style}}",
    "ثعلب أحمر \u202eيركض",
    "🚤" * 50,
    "long " * 50_000,
    "<img src=x onerror=alert(1)>",
)
NAMES = ("plain.mp4", "a b#c?d%20.mp4", "\"q\" 'q' <b>&.mp4", "🚤 é.mp4", "javascript:x.mp4", "a;b=c+d@e,[1].mp4")


def job(number: int = 1, **settings: Any) -> JobRow:
    return JobRow(number=number, created="2026-03-01T09:00:00.000+00:00", settings={"model": "demo", **settings})


def row(number: int = 0, state: State = State.DONE, prompt: str = "a red circle", **values: Any) -> VideoRow:
    seed = values.pop("seed", number)
    about = {
        "id": f"v{number}",
        "job": 1,
        "number": number,
        "turn": number,
        "request": {"prompt": prompt, "seed": seed, "id": f"v{number}", "tags": ["night"], "width": 64, "height": 64},
        "fingerprint": f"f{number}",
        "prompt": prompt,
        "seed": str(seed),
        "tags": ["night"],
        "file": f"{number}.mp4",
        "state": state,
        "step": 0,
        "attempts": 1,
    }
    if state is State.DONE:
        about |= {"seconds": {"denoise": 3.0, "decode": 1.0}, "versions": {"torch": "2"}, "size": 1000}
        about |= {"started": f"2026-03-01T09:{number % 60:02}:00+00:00", "ended": f"2026-03-01T09:{number % 60:02}:40Z"}
    return VideoRow(**{**about, **values})


class Read(HTMLParser):
    """The data, scripts, texts, attributes and links of a page."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.scripts: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] == "script" and self.rawdata is not None and self.cdata_elem == "script":
            self.scripts[-1] += data
        else:
            self.text += data

    @property
    def data(self) -> dict[str, Any]:
        return dict(json.loads(self.scripts[0]))


def read(rows: Sequence[VideoRow], jobs: Sequence[JobRow] | None = None, title: str = "videos") -> Read:
    return Read(page([job()] if jobs is None else jobs, rows, title=title, when="2026-03-01T10:00:00+00:00"))


def records(data: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows, as the page's script puts them together."""
    found = []
    for values in data["rows"]:
        record = dict(zip(data["columns"], values, strict=True))
        record["versions"] = data["versions"][record["versions"]]
        said = {name: record[name] for name in ("prompt", "seed", "tags", "id")}
        record["request"] = said | data["requests"][record["request"]]
        record["url"] = record["url"] or record["file"]
        found.append(record)
    return found


@pytest.mark.parametrize("prompt", HOSTILE)
def test_hostile_prompts_stay_text(prompt: str) -> None:
    plain = read([row(), row(1, State.FAILED, error="no")])
    found = read([row(prompt=prompt), row(1, State.FAILED, prompt, error=prompt)], title=prompt)
    assert [record["prompt"] for record in records(found.data)] == [prompt, prompt]
    assert found.tags == plain.tags
    assert found.scripts[1:] == plain.scripts[1:]


@given(prompt=st.text(st.characters(), min_size=1), error=st.text(st.characters()), tag=st.text(min_size=1))
def test_any_text_round_trips(prompt: str, error: str, tag: str) -> None:
    asked = {"prompt": prompt, "seed": 2**64 - 1, "id": "x", "tags": [tag], "flow_shift": None, "frames": 9}
    made = row(0, State.FAILED, prompt, seed=2**64 - 1, id="x", error=error, tags=[tag], request=asked)
    found = read([made])
    (record,) = records(found.data)
    assert {name: record[name] for name in ("prompt", "error", "tags")} == {
        "prompt": prompt,
        "error": error,
        "tags": [tag],
    }
    assert record["request"] == {**asked, "seed": str(2**64 - 1)}
    assert found.tags == read([row(0, State.FAILED, error="no")]).tags


@given(
    st.recursive(
        st.none() | st.booleans() | st.text(st.characters()), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
    )
)
def test_json_is_read_back_and_ends_no_script(value: Any) -> None:
    text = as_json(value)
    assert json.loads(text) == value
    assert not re.search("[<\u2028\u2029\r\n\x00]", text)
    text.encode()


def test_numbers_that_javascript_does_not_hold() -> None:
    values = [2**53 - 1, 2**53, -(2**63), float("inf"), float("nan"), 0.1]
    assert json.loads(as_json(values)) == [2**53 - 1, str(2**53), str(-(2**63)), None, None, 0.1]


def test_all_columns_come_back() -> None:
    rows = [row(0, isolation="exact", batch=4, sha256="aa"), row(1, State.WAITING), row(2, request={"prompt": "other"})]
    for made, found in zip(rows, records(read(rows).data), strict=True):
        expected = made.record()
        asked = {"prompt": made.prompt, "seed": made.seed, "tags": made.tags, "id": made.id} | made.request
        assert found.items() >= {**expected, "request": {**asked, "seed": made.seed}}.items()


@pytest.mark.parametrize("name", NAMES)
def test_urls_lead_to_the_files(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"video")
    path = write_report(tmp_path, [job()], [row(file=name)])
    (record,) = records(Read(path.read_text(encoding="utf-8")).data)
    parts = urlsplit(record["url"])
    assert not (parts.scheme or parts.netloc or parts.query or parts.fragment)
    assert (tmp_path / unquote_to_bytes(parts.path).decode()).read_bytes() == b"video"


def test_a_name_that_is_no_unicode_has_a_url() -> None:
    assert file_url("caf\udce9.mp4") == "caf%E9.mp4"


def test_nothing_is_loaded_from_elsewhere() -> None:
    found = read([row(i, prompt=prompt) for i, prompt in enumerate(HOSTILE)])
    loading = {name: value for name, value in found.attributes if name in ("src", "href", "action", "data", "srcset")}
    assert all(value and value.startswith(("#", "data:")) for value in loading.values())
    assert not re.search(r"https?://|@import|url\(", room._part("css") + room._part("js"))
    policy = dict(found.attributes)["content"]
    policies = [value for name, value in found.attributes if name == "content" and value and "default-src" in value]
    assert policy and policies[0].startswith("default-src 'none'; media-src 'self' file:;")


def test_states_are_counted() -> None:
    states = [State.DONE] * 3 + [State.FAILED] * 2 + [State.WAITING]
    found = read([row(i, state) for i, state in enumerate(states)])
    labels = [value for name, value in found.attributes if name == "aria-label"]
    assert "3 done, 1 waiting, 2 failed" in labels
    assert "3 of 6" in found.text and "Failures 2" in found.text


def test_failures_are_grouped_by_error() -> None:
    rows = [
        row(0, State.FAILED, error="request 'v0' needs 12.5 GiB"),
        row(1, State.FAILED, error="request 'v1' needs 13.1 GiB"),
        row(2, State.FAILED, error="no space left"),
        row(3, State.FAILED, error=None),
        row(4),
    ]
    groups = group_faults(rows)
    assert [len(group.rows) for group in groups] == [2, 1, 1]
    assert groups[0].error == "request 'v0' needs 12.5 GiB" and groups[2].error == "no error was recorded"
    assert [record["fault"] for record in records(read(rows).data)] == [0, 0, 1, 2, None]


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [row()],
        [row(seconds=None, started=None, ended=None, versions=None)],
        [row(seconds={}, started="yesterday", ended="2026-03-01T09:00:00")],
        [row(seconds={"denoise": float("nan"), "other": 1, "odd": "text"})],
        [row(i, State.FAILED, error="x" * 100_000) for i in range(3)],
        [row(i, State.FAILED, error=f"{'abcdefgh' * 2}-{chr(97 + i % 26)}{chr(97 + i // 26)}") for i in range(80)],
        [row(0, State.WAITING), row(1, State.RUNNING), row(2, State.CANCELLED)],
    ],
    ids=["none", "one", "no-times", "odd-times", "odd-seconds", "huge-errors", "many-errors", "not-done"],
)
def test_any_state_of_a_job(tmp_path: Path, rows: list[VideoRow]) -> None:
    for jobs in ([job()], []):
        path = write_report(tmp_path, jobs, rows)
        assert len(Read(path.read_text(encoding="utf-8")).data["rows"]) == len(rows)
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_phases_follow_one_another() -> None:
    rows = [row(0, seconds={"write": 1.0, "zoom": 1.0, "denoise": 6.0, "text": 2.0})]
    found = read(rows)
    assert found.data["phases"] == ["text", "denoise", "write", "zoom"]
    assert "text 20.0%, denoise 60.0%, write 10.0%, zoom 10.0%" in [value for _, value in found.attributes]


def test_throughput_leaves_pauses_out() -> None:
    rows = [row(i) for i in range(30)]
    rows += [
        row(i, started=f"2026-03-02T09:{i:02}:00+00:00", ended=f"2026-03-02T09:{i:02}:40+00:00") for i in range(30)
    ]
    first, second = found = stretches(rows)
    assert (first.seconds, second.seconds) == (29 * 60 + 40, 29 * 60 + 40)
    assert (len(first.ends), len(second.ends)) == (30, 30)
    drawn = throughput(found)
    made = sum(rate * (end - start) / 3600 for bins in drawn for start, end, rate in bins)
    assert made == pytest.approx(60)
    assert all(50 < rate < 80 for bins in drawn for *_, rate in bins)
    assert "In 2 stretches" in read(rows).text


@pytest.mark.parametrize("command", [["job", "run", "my file.csv"], "reelbatch job run 'my file.csv'"])
def test_the_command_can_be_copied(command: Any) -> None:
    found = read([row()], [job(command=command)])
    assert "reelbatch job run 'my file.csv'" in found.text


def test_no_password_is_shown() -> None:
    url = "postgresql+psycopg://me:p/se@cret@host/jobs"
    found = read([row()], [job(command=["job", "run", "--manifest", url], manifest=url)])
    assert "cret" not in found.text and "postgresql+psycopg://me:***@host/jobs" in found.text


def test_an_earlier_report_stays_whole_if_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_report(tmp_path, [job()], [row()])
    before = (tmp_path / room.FILE).read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        write_report(tmp_path, [job()], [row(), row(1)])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {room.FILE: before}


def test_the_template_is_in_the_package() -> None:
    parts = {
        name: files("reelbatch.jobs").joinpath(f"report_page.{name}").read_text() for name in ("html", "css", "js")
    }
    assert set(re.findall(r"\{\{(\w+)\}\}", parts["html"])) >= {"policy", "style", "data", "script"}
    assert "</script" not in parts["js"] and "<!--" not in parts["js"]
