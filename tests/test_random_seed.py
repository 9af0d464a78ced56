"""`--seed random`: drawn once, shown, stored, and kept by the job that goes on."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from reelbatch.cli import app, run
from reelbatch.jobs.manifest import Manifest, State

SIZE = ("--frames", 1, "--steps", 1)


def call(*words: object):
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("a cat\na dog\n", encoding="utf-8")
    return tmp_path


def shown_seed(stderr: str) -> int:
    return int(re.search(r"^seed (\d+), drawn .*--seed \1 makes the same", stderr, re.MULTILINE)[1])


def seeds() -> list[int]:
    return [int(row.seed) for row in Manifest.in_folder(Path("o")).rows()]


def test_a_job_goes_on_with_the_seed_that_it_drew(tiny_folder: Path, here: Path) -> None:
    words = ("job", "run", "p.txt", "--model", tiny_folder, *SIZE, "--copies", 2, "--out", "o", "--seed", "random")
    first = call(*words)
    assert first.exit_code == 0
    seed = shown_seed(first.stderr)
    assert seeds() == [seed, seed + 1] * 2
    again = call(*words)
    assert shown_seed(again.stderr) == seed
    assert "4 of 4 videos are there already" in again.stderr
    assert "4 of 4 videos are there already" in call(*words[:-1], seed).stderr
    assert shown_seed(call(*words, "--dry-run").stderr) == seed
    new = call(*words, "--as-new")
    assert shown_seed(new.stderr) != seed
    assert "4 of 4 videos are there already" in call(*words).stderr  # of the latest job


def test_generate_draws_anew_unless_it_goes_on(tiny_folder: Path, here: Path) -> None:
    words = ("generate", "a cat", "--model", tiny_folder, *SIZE, "--out", "o", "--seed", "random")
    first, second = (shown_seed(call(*words).stderr) for _ in range(2))
    assert first != second
    assert seeds() == [first, second]
    manifest = Manifest.in_folder(Path("o"))
    manifest.remake([manifest.rows()[1].id])  # as a run leaves it that was stopped
    (here / "o" / manifest.rows()[1].file).unlink()
    assert shown_seed(call(*words).stderr) == second
    assert seeds() == [first, second]
    assert {row.state for row in manifest.rows()} == {State.DONE}


def test_of_two_runs_that_begin_at_once_the_later_takes_the_seed_of_the_first(
    tiny_folder: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("job", "run", "p.txt", "--model", tiny_folder, *SIZE, "--out", "o", "--seed", "random")
    opened, other = run.open_engine, []

    def with_another(config: object) -> object:
        monkeypatch.setattr(run, "open_engine", opened)
        other.append(call(*words))
        return opened(config)

    monkeypatch.setattr(run, "open_engine", with_another)
    late = call(*words)
    assert (late.exit_code, other[0].exit_code) == (0, 0)
    assert seeds() == [shown_seed(other[0].stderr)] * 2
    assert "2 of 2 videos are there already" in late.stderr


def test_the_seed_of_an_other_job_is_not_taken(tiny_folder: Path, here: Path) -> None:
    words = ("job", "run", "p.txt", "--model", tiny_folder, *SIZE, "--out", "o")
    assert call(*words).exit_code == 0
    refused = call(*words, "--seed", "random")
    assert f"seed: 0 → {shown_seed(refused.stderr)}" in str(refused.exception)
