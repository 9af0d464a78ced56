"""The command line: what a person types, sees and finds in the folder."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

import reelbatch
from reelbatch.cli import app, main
from reelbatch.cli.common import interruptible
from reelbatch.engine.config import EngineConfig
from reelbatch.engine.engine import Engine, Progress
from reelbatch.jobs.display import display
from reelbatch.loading.hub import DEMO_FOLDER
from reelbatch.video import read_record, read_video
from reelbatch.wording import duration, shorten


def call(*words: str | Path):
    return CliRunner().invoke(app, [str(word) for word in words])


def records(result) -> list[dict]:
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_prompts_become_videos_sidecars_and_one_contact_sheet(tiny_folder: Path, here: Path) -> None:
    result = call("generate", "a red cat", "a blue dog", "--copies", 2, "--model", tiny_folder, "--out", "o", "--json")
    assert result.exit_code == 0
    made = records(result)
    assert [record["state"] for record in made] == ["done"] * 4
    assert {(record["request"]["prompt"], record["request"]["seed"]) for record in made} == {
        (prompt, seed) for prompt in ("a red cat", "a blue dog") for seed in (0, 1)
    }
    for record in made:
        assert read_video(record["path"]).shape == (9, 32, 32, 3)
        assert read_record(record["path"])["batch"]["largest"] == 4
    assert (here / "o" / "contact-sheet.png").is_file()
    assert len(list((here / "o").glob("*.mp4"))) == 4


def test_a_file_of_mixed_requests_is_one_batch_and_each_video_is_what_it_is_alone(
    tiny_folder: Path, here: Path
) -> None:
    lines = [
        {"prompt": "a red cat", "frames": 5},
        {"prompt": "a blue dog", "width": 48, "steps": 5, "seed": 7},
        {"prompt": "the sea", "negative_prompt": "", "true_cfg": 2.0, "copies": 2},
    ]
    (here / "p.jsonl").write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    result = call("generate", "--prompts", "p.jsonl", "--model", tiny_folder, "--json", "--out", "o")
    assert result.exit_code == 0
    engine = Engine.from_pretrained(str(tiny_folder))
    for record in records(result):
        (alone,) = engine.generate([reelbatch.VideoRequest(**record["request"])])
        assert record["frames_sha256"] == alone.frames_sha256


def test_the_same_command_again_makes_only_what_is_missing(tiny_folder: Path, here: Path) -> None:
    words = ("generate", "a red cat", "a red cat", "a dog", "--model", tiny_folder, "--out", "o", "--json")
    first = records(call(*words))
    Path(first[1]["path"]).unlink()
    again = call(*words)
    assert "2 of 3 videos are there already" in again.stderr
    states = {record["path"]: record["state"] for record in records(again)}
    assert sorted(states.values()) == ["done", "kept", "kept"]
    assert states[first[1]["path"]] == "done"
    assert {record["frames_sha256"] for record in records(again)} == {record["frames_sha256"] for record in first}
    assert [record["state"] for record in records(call(*words, "--overwrite"))] == ["done"] * 3


def test_a_folder_has_one_sheet_of_all_its_videos_in_one_order(tiny_folder: Path, here: Path) -> None:
    words = ("--model", tiny_folder, "--out", "o", "--frames", 1, "--steps", 1)
    for prompt in ("a cat", "a dog"):
        assert call("generate", prompt, *words).exit_code == 0
    both = (here / "o" / "contact-sheet.png").read_bytes()
    for prompts in (("a cat",), ("a dog",), ("a dog", "a cat")):
        assert "contact sheet: o/contact-sheet.png" in call("generate", *prompts, *words).stderr
        assert (here / "o" / "contact-sheet.png").read_bytes() == both
    assert "contact sheet: o/contact-sheet.png" in call("job", "report", "o").stderr
    assert [path.name for path in (here / "o").glob("*.png")] == ["contact-sheet.png"]


def test_what_is_somebody_elses_does_not_count_as_a_video(tiny_folder: Path, here: Path) -> None:
    words = ("generate", "a cat", "a dog", "--model", tiny_folder, "--out", "o", "--frames", 1, "--steps", 1)
    assert "2 of 2 videos in o" in call(*words).stderr
    for path in (here / "o").glob("a-dog-seed0.*"):
        path.unlink()
    (here / "o/a-dog-seed0.mp4/mine").mkdir(parents=True)
    again = call(*words)
    assert again.exit_code == 1
    assert "1 of 2 videos in o" in again.stderr


def test_a_warning_of_unknown_words_is_one_short_line(here: Path) -> None:
    prompt = " ".join(f"word{'x' * 30}{i}" for i in range(100))
    result = call("generate", prompt, "--lora", "none.safetensors", "--steps", 1)
    (line,) = (line for line in result.stderr.splitlines() if line.startswith("warning"))
    assert "and 95 more words: `reelbatch model-info demo` says" in line
    assert len(line) < 300


def test_a_warning_of_unknown_words_names_the_model_as_it_was_given(here: Path) -> None:
    (here / "my models").mkdir()
    (here / "my models/demo").symlink_to(DEMO_FOLDER)
    result = call("generate", "a cat", "--model", "my models/demo", "--lora", "none.safetensors", "--steps", 1)
    assert "`reelbatch model-info 'my models/demo'` says what it draws" in result.stderr


def test_all_faults_are_told_at_once_and_before_a_model_is_loaded(
    tiny_folder: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reelbatch.cli.run.open_engine", lambda *_, **__: pytest.fail("the model was loaded"))
    (here / "p.csv").write_text("prompt,frames\na cat,10\na dog,9\n,5\n", encoding="utf-8")
    result = call("generate", "--prompts", "p.csv", "--width", 50, "--model", tiny_folder)
    told = str(result.exception)
    assert "p.csv, line 2: frames=10 must be 4·k + 1" in told
    assert "nearest: 9 or 13" in told
    assert "p.csv, line 3: width=50 must be a multiple of 16" in told
    assert "p.csv, line 4: prompt=''" in told


def test_a_request_that_fails_is_told_and_the_others_are_made(
    tiny_folder: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written_aside = reelbatch.Video.written_aside

    def odd(self, path, folder=None):
        if self.request.prompt == "a dog":
            raise ValueError("H.264 needs even sizes")
        return written_aside(self, path, folder)

    monkeypatch.setattr(reelbatch.Video, "written_aside", odd)
    result = call("generate", "a cat", "a dog", "the sea", "--model", tiny_folder, "--json", "--out", "o")
    assert result.exit_code == 1
    by_state = {record["request"]["prompt"]: record for record in records(result)}
    assert by_state["a dog"]["state"] == "failed"
    assert "even sizes" in by_state["a dog"]["error"]["message"]
    assert by_state["a cat"]["state"] == by_state["the sea"]["state"] == "done"
    assert "failed" in result.stderr


def test_what_cannot_work_is_refused_before_a_model_is_loaded(
    tiny_folder: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reelbatch.cli.run.open_engine", lambda *_, **__: pytest.fail("the model was loaded"))
    (here / "file").touch()
    command = ("generate", "a cat", "--model", tiny_folder)
    assert "no videos can be written there" in str(call(*command, "--out", "file").exception)
    assert "seed=-1 must be a whole number from 0" in str(call(*command, "--seed", -1).exception)
    assert "did you mean 'own-frame'?" in str(call(*command, "--attention-rule", "own-fram").exception)
    for words in (("--isolation", "packd"), ("--batch-size", 0), ("--batch-tokens", 0), ("--steps", "ten")):
        result = call(*command, *words)
        assert result.exit_code == 2
        assert words[0] in result.stderr


@pytest.mark.parametrize(
    ("words", "warned"),
    [
        (("--true-cfg", 3), "true_cfg does nothing without a negative prompt"),
        (("--negative-prompt", "blur"), "a negative prompt does nothing while true_cfg is 1"),
        (("--true-cfg", 3, "--negative-prompt", ""), ""),
        ((), ""),
    ],
)
def test_guidance_that_does_nothing_is_told(
    tiny_folder: Path, here: Path, words: tuple[object, ...], warned: str
) -> None:
    told = call("generate", "a cat", "--steps", 1, "--frames", 1, "--model", tiny_folder, *words).stderr
    assert warned in told
    assert bool(warned) == ("warning" in told)


def test_tiles_are_an_option_a_column_and_part_of_the_record(tiny_folder: Path, here: Path) -> None:
    (here / "p.csv").write_text("prompt,vae_tiling\na cat,\na dog,64\nthe sea,0\n", encoding="utf-8")
    words = ("generate", "--prompts", "p.csv", "--model", tiny_folder, "--json", "--frames", 1, "--height", 96, "--out")
    tiles = {
        given: {
            record["request"]["prompt"]: (record["request"].get("vae_tiling"), record["vae_tiles"])
            for record in records(call(*words, given, *(["--vae-tiling", given] if given else [])))
        }
        for given in ("", "auto", "off", "96")
    }
    own = {"a dog": (64, 64), "the sea": (0, False)}
    assert tiles[""] == tiles["auto"] == {"a cat": (None, False), **own}
    assert tiles["off"] == {"a cat": (0, False), **own}
    assert tiles["96"] == {"a cat": (96, 96), **own}
    refused = call(*words, "o", "--vae-tiling", "small")
    assert "--vae-tiling 'small': give auto, off, or the side of a tile in pixels" in str(refused.exception)
    assert "vae_tiling=70 must be 0 (whole) or a multiple of 32" in str(call(*words, "o", "--vae-tiling", 70).exception)
    assert not (here / "o").exists()


def test_options_come_to_the_engine_as_its_configuration(
    tiny_folder: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs: list[EngineConfig] = []

    def opened(config: EngineConfig) -> Engine:
        configs.append(config)
        return Engine.open(config)

    monkeypatch.setattr("reelbatch.cli.run.open_engine", opened)
    (here / "p.txt").write_text("a cat", encoding="utf-8")
    words = ("--model", tiny_folder, "--frames", 1, "--steps", 1)
    more = ("--isolation", "packed", "--batch-size", 3, "--batch-tokens", 900, "--max-memory", "64GiB")
    assert call("generate", "a cat", *words, "--out", "a").exit_code == 0
    assert call("job", "run", "p.txt", *words, "--out", "b", *more, "--keep-pixels").exit_code == 0
    plain = EngineConfig(model=str(tiny_folder), decode_beside=None)
    assert configs[0] == plain
    assert configs[1] == replace(
        plain, isolation="packed", max_batch_size=3, max_batch_tokens=900, max_memory=64 * 2**30, keep_pixels=True
    )


def test_a_refused_command_leaves_no_trace(tiny_folder: Path, here: Path) -> None:
    (here / "p.txt").write_text("a cat", encoding="utf-8")
    for words in (("--max-memory", "much"), ("--lora", "l.safetensors:strong"), ("--attention", "none-such")):
        for command in (("generate", "a cat"), ("job", "run", "p.txt")):
            assert isinstance(call(*command, "--model", tiny_folder, "--out", "o", *words).exception, ValueError)
            assert not (here / "o").exists()


IMPORTS = """
import os, sys, torch._dynamo, torch.distributed.fsdp
assert "diffusers" not in sys.modules and "transformers" not in sys.modules
for line in sys.argv[1:]:
    child = os.fork()
    if not child:
        exec(line)
        sys.exit()
    if os.waitpid(child, 0)[1]:
        sys.exit(f"failed: {line}")
"""


def test_importing_says_nothing(here: Path) -> None:
    """Each room that users import, in a process of its own with nothing set, forked from one with torch."""
    environment = {name: value for name, value in os.environ.items() if "VERBOSITY" not in name}
    lines = ("from reelbatch import repair", "from reelbatch import Engine")
    done = subprocess.run([sys.executable, "-c", IMPORTS, *lines], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert "torchvision" not in done.stderr
    assert "torchao" not in done.stderr


def test_bugs_of_ours_are_no_bad_input(
    tiny_folder: Path, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("out of paper")

    monkeypatch.setattr("reelbatch.cli.run.open_engine", broken)
    monkeypatch.setattr("sys.argv", ["reelbatch", "generate", "a cat", "--model", str(tiny_folder)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    assert "error: out of paper (RuntimeError" in capsys.readouterr().err


def run_command(*words: str | Path, **options) -> subprocess.Popen:
    command = [sys.executable, "-m", "reelbatch", *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def test_an_error_is_a_line_and_not_a_traceback(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["reelbatch", "generate", "a cat", "--model", str(here / "nothing")])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert "no such folder" in told
    assert "Traceback" not in told


def test_ctrl_c_before_anything_runs_is_no_error(tiny_folder: Path, here: Path) -> None:
    process = run_command("generate", "a cat", "--model", tiny_folder)
    assert process.stderr is not None
    while not process.stderr.readline().startswith("loading "):
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=120)
    if process.returncode == 130 and "goes on" not in told:  # else the little model was loaded already
        assert told.splitlines()[-1] == "stopped before anything was begun; nothing is left behind"
        assert "Traceback" not in told
        assert list(here.iterdir()) == []
    assert process.returncode == 130


def test_ctrl_c_keeps_what_is_done_and_the_same_command_goes_on(tiny_folder: Path, here: Path) -> None:
    words = (
        "generate",
        "a cat",
        "--copies",
        40,
        "--steps",
        20,
        "--batch-size",
        1,
        "--model",
        tiny_folder,
        "--out",
        "o",
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = run_command(*words, "--json", env=environment)
    assert process.stdout is not None
    process.stdout.readline()  # one video is done
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "the same command goes on where it stopped" in told
    done = list((here / "o").glob("*.mp4"))
    assert 1 <= len(done) < 40
    assert all(len(read_video(path)) == 9 for path in done)
    assert not list((here / "o").glob("*.part"))
    again = call("generate", "a cat", "--copies", len(done) + 1, *words[4:], "--json")
    assert sorted(record["state"] for record in records(again)) == ["done", *["kept"] * len(done)]


def test_a_cluster_that_asks_a_command_to_end_is_answered_as_ctrl_c() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with interruptible() as interrupted:
        assert not interrupted
        signal.raise_signal(signal.SIGTERM)
        assert interrupted == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGTERM) is before


def test_model_info_tells_what_a_folder_holds(tiny_folder: Path) -> None:
    result = call("model-info", tiny_folder, "--json")
    info = json.loads(result.stdout)
    assert result.exit_code == 0
    assert info["fits"]
    assert {component["name"] for component in info["components"]} >= {"transformer", "vae", "text_encoder"}
    assert "can run" in call("model-info", tiny_folder).stdout


def test_help_teaches(here: Path) -> None:
    told = call("generate", "--help").stdout
    assert "Examples" in told
    assert "--isolation" in told
    assert call("--version").stdout.strip() == f"reelbatch {reelbatch.__version__}"


def test_bars_show_a_prompt_as_it_is_written() -> None:
    request = reelbatch.VideoRequest(prompt="[/red] a [bold]cat")
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with display([request], console) as shown:
        shown.event(Progress(request.id, "denoise", 1, 4, 0.25))
    told = console.file.getvalue()
    assert "[/red] a [bold]cat" in told
    assert "1/4" in told
    assert "0.25 s/step" in told


@pytest.mark.parametrize(("seconds", "said"), [(8.4, "8 s"), (200, "3 min 20 s"), (18720, "5 h 12 min")])
def test_times_are_said_as_people_say_them(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def test_long_prompts_are_shortened() -> None:
    assert shorten("a " * 50, 10) == "a a a a a…"
    assert np.all([len(shorten("x" * n, 10)) <= 10 for n in range(30)])


def run_main(monkeypatch: pytest.MonkeyPatch, *words: str) -> int | str | None:
    monkeypatch.setattr("sys.argv", ["reelbatch", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_completes_commands_and_options(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], shell: str
) -> None:
    monkeypatch.setenv("HOME", str(here))
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    assert run_main(monkeypatch, "--show-completion", shell) in (0, None)
    script = capsys.readouterr().out
    assert f"_REELBATCH_COMPLETE=complete_{shell}" in script
    assert run_main(monkeypatch, "--install-completion", shell) in (0, None)
    installed = [path.read_text(encoding="utf-8") for path in here.rglob("*") if path.is_file()]
    assert any(script.strip() in text for text in installed)


@pytest.mark.parametrize(("typed", "completed"), [("job st", "status"), ("generate --iso", "--isolation")])
def test_what_is_typed_is_completed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], typed: str, completed: str
) -> None:
    monkeypatch.setenv("_REELBATCH_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", f"reelbatch {typed}")
    monkeypatch.setenv("COMP_CWORD", "2")
    run_main(monkeypatch)
    assert capsys.readouterr().out.split() == [completed]
