"""VBench's copies: 25 videos of a prompt whose flickering is scored, 5 of others, and a person's own count first."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from typer.testing import CliRunner

from reelbatch.cli import app
from reelbatch.jobs.prompts import make_requests, named_after, read_entries
from reelbatch.jobs.vbench import with_copies

SUITE = [
    {"prompt_en": "a still lake", "dimension": ["temporal_flickering"]},
    {"prompt_en": "a cat", "dimension": ["subject_consistency", "motion_smoothness"]},
    {"prompt_en": "a house", "dimension": ["scene", "temporal_flickering"], "auxiliary_info": {"scene": "house"}},
    {"prompt_en": "a dog", "dimension": ["scene"], "copies": 2},
]


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    path = tmp_path / "VBench_full_info.json"
    path.write_text(json.dumps(SUITE), encoding="utf-8")
    return path


def counted(path: Path, given: int | None = None) -> tuple[dict[str, int], str | None]:
    entries, line = with_copies(read_entries(path), given)
    defaults = {} if given is None else {"copies": given}
    return dict(Counter(request.prompt for request in make_requests(entries, defaults, first_seed=0))), line


def test_prompts_of_the_flickering_dimension_get_25_videos_and_the_others_5(suite: Path) -> None:
    videos, line = counted(suite)
    assert videos == {"a still lake": 25, "a cat": 5, "a house": 25, "a dog": 2}
    assert line == "VBench: 25 videos of each of 2 prompts of temporal_flickering, 5 of each of 1 others"


@pytest.mark.parametrize(("given", "warned"), [(1, True), (5, True), (25, False), (30, False)])
def test_a_count_that_was_given_stands_and_is_said_to_be_too_low(suite: Path, given: int, warned: bool) -> None:
    videos, line = counted(suite, given)
    assert videos == {"a still lake": given, "a cat": given, "a house": given, "a dog": 2}
    assert (line is not None) is warned
    assert (
        line is None
        or f"wants 25 videos of each of the 2 prompts of temporal_flickering, and --copies asks for {given}" in line
    )


def test_rewritten_prompts_get_copies_by_the_dimensions_of_those_that_they_are_named_after(suite: Path) -> None:
    rewritten = suite.with_name("rewritten.txt")
    rewritten.write_text("a lake, at rest\na cat, cinematic\na house, by night\na dog, running\n", encoding="utf-8")
    entries, _ = with_copies(named_after(read_entries(rewritten), suite), None)
    requests = make_requests(entries, first_seed=0)
    assert Counter(r.name for r in requests) == {"a still lake": 25, "a cat": 5, "a house": 25, "a dog": 5}
    assert requests[0].tags == ("temporal_flickering",)


def test_prompts_without_dimensions_are_made_once_with_a_hint(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a cat\n", encoding="utf-8")
    videos, line = counted(tmp_path / "p.txt")
    assert videos == {"a cat": 1}
    assert line is not None and "VBench_full_info.json" in line and "give --copies" in line


def test_faulty_lines_are_still_told(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text(json.dumps([*SUITE, 7, {"prompt_en": "x", "dimension": 3}]), encoding="utf-8")
    entries, _ = with_copies(read_entries(path), None)
    with pytest.raises(ValueError, match=r"entry 5 .*expected a text or a JSON object(.|\n)*entry 6 .*tags=3"):
        make_requests(entries, first_seed=0)


@pytest.mark.parametrize(("naming", "count"), [("vbench", 57), ("default", 5)])
def test_the_command_makes_them_and_says_so(
    suite: Path, tiny_folder: Path, tmp_path: Path, naming: str, count: int
) -> None:
    words = ["job", "run", str(suite), "--model", str(tiny_folder), "--naming", naming, "--out", str(tmp_path / "o")]
    result = CliRunner().invoke(app, [*words, "--dry-run", "--json"])
    assert json.loads(result.stdout)["videos"] == count
    assert ("25 videos of each of 2 prompts of temporal_flickering" in result.stderr) is (naming == "vbench")
