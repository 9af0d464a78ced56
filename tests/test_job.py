"""Jobs: what is asked for is made once, whatever happens in between, and with the frames it would have had alone."""

from __future__ import annotations

import csv
import errno
import hashlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from folders import Folder
from typer.testing import CliRunner

from reelbatch import VideoRequest
from reelbatch.cli import app
from reelbatch.engine.engine import Engine
from reelbatch.engine.loop import DECODE_BESIDE
from reelbatch.jobs import worker as worker_room
from reelbatch.jobs.job import JobChanged, Settings, in_order
from reelbatch.jobs.manifest import FILE, Manifest, ManifestError, State
from reelbatch.jobs.states import States
from reelbatch.jobs.verify import make_again, verify
from reelbatch.jobs.worker import FolderError
from reelbatch.video import Aside, read_record, sidecar

STEPS = 4


def call(*words: object):
    return CliRunner().invoke(app, [str(word) for word in words])


def asked(engine: Engine, count: int = 6, **fields: Any) -> list[VideoRequest]:
    sizes = {"height": 32, "width": 32, "frames": 5, "steps": STEPS}
    made = [VideoRequest(prompt=f"a cat {i}", seed=i, **{**sizes, **fields}) for i in range(count)]
    return [request.for_model(engine.limits) for request in made]


@pytest.fixture
def engine(tiny_folder: Path) -> Engine:
    return Engine.from_pretrained(str(tiny_folder), max_batch_size=3)


@pytest.fixture
def folder(tmp_path: Path, engine: Engine) -> Folder:
    return Folder(tmp_path / "o", engine)


def alone(engine: Engine, requests: list[VideoRequest]) -> dict[str, str]:
    return {request.prompt: engine.generate([request])[0].frames_sha256 for request in requests}


def stop_after(engine: Engine, steps: int) -> Callable[[], bool]:
    """Asked before each step: True once the engine has taken so many more."""
    taken, step = [0], engine.step

    def counted() -> Any:
        taken[0] += 1
        return step()

    engine.step = counted  # type: ignore[method-assign]
    return lambda: taken[0] >= steps


# -- the right videos ------------------------------------------------------------------------------


def test_every_video_is_the_one_alone_with_its_hash_and_nothing_else_is_left(folder: Folder) -> None:
    requests = asked(folder.engine)
    outcomes = folder.make(requests)
    assert {outcome.request.prompt for outcome in outcomes if outcome.record} == {r.prompt for r in requests}
    assert folder.frames() == alone(folder.engine, requests)
    assert all(checked.problem is None for checked in verify(folder.manifest, folder.path))
    names = {row.file for row in folder.manifest.rows()}
    assert folder.files() == {FILE} | names | {str(sidecar(Path(name))) for name in names}
    row = folder.manifest.rows()[0]
    assert (row.state, row.attempts, row.isolation, row.model_hash) == ("done", 1, "exact", "w")
    assert {"denoise", "decode", "write"} <= set(row.seconds)


def test_the_same_job_again_makes_nothing(folder: Folder) -> None:
    requests = asked(folder.engine)
    folder.make(requests)
    again = [request.model_copy(update={"id": f"other{i}"}) for i, request in enumerate(requests)]
    job = folder.open(again)
    assert job.open == []
    assert list(folder.run(job)) == []


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"dtype": "bfloat16"}, "dtype: float32 → bfloat16"),
        ({"isolation": "packed"}, "isolation: exact → packed"),
        ({"weights": "others"}, "weights: m → others"),
        ({"naming": "vbench"}, "naming: default → vbench"),
        ({"threads": 3}, "threads: 2 → 3 (OMP_NUM_THREADS=2 makes it what it was)"),
        ({"device": "cuda", "threads": None}, "device: cpu → cuda"),
    ],
)
def test_a_job_of_other_settings_is_refused_with_what_differs(folder: Folder, change: dict, told: str) -> None:
    requests = asked(folder.engine, 2)
    list(folder.run(folder.open(requests, threads=2)))
    with pytest.raises(JobChanged, match="--as-new") as refused:
        folder.open(requests, **{"threads": 2, **change})
    assert refused.value.differences == (told,)
    assert set(folder.states().values()) == {"done"}


def test_threads_are_part_of_a_fingerprint_and_change_no_byte_of_one_without(engine: Engine) -> None:
    (request,) = asked(engine, 1)
    before = Settings("m", "w", "cpu", "float32", "auto", "exact")
    told = request.model_dump(mode="json", exclude={"id", "tags", "name"})
    decides = {**dict(vars(before)), "lora": []}
    del decides["naming"], decides["threads"]
    digest = hashlib.sha256(json.dumps([told, decides], sort_keys=True).encode()).hexdigest()
    assert "vae_tiling" not in told
    assert before.fingerprint(request) == digest
    assert before.fingerprints(request) == (digest,)
    now = replace(before, threads=2)
    assert now.record == {**before.record, "threads": 2}
    assert now.fingerprints(request) == (now.fingerprint(request), digest)
    tiled = request.model_copy(update={"vae_tiling": 64})
    assert len({settings.fingerprint(r) for settings in (before, now) for r in (request, tiled)}) == 4


@pytest.mark.parametrize("mode", ["resume", "add"])
def test_a_job_that_recorded_no_threads_goes_on_with_those_of_this_machine(folder: Folder, mode: str) -> None:
    requests = asked(folder.engine, 3)
    list(folder.run(folder.open(requests), stopping=stop_after(folder.engine, STEPS + 1)))
    later = Folder(folder.path, Engine(folder.engine.model, max_batch_size=1))
    (earlier,) = folder.manifest.jobs()
    assert "threads" not in earlier.settings
    new = [request.model_copy(update={"id": f"again{i}"}) for i, request in enumerate(requests)]
    job = later.open(new, mode, threads=2)
    assert {row.id for row in job.rows} == {request.id for request in requests}
    list(later.run(job))
    again = later.open(new, threads=2)  # the job that "add" made records them, and has rows that do not
    assert again.open == []
    assert later.frames() == alone(folder.engine, requests)
    if mode == "add":
        with pytest.raises(JobChanged, match="OMP_NUM_THREADS=2"):
            later.open([*new, *asked(folder.engine, 1, width=48)], threads=3)


def test_a_job_of_other_requests_is_refused_or_made_beside(folder: Folder) -> None:
    requests = asked(folder.engine, 3)
    folder.make(requests[:2])
    with pytest.raises(JobChanged) as refused:
        folder.open(requests[1:])
    told = "\n".join(refused.value.differences)
    assert "new: 'a cat 2', seed 2" in told
    assert "no longer asked for: 'a cat 0', seed 0" in told
    added = folder.open(requests[1:], "add")
    assert [row.prompt for row in added.kept] == ["a cat 1"]
    assert [row.prompt for row in added.open] == ["a cat 2"]
    list(folder.run(added))
    assert folder.open(requests[:2]).open == []  # the first one is found again
    again = folder.open(requests[1:])  # what was added, without being told so again
    assert [(row.prompt, row.state) for row in again.rows] == [("a cat 1", "done"), ("a cat 2", "done")]
    (folder.path / again.rows[0].file).unlink()
    lost = folder.open(requests[1:])
    assert (lost.remade, [row.prompt for row in lost.open]) == (1, ["a cat 1"])
    list(folder.run(lost))
    assert folder.frames() == alone(folder.engine, requests)
    new = folder.open(requests, "new")
    assert new.kept == []
    list(folder.run(new))
    rows = folder.manifest.rows()
    assert len({row.file for row in rows}) == len(rows) == 6
    assert {row.state for row in rows} == {"done"}


def test_the_most_work_comes_first_and_what_is_alike_together(engine: Engine) -> None:
    small, large, long = (asked(engine, 2, **sizes) for sizes in ({}, {"width": 64}, {"frames": 9, "steps": 9}))
    mixed = [small[0], large[0], long[0], small[1], large[1], long[1]]
    turns = in_order(mixed)
    assert [mixed[turns.index(turn)].seed for turn in range(6)] == [0, 1, 0, 1, 0, 1]
    assert [mixed[turns.index(turn)].frames for turn in range(6)] == [9, 9, 5, 5, 5, 5]
    assert [mixed[turns.index(turn)].width for turn in range(6)] == [32, 32, 64, 64, 32, 32]


# -- stopping and going on -------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 3, 5, 6])
def test_a_stopped_job_goes_on_from_its_step_with_the_same_frames(
    folder: Folder, tiny_folder: Path, steps: int
) -> None:
    requests = asked(folder.engine)
    folder.make(requests, stopping=stop_after(folder.engine, steps))
    saved = {row.id: row.step for row in folder.manifest.rows() if row.step}
    assert set(saved.values()) == ({steps % STEPS} if steps % STEPS else set())
    assert State.RUNNING not in folder.states().values()
    later = Folder(folder.path, Engine.from_pretrained(str(tiny_folder), max_batch_size=2))
    begun: dict[str, int] = {}
    later.engine.on_progress = lambda p: begun.setdefault(p.id, p.step) if p.phase == "denoise" else None
    later.make(requests)
    assert {id: step - 1 for id, step in begun.items() if id in saved} == saved
    assert later.frames() == alone(later.engine, requests)
    assert not (folder.path / worker_room.OWN_FOLDER).exists()


def test_states_are_saved_every_so_many_steps(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = asked(folder.engine, 3)
    states = folder.engine.step

    def killed() -> Any:
        if [row.step for row in folder.manifest.rows()] == [2, 2, 2]:
            raise KeyboardInterrupt
        return states()

    monkeypatch.setattr(folder.engine, "step", killed)
    with pytest.raises(KeyboardInterrupt):
        folder.make(requests, checkpoint_every=2)
    monkeypatch.undo()
    assert {row.step for row in folder.manifest.rows()} == {2}


@pytest.mark.parametrize("damage", ["gone", "cut", "of another request"])
def test_a_saved_state_that_is_no_good_is_left_alone(folder: Folder, tiny_folder: Path, damage: str) -> None:
    requests = asked(folder.engine, 2)
    folder.make(requests, stopping=stop_after(folder.engine, 2))
    for file in (folder.path / worker_room.OWN_FOLDER / "states").iterdir():
        if damage == "gone":
            file.unlink()
        elif damage == "cut":
            file.write_bytes(file.read_bytes()[:50])
        else:
            other = asked(folder.engine, 1, width=64)
            folder.engine.submit(other[0])
            folder.engine.step()
            States(file.parent).save(file.stem, folder.engine.states()[other[0].id])
            folder.engine.cancel(other[0].id)
            folder.engine.step()
    later = Folder(folder.path, Engine.from_pretrained(str(tiny_folder)))
    later.make(requests)
    assert later.frames() == alone(later.engine, requests)


# -- kills -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kill_resume() -> ModuleType:
    path = Path(__file__).parents[1] / "benchmarks" / "kill_resume.py"
    spec = importlib.util.spec_from_file_location("kill_resume", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


HARNESS = """
import json, sys
sys.path.insert(0, {benchmarks!r})
import kill_resume as room
from pathlib import Path
root, model = Path(sys.argv[1]), sys.argv[2]
prompts, log = root / "prompts.txt", root / "log"
prompts.write_text("\\n".join(room.PROMPTS), encoding="utf-8")
room.run_through(room.job_command(prompts, root / "calm", model, 3), log)
command = room.job_command(prompts, root / "o", model, 3, ["--checkpoint-every", "1"])
found = room.kill_and_resume(command, root / "o", log, kills={kills}, longest={longest}, processes={processes}, seed=3)
print(json.dumps([found.kills, len(found.rows), found.problems(room.read(root / "calm"))]))
"""


@pytest.mark.parametrize(("processes", "kills"), [(1, 6), (3, 3)])
def test_a_job_that_is_killed_again_and_again_is_the_undisturbed_one(
    tiny_folder: Path, tmp_path: Path, processes: int, kills: int
) -> None:
    benchmarks = str(Path(__file__).parents[1] / "benchmarks")
    code = HARNESS.format(benchmarks=benchmarks, kills=kills, longest=1.2, processes=processes)
    command = [sys.executable, "-c", code, str(tmp_path), str(tiny_folder)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    count, videos, problems = json.loads(done.stdout.splitlines()[-1])
    assert count >= 2
    assert videos == 24
    assert problems == []


def test_a_file_in_place_whose_row_was_not_written_is_adopted(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = asked(folder.engine, 3)
    put_in_place = Aside.put_in_place

    def killed(self: Aside, *options: bool) -> None:
        put_in_place(self, *options)
        raise KeyboardInterrupt

    monkeypatch.setattr(Aside, "put_in_place", killed)
    with pytest.raises(KeyboardInterrupt):
        folder.make(requests)
    monkeypatch.undo()
    placed = {path.name: path.stat().st_mtime_ns for path in folder.path.glob("*.mp4")}
    assert placed
    assert State.DONE not in folder.states().values()
    job = folder.open(requests)
    for name in placed:  # a kill between the two leaves no sidecar
        sidecar(folder.path / name).unlink()
    assert len([outcome for outcome in folder.run(job) if outcome.record]) == 3
    assert {name: (folder.path / name).stat().st_mtime_ns for name in placed} == placed
    assert folder.frames() == alone(folder.engine, requests)
    assert all(read_record(folder.path / row.file)["request"] == row.request for row in folder.manifest.rows())
    assert all(sidecar(folder.path / name).exists() for name in placed)


@pytest.mark.parametrize("threads", ["as here", "not recorded", "others"])
def test_a_file_in_place_is_adopted_unless_its_record_names_other_threads(folder: Folder, threads: str) -> None:
    job = folder.open(asked(folder.engine, 1))
    (row,) = job.rows
    (video,) = folder.engine.generate([row.to_request()])
    here = video.provenance.pop("threads")
    if threads != "not recorded":
        video.provenance["threads"] = here + (threads == "others")
    path = video.save(folder.path / row.file)
    data = path.read_bytes()
    (outcome,) = folder.run(job)
    assert path.read_bytes() == data
    if threads == "others":
        assert isinstance(outcome.error, FileExistsError)
    else:
        assert (outcome.error, folder.frames()[row.prompt]) == (None, video.frames_sha256)


# -- what goes wrong -------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EROFS, errno.EIO, errno.ESTALE])
def test_a_folder_that_takes_no_more_files_stops_the_job_and_loses_nothing(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    requests = asked(folder.engine)
    monkeypatch.setattr(worker_room, "WRITE_AGAIN_AFTER", (0.0,))
    put_in_place, calls = Aside.put_in_place, []

    def full(self: Aside, *options: bool) -> None:
        calls.append(self.path)
        if len(calls) > 2:
            raise OSError(error, os.strerror(error))
        put_in_place(self, *options)

    monkeypatch.setattr(Aside, "put_in_place", full)
    with pytest.raises(FolderError, match=os.strerror(error)):
        folder.make(requests)
    assert sorted(folder.states().values()) == ["done"] * 2 + ["waiting"] * 4
    monkeypatch.undo()
    later = Folder(folder.path, Engine(folder.engine.model))
    later.make(requests)
    assert later.frames() == alone(later.engine, requests)


def test_a_folder_that_recovers_is_written_again(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_room, "WRITE_AGAIN_AFTER", (0.0, 0.0))
    put_in_place, calls = Aside.put_in_place, []

    def gone_for_a_while(self: Aside, *options: bool) -> None:
        calls.append(self.path)
        if len(calls) in (1, 2):
            raise OSError(errno.ENOTCONN, "Transport endpoint is not connected")
        put_in_place(self, *options)

    monkeypatch.setattr(Aside, "put_in_place", gone_for_a_while)
    folder.make(asked(folder.engine, 2))
    assert set(folder.states().values()) == {"done"}
    assert len(calls) == 4


def test_anothers_file_is_never_replaced(folder: Folder) -> None:
    requests = asked(folder.engine, 2)
    job = folder.open(requests)
    taken = folder.path / job.rows[0].file
    taken.write_bytes(b"somebody else's")
    outcomes = {outcome.request.prompt: outcome for outcome in folder.run(job)}
    assert isinstance(outcomes["a cat 0"].error, FileExistsError)
    assert folder.states() == {"a cat 0": "failed", "a cat 1": "done"}
    assert taken.read_bytes() == b"somebody else's"
    taken.unlink()
    folder.manifest.retry([State.FAILED])
    folder.make(requests)
    assert set(folder.states().values()) == {"done"}


def test_files_that_vanish_or_change_are_made_again(folder: Folder) -> None:
    requests = asked(folder.engine, 4)
    folder.make(requests)
    first = folder.frames()
    gone, cut, changed, _ = (folder.path / row.file for row in folder.manifest.rows())
    gone.unlink()
    cut.write_bytes(cut.read_bytes()[:-100])
    data = bytearray(changed.read_bytes())
    data[len(data) // 2] ^= 0xFF
    changed.write_bytes(data)
    wrong = {checked.row.prompt: checked.problem for checked in verify(folder.manifest, folder.path)}
    assert wrong["a cat 0"] == "is gone"
    assert "hash differs" in str(wrong["a cat 1"])
    assert "hash differs" in str(wrong["a cat 2"])
    assert wrong["a cat 3"] is None
    job = folder.open(requests)  # sees by name and size alone
    assert (job.remade, len(job.open)) == (2, 2)
    list(folder.run(job))
    bad = [checked.row for checked in verify(folder.manifest, folder.path) if checked.problem]
    assert [row.prompt for row in bad] == ["a cat 2"]
    make_again(folder.manifest, folder.path, bad)
    folder.make(requests)
    assert folder.frames() == first
    assert all(checked.problem is None for checked in verify(folder.manifest, folder.path))


def test_a_request_that_fails_is_told_and_can_be_tried_again(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = asked(folder.engine, 4)
    encode = folder.engine.model.family.text.encode

    def broken(prompt: str, prompt_2: str | None = None) -> Any:
        if prompt == "a cat 2":
            raise RuntimeError("the tokenizer is on fire")
        return encode(prompt, prompt_2)

    monkeypatch.setattr(folder.engine.model.family.text, "encode", broken)
    outcomes = folder.make(requests)
    assert [str(outcome.error) for outcome in outcomes if outcome.error] == ["the tokenizer is on fire"]
    failed = next(row for row in folder.manifest.rows() if row.state == "failed")
    assert (failed.prompt, failed.error) == ("a cat 2", "RuntimeError: the tokenizer is on fire")
    monkeypatch.undo()
    assert folder.make(requests) == []  # not without being told
    folder.manifest.retry([State.FAILED])
    folder.make(requests)
    assert folder.frames() == alone(folder.engine, requests)


def test_what_the_engine_handed_out_is_written_though_the_manifest_refuses_a_failure(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of these end in one step, the failure first."""
    requests = asked(folder.engine, 3, steps=1)
    encode = folder.engine.model.family.text.encode

    def broken(prompt: str, prompt_2: str | None = None) -> Any:
        if prompt == "a cat 0":
            raise RuntimeError("the tokenizer is on fire")
        return encode(prompt, prompt_2)

    def refuse(*_: object) -> bool:
        raise ManifestError("the manifest cannot be used: disk I/O error")

    monkeypatch.setattr(folder.engine.model.family.text, "encode", broken)
    monkeypatch.setattr(folder.manifest, "fail", refuse)
    with pytest.raises(ManifestError):
        folder.make(requests)
    assert folder.states() == {"a cat 0": "waiting", "a cat 1": "done", "a cat 2": "done"}


def test_a_file_that_cannot_be_written_for_want_of_memory_is_tried_again(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_in_place, calls = Aside.put_in_place, []

    def short(self: Aside, *options: bool) -> None:
        calls.append(self.path)
        if len(calls) == 1 or self.path.name.startswith("a-cat-1"):
            raise MemoryError("no room for a frame")
        put_in_place(self, *options)

    monkeypatch.setattr(Aside, "put_in_place", short)
    outcomes = {outcome.request.prompt: outcome for outcome in folder.make(asked(folder.engine, 3))}
    assert folder.states() == {"a cat 0": "done", "a cat 1": "failed", "a cat 2": "done"}
    assert "writing a-cat-1-seed1.mp4 runs out of memory, whatever was tried: no room" in str(outcomes["a cat 1"].error)
    assert not (folder.path / worker_room.OWN_FOLDER).exists()


def test_a_video_that_is_cancelled_while_it_runs_is_dropped_alone(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_room, "BEAT_SECONDS", 0.0)
    requests = asked(folder.engine, 3)
    job = folder.open(requests)
    step = folder.engine.step

    def cancelling() -> Any:
        other = Manifest.in_folder(folder.path)
        other.cancel([requests[1].id])
        return step()

    folder.engine.step = cancelling  # type: ignore[method-assign]
    outcomes = {outcome.request.prompt: outcome for outcome in folder.run(job)}
    assert outcomes["a cat 1"].cancelled
    assert folder.states() == {"a cat 0": "done", "a cat 1": "cancelled", "a cat 2": "done"}
    assert len(list(folder.path.glob("*.mp4"))) == 2


def test_the_writer_holds_the_engine_back_rather_than_piling_frames_up(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Path] = []
    put_in_place, decode, finished = Aside.put_in_place, folder.engine.model.family.decoder.decode, [0]

    def slow(self: Aside, *options: bool) -> None:
        time.sleep(0.05)
        put_in_place(self, *options)
        written.append(self.path)

    def counting(latents: Any, tiles: Any) -> Any:
        finished[0] += 1
        assert finished[0] - len(written) <= worker_room.UNWRITTEN + DECODE_BESIDE + 2
        return decode(latents, tiles)

    monkeypatch.setattr(Aside, "put_in_place", slow)
    monkeypatch.setattr(folder.engine.model.family.decoder, "decode", counting)
    folder.engine.planner.max_batch_size = 1
    folder.engine.decode_beside = DECODE_BESIDE
    folder.make(asked(folder.engine, 14, steps=1, frames=1, height=16, width=16))
    assert set(folder.states().values()) == {"done"}
    assert finished == [14]


# -- the commands ----------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.csv").write_text(
        "prompt,frames,tags\na cat,5,animal\na dog,5,animal;loud\nthe sea,9,\na cat,5,animal\n", encoding="utf-8"
    )
    return tmp_path


def job_run(tiny_folder: Path, *more: object):
    return call("job", "run", "p.csv", "--model", tiny_folder, "--steps", 2, "--out", "o", *more)


def test_a_suite_runs_and_its_state_can_be_read(tiny_folder: Path, here: Path) -> None:
    result = job_run(tiny_folder, "--copies", 2, "--naming", "vbench", "--json")
    assert result.exit_code == 0
    assert len(result.stdout.splitlines()) == 8
    names = {
        f"{prompt}-{i}.mp4" for prompt, count in (("a cat", 4), ("a dog", 2), ("the sea", 2)) for i in range(count)
    }
    assert {path.name for path in Path("o/videos").glob("*")} == names
    assert (here / "o" / "report.html").is_file()
    status = json.loads(call("job", "status", "--out", "o", "--json").stdout)
    assert (status["videos"], status["done"], status["failures"]) == (8, 8, [])
    assert status["videos_per_hour"] > 0
    assert "done" in call("job", "status", "--out", "o").stdout
    assert call("job", "verify", "--out", "o").exit_code == 0
    (here / "o" / "videos" / "a dog-1.mp4").unlink()
    checked = call("job", "verify", "--out", "o", "--json")
    assert checked.exit_code == 1
    problems = {line["file"]: line["problem"] for line in map(json.loads, checked.stdout.splitlines())}
    assert {file for file, problem in problems.items() if problem} == {"videos/a dog-1.mp4"}
    assert call("job", "export", "rows.csv", "--out", "o").exit_code == 0
    with open("rows.csv", newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["prompt"] for row in rows] == [p for p in ("a cat", "a dog", "the sea", "a cat") for _ in range(2)]
    assert json.loads(rows[2]["tags"]) == ["animal", "loud"]
    again = job_run(tiny_folder, "--copies", 2, "--naming", "vbench", "--json")
    assert sorted(json.loads(line)["state"] for line in again.stdout.splitlines()) == ["done", *["kept"] * 7]


def test_a_suite_may_be_named_after_another(tiny_folder: Path, here: Path) -> None:
    count = 4
    names = [f"called {i}" for i in range(count)]
    Path("names.txt").write_text("\n".join(names))
    options = ("--naming", "vbench", "--named-after", "names.txt")
    assert job_run(tiny_folder, *options).exit_code == 0
    assert {path.name for path in Path("o/videos").glob("*")} == {f"{name}-0.mp4" for name in names}
    assert f"{count} of {count} videos are there already" in job_run(tiny_folder, *options).stderr
    Path("names.txt").write_text("\n".join(["another", *names[1:]]))
    assert "name: called 0 → another (1 of 4 videos)" in str(job_run(tiny_folder, *options).exception)


def test_a_part_of_a_suite_can_be_chosen(tiny_folder: Path, here: Path) -> None:
    found = json.loads(job_run(tiny_folder, "--only", "tag=animal", "--limit", 2, "--dry-run", "--json").stdout)
    assert (found["videos"], found["prompts"], found["batches"], found["seconds"]) == (2, 2, 1, None)
    assert found["bytes"] > 0
    assert not (here / "o").exists()
    told = job_run(tiny_folder, "--only", "tag=nothing")
    assert "leaves none of the prompts" in str(told.exception)
    orders = [json.dumps(found) for found in (job_run(tiny_folder, "--shuffle", "--dry-run", "--json").stdout,) * 2]
    assert orders[0] == orders[1]


def test_settings_that_changed_are_refused_before_a_model_is_loaded(
    tiny_folder: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert job_run(tiny_folder).exit_code == 0
    monkeypatch.setattr("reelbatch.cli.run.open_engine", lambda *_, **__: pytest.fail("the model was loaded"))
    told = str(job_run(tiny_folder, "--isolation", "packed").exception)
    assert "isolation: exact → packed" in told
    assert "--as-new" in told
    assert "give one" in str(job_run(tiny_folder, "--add", "--as-new").exception)


def test_rows_are_cancelled_and_put_back_in_line(tiny_folder: Path, here: Path) -> None:
    assert job_run(tiny_folder).exit_code == 0
    manifest = Manifest.in_folder(here / "o")
    first, second = (row.id for row in manifest.rows()[:2])
    manifest.remake([first])
    assert call("job", "cancel", first, "--out", "o").exit_code == 0
    told = call("job", "cancel", second, "--out", "o")
    assert told.exit_code == 1
    assert "had ended already" in told.stderr
    assert "no video has the id nobody" in str(call("job", "cancel", "nobody", "--out", "o").exception)
    assert "nothing was named" in str(call("job", "retry", "--out", "o").exception)
    assert "1 videos are in line again" in call("job", "retry", first, "--out", "o").stderr
    assert "no job has run there" in str(call("job", "status", "--out", "nowhere").exception)


@pytest.mark.parametrize("signals", [1, 2])
def test_ctrl_c_once_saves_what_runs_and_twice_stops_at_once(tiny_folder: Path, here: Path, signals: int) -> None:
    words = ["job", "run", "p.csv", "--model", str(tiny_folder), "--steps", "400", "--out", "o", "--copies", "4"]
    command = [sys.executable, "-m", "reelbatch", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    manifest = Path("o", FILE)
    while not manifest.exists() or not Manifest.in_folder(Path("o")).counts()[State.RUNNING]:
        assert process.poll() is None
        time.sleep(0.2)
    time.sleep(1.0)
    for _ in range(signals):
        process.send_signal(signal.SIGINT)
        time.sleep(0.1)
    _, told = process.communicate(timeout=60)
    stopped = (130, -signal.SIGINT) if signals == 2 else (130,)  # the second may come when all is saved already
    assert process.returncode in stopped, told
    rows = Manifest.in_folder(Path("o")).rows()
    if signals == 1:
        assert "goes on where it stopped" in told
        assert any(row.step for row in rows)
        assert {row.state for row in rows} == {"waiting"}
    else:
        Manifest.in_folder(Path("o")).reap()
        assert Manifest.in_folder(Path("o")).counts()[State.WAITING] == len(rows)
