"""A command that is refused, or stopped while it loads, leaves nothing; a dry run says what the run would say."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from reelbatch.cli import app, run
from reelbatch.jobs.manifest import FILE, Manifest

COMMANDS = {"generate": ("generate", "a cat"), "job run": ("job", "run", "p.txt")}
BAD = {
    "lora that is not there": (("--lora", "none.safetensors"), "none.safetensors"),
    "lora of no scale": (("--lora", "l.safetensors:strong"), "'strong' is no scale"),
    "lora that is no file of weights": (("--lora", "broken.safetensors"), "is no whole safetensors file"),
    "lora of another model": (("--lora", "other.safetensors"), "is no LoRA of this model"),
    "memory": (("--max-memory", "20GBs"), "memory size '20GBs' cannot be read"),
    "attention": (("--attention", "flash3"), "flash3"),
    "device": (("--device", "mps"), "device 'mps' is not supported"),
    "seed": (("--seed", "some"), "--seed 'some': give a whole number, or random"),
    "folder": (("--out", "report.html"), "report.html is a file; name a folder"),
    "folder below a file": (("--out", "report.html/o"), "report.html"),
}


def call(*words: object):
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("a cat\n", encoding="utf-8")
    (tmp_path / "report.html").touch()
    (tmp_path / "broken.safetensors").write_bytes(b"no weights")
    layer = "transformer.no_such_block.linear"
    weights = {f"{layer}.lora_A.weight": torch.ones(2, 4), f"{layer}.lora_B.weight": torch.ones(4, 2)}
    save_file(weights, tmp_path / "other.safetensors")
    return tmp_path


def everything(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("bad", BAD)
def test_a_refused_command_and_its_dry_run_say_the_same_and_leave_nothing(
    tiny_folder: Path, here: Path, command: str, bad: str
) -> None:
    words, message = BAD[bad]
    before = everything(here)
    for dry in ((), ("--dry-run",)) if command == "job run" else ((),):
        result = call(*COMMANDS[command], "--model", tiny_folder, "--out", "o", *words, *dry)
        assert isinstance(result.exception, ValueError | OSError), result.output
        assert message in str(result.exception)
        assert everything(here) == before


def test_a_model_that_cannot_be_opened_leaves_nothing_and_no_row(
    tiny_folder: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise ValueError("a weight is missing")

    words = ("--model", tiny_folder, "--out", "a/b/o", "--frames", 1, "--steps", 1)
    with monkeypatch.context() as patch:
        patch.setattr(run, "open_engine", fails)
        before = everything(here)
        for command in COMMANDS.values():
            assert "a weight is missing" in str(call(*command, *words).exception)
            assert everything(here) == before
    assert call("generate", "a cat", *words).exit_code == 0
    monkeypatch.setattr(run, "open_engine", fails)
    before = everything(here)
    assert "a weight is missing" in str(call("generate", "a dog", *words).exception)
    assert everything(here) == before
    assert call("generate", "a cat", *words).exit_code == 0  # nothing is missing, so that no model is needed


@pytest.mark.parametrize("swallowed", [False, True])
@pytest.mark.parametrize("command", COMMANDS)
def test_ctrl_c_while_loading_is_one_line_and_leaves_nothing(
    tiny_folder: Path, here: Path, monkeypatch: pytest.MonkeyPatch, command: str, swallowed: bool
) -> None:
    opened = run.open_engine

    def interrupted(config: object) -> object:
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except SystemExit:  # as a library may, in a callback or a destructor
            if not swallowed:
                raise
        return opened(config)

    monkeypatch.setattr(run, "open_engine", interrupted)
    handler, before = signal.getsignal(signal.SIGINT), everything(here)
    result = call(*COMMANDS[command], "--model", tiny_folder, "--out", "o")
    assert result.exit_code == 130
    _, last = result.stderr.rstrip("\n").rsplit("\n", 1)
    assert last == "stopped before anything was begun; nothing is left behind"
    assert everything(here) == before
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_folder_that_is_there_keeps_what_it_had(tiny_folder: Path, here: Path) -> None:
    words = ("--model", tiny_folder, "--out", "o", "--frames", 1, "--steps", 1)
    assert call("job", "run", "p.txt", *words).exit_code == 0
    before = everything(here)
    for more in (("--steps", 2), ("--isolation", "packed"), ("--max-memory", "20GBs"), ("--lora", "none.safetensors")):
        for dry in ((), ("--dry-run",)):
            assert isinstance(call("job", "run", "p.txt", *words, *more, *dry).exception, ValueError)
    assert everything(here) == before


def test_a_dry_run_says_what_the_run_then_says(tiny_folder: Path, here: Path) -> None:
    (here / "p.txt").write_text("a cat\na dog\nthe sea\na tree\n", encoding="utf-8")
    words = ("job", "run", "p.txt", "--model", tiny_folder, "--out", "o", "--frames", 1, "--steps", 4)
    assert call(*words).exit_code == 0
    manifest = Manifest.in_folder(here / "o")
    gone, failed, again, _ = manifest.rows()
    (here / "o" / gone.file).unlink()
    manifest.remake([failed.id, again.id])
    owner, job = manifest.enlist(), manifest.jobs()[0].number
    assert len(manifest.claim(owner, job, 2)) == 2
    manifest.fail(owner, failed.id, "no reason")
    manifest.saved(owner, {again.id: 1}, let_go=True)
    manifest.leave(owner)
    before = everything(here)
    foreseen = call(*words, "--dry-run", "--json")
    assert everything(here) == before
    lines = foreseen.stderr.splitlines()
    assert lines == [
        "1 videos are made again: their files are gone or have changed",
        "1 of 4 videos are there already and are kept",
        "1 failed earlier and are not tried again: `reelbatch job retry --failed` puts them back in line",
        "1 videos go on from a saved step",
    ]
    outlook = json.loads(foreseen.stdout)
    assert (outlook["videos"], outlook["kept"], sum(kind["videos"] for kind in outlook["kinds"])) == (4, 1, 2)
    assert set(lines) <= set(call(*words).stderr.splitlines())


@pytest.mark.parametrize(
    ("more", "lines"),
    [
        (("--steps", 3), ["steps: 2 → 3"]),
        (("--steps", 3, "--width", 48), ["width: 32 → 48", "steps: 2 → 3"]),
        (("--seed", 7), ["seed: 0 → 7, 1 → 8"]),
        (("--copies", 3), ["copies: 2 → 3"]),
        (("--copies", 1), ["copies: 2 → 1"]),
        (("--negative-prompt", "blur", "--true-cfg", 2), ["negative_prompt: none → blur", "true_cfg: 1 → 2"]),
        (("--isolation", "packed", "--attention", "math"), ["attention: auto → math", "isolation: exact → packed"]),
    ],
)
def test_what_changed_is_said_by_its_name(
    tiny_folder: Path, here: Path, more: tuple[object, ...], lines: list[str]
) -> None:
    (here / "p.txt").write_text("".join(f"a cat {i}\n" for i in range(12)), encoding="utf-8")
    words = ("job", "run", "p.txt", "--model", tiny_folder, "--out", "o", "--frames", 1, "--steps", 2, "--copies", 2)
    _rows_without_videos(words)
    for dry in ((), ("--dry-run",)):
        shown = str(call(*words, *more, *dry).exception).splitlines()
        assert [line.strip() for line in shown[1:-1]] == lines


def test_prompts_that_came_and_went_are_few_lines(tiny_folder: Path, here: Path) -> None:
    (here / "p.txt").write_text("".join(f"a cat {i}\n" for i in range(50)), encoding="utf-8")
    words = ("job", "run", "p.txt", "--model", tiny_folder, "--out", "o", "--frames", 1, "--steps", 2)
    _rows_without_videos(words)
    (here / "p.txt").write_text("".join(f"a cat {i}\n" for i in range(1, 49)) + "a dog\n" * 6, encoding="utf-8")
    shown = str(call(*words).exception).splitlines()
    assert [line.strip() for line in shown[1:-1]] == [
        "new: 6 videos of 1 prompt: 'a dog'",
        "no longer asked for: 'a cat 0', seed 0, 32×32, 1 frame, 2 steps",
        "no longer asked for: 'a cat 49', seed 0, 32×32, 1 frame, 2 steps",
    ]


def _rows_without_videos(words: tuple[object, ...]) -> None:
    """The job as a run leaves it that was stopped before its first step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("reelbatch.jobs.worker.Worker.outcomes", lambda self: iter(()))
        patch.setattr(run, "open_engine", lambda config: _NoEngine())
        call(*words)
    assert Path("o", FILE).is_file()


class _NoEngine:
    calibration = None

    def subscribe(self, listener: object) -> None:
        pass
