"""The wheel holds what it must and nothing else, and what the documentation has people type does what it says there.

The default run types a few commands of the documentation, `make docs-commands` every one, all from an installed wheel.
"""

from __future__ import annotations

import email
import re
import shlex
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import typer
from doc_commands import CHECKOUT_PROGRAMS, NOT_RUN, STORIES
from documents import CHECKOUT, documents
from package import Package, install
from story import ANY, SOME, Command, Snippet, Story

import reelbatch.cli

# -- what the documentation has, and how the table says it is run ------------------------------------


def every_command(command: Any = None, path: str = "reelbatch") -> Iterator[tuple[str, Any]]:
    """Each command of the command line with its name, as `reelbatch job run`."""
    command = command or typer.main.get_command(reelbatch.cli.app)
    yield path, command
    for name, inner in getattr(command, "commands", {}).items():
        yield from every_command(inner, f"{path} {name}")


COMMANDS = dict(every_command())
DOCUMENTED = {command for page in documents() for command in page.commands()}
RUN = {step.text for story in STORIES for step in story.steps if isinstance(step, Command)}
SNIPPETS = [step for story in STORIES for step in story.steps if isinstance(step, Snippet)]


def test_the_table_says_of_every_documented_command_how_it_is_run() -> None:
    table = [*RUN, *NOT_RUN, *CHECKOUT_PROGRAMS]
    assert [text for text, count in Counter(table).items() if count > 1] == []
    assert DOCUMENTED - set(table) - set(COMMANDS) == set(), "say in doc_commands.py how these are run, or why not"
    assert set(table) - DOCUMENTED == set(), "these are documented no longer"


def test_the_table_has_every_documented_snippet_once() -> None:
    texts = [text for page in documents() for text in page.snippets()]
    known = [step.text for step in SNIPPETS]
    for text in texts:
        assert [one in text for one in known].count(True) == 1, text
    assert len(set(known)) == len(texts)


def test_documented_commands_and_those_of_the_help_have_options_that_there_are() -> None:
    helped = {span for command in COMMANDS.values() for span in re.findall(r"`(reelbatch [^`]*)`", command.help or "")}
    assert len(helped) > 15
    as_run = {step.as_run for story in STORIES for step in story.steps if isinstance(step, Command)}
    for text in sorted(DOCUMENTED - RUN | as_run | helped):
        words = shlex.split(text)
        if "reelbatch" not in words:
            continue
        words = words[words.index("reelbatch") :]
        name = max((name for name in COMMANDS if words[: len(name.split())] == name.split()), key=len)
        given = [word for word in words[len(name.split()) :] if word not in ("--help", "--install-completion")]
        if given:  # a bare name is mentioned
            COMMANDS[name].make_context(name, given)


def test_every_documented_option_is_one_of_a_command() -> None:
    known = {name for command in COMMANDS.values() for option in command.params for name in option.opts}
    elsewhere = {"--help", "--multi_gpu", "--cpu"}  # of every program, and of accelerate
    named = {option for page in documents() for option in page.options()}
    assert named - known - elsewhere == set()


# -- the wheel ----------------------------------------------------------------------------------------


def sources() -> set[str]:
    paths = (CHECKOUT / "src/reelbatch").rglob("*")
    return {str(path.relative_to(CHECKOUT / "src")) for path in paths if path.is_file() and path.suffix != ".pyc"}


def test_the_wheel_holds_the_package_and_nothing_else(package: Package) -> None:
    with zipfile.ZipFile(package.wheel) as wheel:
        names = set(wheel.namelist())
        (about,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(wheel.read(about))
        scripts = wheel.read(about.replace("METADATA", "entry_points.txt")).decode()
    info = {name for name in names if name.startswith(about.removesuffix("METADATA"))}
    assert names - info == sources()
    assert "reelbatch/py.typed" in names and "reelbatch/demo/model/model_index.json" in names
    assert "reelbatch = reelbatch.cli:main" in scripts
    assert package.wheel.stat().st_size < 25 * 2**20
    extras = {extra for text in DOCUMENTED for extra in re.findall(r"reelbatch\[(\w+)\]", text)}
    assert extras and extras <= set(metadata.get_all("Provides-Extra", []))


def test_what_is_imported_is_what_was_installed(package: Package, tmp_path: Path) -> None:
    code = (
        "import reelbatch, reelbatch.cli, importlib.metadata as m;"
        "print(reelbatch.__file__, reelbatch.cli.__file__, m.distribution('reelbatch').locate_file(''), sep='\\n')"
    )
    exit_code, shown = package.run(f"python -c {shlex.quote(code)}", tmp_path, tmp_path)
    assert exit_code == 0, shown
    assert [Path(line).is_relative_to(package.site) for line in shown.splitlines()] == [True] * 3
    exit_code, shown = package.run("command -v reelbatch", tmp_path, tmp_path)
    assert Path(shown.strip()).is_relative_to(package.site)


def test_the_source_distribution_holds_what_make_needs(package: Package) -> None:
    with tarfile.open(package.sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    tracked = {"Makefile", "constraints.txt", "pyproject.toml", "README.md", "LICENSE", "examples/shapes.csv"}
    tracked |= {page.name for page in documents()} | {f"src/{name}" for name in sources()}
    tracked |= {str(path.relative_to(CHECKOUT)) for path in (CHECKOUT / "benchmarks").glob("*.py")}
    tracked |= {str(path.relative_to(CHECKOUT)) for path in (CHECKOUT / "tests").rglob("*.py")}
    assert tracked - names == set()
    assert package.sdist.stat().st_size < 25 * 2**20


@pytest.mark.all_commands
def test_the_source_distribution_builds_the_same_wheel(package: Package, tmp_path: Path) -> None:
    with tarfile.open(package.sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel"], cwd=source, check=True)
    (again,) = source.glob("dist/*.whl")
    with zipfile.ZipFile(again) as one, zipfile.ZipFile(package.wheel) as other:
        assert {name: one.read(name) for name in one.namelist()} == {name: other.read(name) for name in one.namelist()}
        assert one.namelist() == other.namelist()
    install(again, tmp_path / "site")


# -- what the documentation has people run ------------------------------------------------------------


def files(work: Path, home: Path) -> set[str]:
    """Files in a working folder, and as `~/…` those in the home folder."""
    there = {path.relative_to(work).as_posix() for path in work.rglob("*") if not path.is_dir()}
    return there | {f"~/{path.relative_to(home).as_posix()}" for path in home.rglob("*") if not path.is_dir()}


def unexpected(left: set[str], expected: Mapping[str, int]) -> list[str]:
    """How the files that a command left differ from those that the table says."""
    counts = {pattern: sum(fnmatchcase(name, pattern) for name in left) for pattern in expected}
    wrong = [
        f"{counts[pattern]} of {pattern}, not {'some' if count == SOME else count}"
        for pattern, count in expected.items()
        if count != ANY and counts[pattern] != count and not (count == SOME and counts[pattern])
    ]
    return wrong + sorted(name for name in left if not any(fnmatchcase(name, pattern) for pattern in expected))


def code_of(step: Snippet) -> str:
    (text,) = (text for page in documents() for text in page.snippets() if step.text in text)
    return "\n".join([step.before, step.changed(text), step.after])


@pytest.mark.parametrize(
    "story",
    [pytest.param(s, id=s.name, marks=[] if s.fast else pytest.mark.all_commands) for s in STORIES],
)
def test_documented_commands_do_what_they_say(package: Package, tmp_path: Path, story: Story) -> None:
    work, home = tmp_path / "work", tmp_path / "home"
    work.mkdir()
    home.mkdir()
    for step in story.steps:
        if not isinstance(step, Command | Snippet):
            step(work)
            continue
        before = files(work, home)
        command = step.as_run if isinstance(step, Command) else f"python -c {shlex.quote(code_of(step))}"
        if isinstance(step, Command) and step.stop_at:
            exit_code, shown = package.run_until(step.stop_at, command, work, home)
        else:
            exit_code, shown = package.run(command, work, home)
        said = f"$ {command}\n{shown}\n(exit code {exit_code})"
        allowed = [step.exit_code] if isinstance(step.exit_code, int) else step.exit_code
        assert exit_code in allowed, said
        assert [part for part in step.says if part not in shown] == [], said
        assert unexpected(files(work, home) - before, step.leaves) == [], said
        assert before - files(work, home) <= set(step.removes), said


@pytest.mark.all_commands
@pytest.mark.parametrize("name", sorted(set(COMMANDS) & DOCUMENTED))
def test_a_command_that_is_mentioned_has_a_help(package: Package, tmp_path: Path, name: str) -> None:
    exit_code, shown = package.run(f"{name} --help", tmp_path, tmp_path)
    assert exit_code == 0 and f"Usage: {name}" in shown, shown


@pytest.mark.all_commands
@pytest.mark.parametrize("text", sorted(CHECKOUT_PROGRAMS))
def test_a_program_of_the_checkout_knows_its_documented_options(package: Package, tmp_path: Path, text: str) -> None:
    _, program, *words = text.split()
    exit_code, shown = package.run(f"python {shlex.quote(str(CHECKOUT / program))} --help", tmp_path, tmp_path)
    assert exit_code == 0, shown
    assert [word for word in words if word.startswith("--") and word not in shown] == []
