"""Foreign text (prompts, file names, errors) is shown and does nothing: to a terminal, a log or a spreadsheet."""

from __future__ import annotations

import csv
import io
import json
import logging
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.table import Table
from typer.testing import CliRunner

from reelbatch import VideoRequest
from reelbatch.cli import app
from reelbatch.cli.common import SafeConsole
from reelbatch.device import log
from reelbatch.engine.engine import Progress
from reelbatch.jobs.display import display
from reelbatch.jobs.export import write_rows
from reelbatch.jobs.manifest import Manifest, VideoRow
from reelbatch.jobs.worker import Outcome
from reelbatch.wording import printable, printable_json

EVIL = "a \x1b]0;owned\x07\x1b[2J\x9b31m\rcat\u202e\u2028"
ACTS = set("\x1b\x07\x9b\r\u202e\u2028")


def call(*words: object):
    return CliRunner().invoke(app, [str(word) for word in words])


def row(id: str, prompt: str) -> VideoRow:
    return VideoRow(
        id=id,
        number=0,
        turn=0,
        request=VideoRequest(prompt=prompt, seed=0, steps=4, id=id).model_dump(mode="json"),
        fingerprint=id,
        prompt=prompt,
        seed="0",
        tags=[prompt],
        file=f"{id}.mp4",
    )


@given(st.text(st.characters(exclude_categories=())))
def test_what_is_shown_has_nothing_that_acts_and_keeps_its_letters(text: str) -> None:
    shown = printable(text)
    shown.encode()
    assert not any((ord(c) < 32 and c not in "\t\n") or 127 <= ord(c) < 160 for c in shown)
    assert printable(shown) == shown


@given(st.text())
def test_json_that_is_printed_reads_back_as_it_was(text: str) -> None:
    shown = printable_json(json.dumps(text, ensure_ascii=False))
    assert printable(shown) == shown
    assert json.loads(shown) == text


@pytest.mark.parametrize("text", ["一只猫在海滩上", "ein Käfer\n\tund zwei", "👩‍👩‍👧", "می‌خواهم", "\u3000\u00a0 x"])
def test_letters_of_every_script_stay(text: str) -> None:
    assert printable(text) == text


def test_a_console_shows_and_does_not_obey() -> None:
    console = SafeConsole(file=io.StringIO(), force_terminal=True, width=60, color_system="truecolor")
    table = Table("prompt", title=EVIL)
    table.add_row(EVIL)
    console.print(table)
    console.print(f"[red]{EVIL}", style="bold")
    shown = console.file.getvalue()
    assert "\x1b]0" not in shown
    assert "\x1b[2J" not in shown
    assert not ACTS - {"\x1b"} & set(shown)
    assert "\x1b[1;31m" in shown  # the console's own colours are kept
    assert r"\x1b]0;owned" in shown


@pytest.mark.parametrize("terminal", [True, False])
def test_a_run_shows_prompts_and_errors_safely(terminal: bool) -> None:
    request = VideoRequest(prompt=EVIL)
    console = SafeConsole(file=io.StringIO(), force_terminal=terminal, width=200, color_system=None)
    with display([request], console) as shown:
        shown.event(Progress(request.id, "denoise", 1, 4, 0.25))
        shown.outcome(Outcome(request, Path(f"o/{EVIL}.mp4"), error=OSError(EVIL)))
    text = console.file.getvalue()
    assert "owned" in text
    assert "\x1b]0" not in text
    assert not {"\x07", "\x9b", "\u202e"} & set(text)
    assert "\x1b[2J" not in text


def test_a_log_is_without_them_too(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="reelbatch"):
        log.warning("%s could not be written (%s)", EVIL, OSError(EVIL))
    (record,) = caplog.records
    assert not ACTS & set(record.getMessage())
    assert "owned" in record.getMessage()


def test_commands_show_a_manifest_of_foreign_text(tmp_path: Path) -> None:
    manifest = Manifest.in_folder(tmp_path)
    job = manifest.add_job({}, [row("a", EVIL)])
    owner = manifest.enlist()
    manifest.claim(owner, job, 1)
    manifest.fail(owner, "a", EVIL)
    for words in (("status",), ("export",), ("status", "--json")):
        result = call("job", *words, "--out", tmp_path)
        assert result.exit_code == 0
        assert "owned" in result.stdout
        assert not ACTS & set(result.output)
    assert json.loads(call("job", "export", "--out", tmp_path).stdout)["prompt"] == EVIL


def test_an_error_is_shown_safely(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    from reelbatch.cli import main

    monkeypatch.setattr("sys.argv", ["reelbatch", "generate", "a cat", "--model", f"no-{EVIL}"])
    with pytest.raises(SystemExit):
        main()
    shown = capsys.readouterr().err
    assert "owned" in shown
    assert not ACTS & set(shown)


@pytest.mark.parametrize("sign", [*"=+-@\t", "＝", "  =", "\n@"])
def test_a_spreadsheet_computes_nothing_that_is_exported(tmp_path: Path, sign: str) -> None:
    prompt = f'{sign}HYPERLINK("http://evil","x")'
    write_rows([row("a", prompt), row("b", "a cat - and a dog")], tmp_path / "rows.csv")
    with (tmp_path / "rows.csv").open(newline="", encoding="utf-8") as stream:
        first, second = csv.DictReader(stream)
    assert first["prompt"] == f"'{prompt}"
    assert second["prompt"] == "a cat - and a dog"
    assert (first["seed"], first["number"]) == ("0", "0")
    write_rows([row("a", prompt)], tmp_path / "rows.jsonl")
    assert json.loads((tmp_path / "rows.jsonl").read_text(encoding="utf-8"))["prompt"] == prompt
