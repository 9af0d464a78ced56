"""A worker: an engine makes the videos that a manifest asks for, and a thread beside it writes them.

What a kill leaves is put right at the next start: a row that was claimed waits again, a file that has its final name is
whole and is adopted, and the unfinished files of a dead process are removed. A process that was stopped for longer than
its lease has lost its rows: what it makes of them is thrown away, and it claims others.
"""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from reelbatch.device import log
from reelbatch.engine.engine import Engine, Failure
from reelbatch.engine.fallback import with_reliefs
from reelbatch.engine.sample import SavedState
from reelbatch.formats import digest
from reelbatch.jobs.heartbeat import BEAT_SECONDS, Heartbeat
from reelbatch.jobs.manifest import ALONE_AFTER, OPEN, Finished, Manifest, ManifestError, State, VideoRow
from reelbatch.jobs.states import States
from reelbatch.request import VideoRequest
from reelbatch.video import (
    MADE_BY,
    PART,
    RECORDED_LATER,
    Video,
    embedded_record,
    is_own_sidecar,
    read_video,
    sidecar,
    write_sidecar,
)

OWN_FOLDER = ".reelbatch"
UNWRITTEN = 4
"""Videos that may wait for the writer before the engine waits too: frames must not pile up in memory."""
WRITE_AGAIN_AFTER = (1.0, 5.0, 15.0)
"""Seconds to wait before a file is written again that the folder would not take: networks and full disks recover."""
OLD_SECONDS = 3600.0
"""A file that is not whole after so long never will be."""
OTHERS_SECONDS = 1.0
"""How often a process that has nothing to do looks whether others have died or left something."""
OF_THE_FILE = {errno.EINVAL, errno.ENAMETOOLONG, errno.EILSEQ, errno.EISDIR}
"""Errors in writing that are one file's own; any other is the folder's, and no video after it fares better."""


class FolderError(OSError):
    """The output folder takes no more files. Nothing is lost: what is not done waits in the manifest."""


@dataclass(frozen=True)
class Outcome:
    """How a request ended: as a video at `path`, with its record, or with an error."""

    request: VideoRequest
    path: Path
    record: dict[str, Any] | None = None
    error: BaseException | None = None
    cancelled: bool = False


@dataclass(frozen=True)
class _Unwritten:
    row: VideoRow
    request: VideoRequest
    future: Future[dict[str, Any] | None]


class Worker:
    """One process's part in a job.

    Args:
        engine: what makes the videos; others may share the manifest with engines of the same settings.
        job: number of the job.
        weights: the hash of the model's weights, for the record.
        overwrite: whether a file that is there and no row's own may be replaced.
        sidecars: whether a JSON file stands beside each video; what it says is in the video and the manifest as well.
        checkpoint_every: steps after which the state of all running videos is saved; None: only at the end.
        stopping: asked before each step; once True, no further step is taken, what is finished is still written, and
            the state of what runs is saved.
    """

    def __init__(
        self,
        engine: Engine,
        manifest: Manifest,
        job: int,
        folder: Path,
        *,
        weights: str,
        overwrite: bool = False,
        sidecars: bool = True,
        checkpoint_every: int | None = None,
        stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        self.engine, self.manifest, self.job, self.folder = engine, manifest, job, folder
        self.weights, self.overwrite, self.sidecars = weights, overwrite, sidecars
        self.checkpoint_every, self.stopping = checkpoint_every, stopping
        self.states = States(folder / OWN_FOLDER / "states")
        self._rows: dict[str, VideoRow] = {}
        self._failures: deque[tuple[VideoRow, Failure]] = deque()
        self._unwritten: deque[_Unwritten] = deque()
        self._heartbeat = Heartbeat(manifest)
        self._looked = time.monotonic()
        self._given_up = False

    def outcomes(self) -> Iterator[Outcome]:
        """Works until the job has nothing left to do, giving each outcome once its file is complete.

        Raises:
            FolderError: if the output folder takes no more files.
            ManifestError: if the manifest cannot be used any more.
        """
        steps = 0
        with self._heartbeat, ThreadPoolExecutor(max_workers=1, thread_name_prefix="writer") as self._writer:
            self._clear_away()
            while not self.stopping():
                yield from self._claim()
                self._drop_lost()
                if not self.engine.busy:
                    yield from self._ended(leave=0)  # so that a video that ends its process takes no other with it
                    yield from self._claim(idle=True)
                    yield from self._ended(leave=0)
                    if not self.engine.busy and not self._others_work():
                        break
                    continue
                self._receive(self.engine.step())
                yield from self._ended(max(UNWRITTEN, self.engine.planner.max_batch_size))
                steps += 1
                if self._checkpoint_is_due(steps):
                    self._save_states()
            self._receive(self.engine.drain())
            yield from self._ended(leave=0)
            self._save_states(let_go=True)
        self._tidy()

    # -- before a step -----------------------------------------------------------------------------

    def _claim(self, idle: bool = False) -> Iterator[Outcome]:
        """Rows enough for the next batch; the rest is left to other processes. idle: see `Manifest.claim`."""
        room = self.engine.planner.max_batch_size - self.engine.waiting
        if room <= 0 or any(row.deaths >= ALONE_AFTER for row in self._rows.values()):
            return
        owner = self._heartbeat.owner
        for row in self.manifest.claim(owner, self.job, room, idle=idle):
            if row.id in self._rows:  # lost while this process was stopped, and left again by who had it
                self._rows[row.id] = row
                continue
            request, path = row.to_request(), self.folder / row.file
            if not self.overwrite and os.path.lexists(path):
                record = self._finished_before(path, row)
                if record is None:
                    self._failures.append((row, Failure(request, FileExistsError(f"{path} exists"))))
                elif self._adopt(path, row, record, owner):
                    yield Outcome(request, path, record)
                continue
            self._rows[row.id] = row
            try:
                self._submit(request, self.states.load(row.fingerprint) if row.step else None)
            except ValueError as error:
                self._receive([Failure(request, error)])

    def _submit(self, request: VideoRequest, saved: SavedState | None) -> None:
        try:
            self.engine.submit(request, saved)
        except ValueError as error:
            if saved is None:
                raise
            log.warning("%s: it starts anew", error)
            self.engine.submit(request)

    def _finished_before(self, path: Path, row: VideoRow) -> dict[str, Any] | None:
        """The record of a whole video of this very row, which a process put in place before it was killed; None: it is
        another file."""
        record = embedded_record(path)
        if record is None or is_damaged(path, row.to_request()):
            return None
        if _asked(record.get("request")) != _asked(row.request):
            return None
        decides = [*MADE_BY, *(name for name in RECORDED_LATER if name in record)]
        if any(record.get(name) != self.engine.info[name] for name in decides):
            return None
        return record

    def _adopt(self, path: Path, row: VideoRow, record: dict[str, Any], owner: str) -> bool:
        """A video that is in its place is done; False if the row is no longer this process's."""

        def complete() -> None:
            beside = sidecar(path)
            if self.sidecars and (is_own_sidecar(beside) or not os.path.lexists(beside)):
                write_sidecar(path, record)

        return self.manifest.finish(owner, row.id, _finished(path, record, self.weights, record["seconds"]), complete)

    def _drop_lost(self) -> None:
        """What was cancelled, or taken by others who thought this process dead, is not made any further."""
        if time.monotonic() - self._looked < BEAT_SECONDS:
            return
        self._looked = time.monotonic()
        for id in self._rows.keys() - self.manifest.mine(self._heartbeat.owner):
            self.engine.cancel(id)

    def _others_work(self) -> bool:
        """Whether the job has rows that another process runs: they may come back."""
        counts = self.manifest.counts(self.job)
        if not sum(counts[state] for state in OPEN):
            return False
        time.sleep(OTHERS_SECONDS)
        if self.manifest.reap():
            self._clear_away()
        return True

    # -- after a step ------------------------------------------------------------------------------

    def _receive(self, results: Sequence[Video | Failure]) -> None:
        """Takes over what the engine hands out. Nothing here raises: every video is with the writer before anything
        that may is tried."""
        for result in results:
            row = self._rows.pop(result.request.id)
            if isinstance(result, Video):
                future = self._writer.submit(self._write, result, row)
                self._unwritten.append(_Unwritten(row, result.request, future))
            else:
                self._failures.append((row, result))

    def _ended(self, leave: int) -> Iterator[Outcome]:
        """Outcomes, each once the manifest has it; waits for the writer only while more than `leave` are open."""
        while self._failures:
            row, failure = self._failures[0]
            ended = self._has_ended(row, failure)
            if ended:
                self.states.forget(row.fingerprint)
            self._failures.popleft()
            if ended:
                yield Outcome(failure.request, self.folder / row.file, error=failure.error, cancelled=failure.cancelled)
        while self._unwritten and (self._unwritten[0].future.done() or len(self._unwritten) > leave):
            done = self._unwritten.popleft()
            path = self.folder / done.row.file
            try:
                record = done.future.result()
            except (FolderError, ManifestError):
                raise
            except Exception as error:
                if self._has_ended(done.row, Failure(done.request, error)):
                    yield Outcome(done.request, path, error=error)
            else:
                if record is not None:
                    yield Outcome(done.request, path, record)

    def _has_ended(self, row: VideoRow, failure: Failure) -> bool:
        """Whether a request has ended with this failure; False: another process has taken it over, and goes on."""
        if not failure.cancelled and self.manifest.fail(self._heartbeat.owner, row.id, _reason(failure.error)):
            return True
        now = self.manifest.row(row.id)
        return now is None or now.state == State.CANCELLED

    def _write(self, video: Video, row: VideoRow) -> dict[str, Any] | None:
        """Returns the record; None if the row is no longer this process's, whose file is then thrown away."""
        if self._given_up:
            raise FolderError(f"{self.folder} takes no more files")
        for wait in (*WRITE_AGAIN_AFTER, None):
            try:
                return with_reliefs(f"writing {row.file}", partial(self._write_once, video, row))[0]
            except OSError as error:
                if isinstance(error, ManifestError) or not _of_the_folder(error):
                    raise
                if wait is None:
                    self._given_up = True
                    raise self._error_of_folder(error) from error
                log.warning("%s could not be written (%s): tried again in %g s", row.file, error, wait)
                time.sleep(wait)
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _error_of_folder(self, error: OSError) -> FolderError:
        return FolderError(
            f"{self.folder} takes no more files: {error.strerror or error}. Nothing is lost: put that right, and the "
            "same command goes on."
        )

    def _write_once(self, video: Video, row: VideoRow) -> dict[str, Any] | None:
        started, own, owner = time.perf_counter(), self._own_folder(self._heartbeat.owner), self._heartbeat.owner
        self._make_folders(own, (self.folder / row.file).parent)
        with video.written_aside(self.folder / row.file, own) as file:
            seconds = {**video.provenance["seconds"], "write": time.perf_counter() - started}
            finished = _finished(file.part, video.record, self.weights, seconds)
            put_in_place = partial(file.put_in_place, self.overwrite, self.sidecars)
            if not self.manifest.finish(owner, row.id, finished, put_in_place):
                return None
        self.states.forget(row.fingerprint)
        return video.record

    # -- for other processes -----------------------------------------------------------------------

    def _save_states(self, let_go: bool = False) -> None:
        mine = self.manifest.mine(self._heartbeat.owner)
        states = {id: state for id, state in self.engine.states().items() if id in mine}
        try:
            self._make_folders()
            for id, state in states.items():
                self.states.save(self._rows[id].fingerprint, state)
        except OSError as error:
            raise self._error_of_folder(error) from error
        self.manifest.saved(self._heartbeat.owner, {id: state.step for id, state in states.items()}, let_go=let_go)

    def _checkpoint_is_due(self, steps: int) -> bool:
        """Whether states are saved after so many steps: at every one, where a row's process has died before, so that a
        process that dies again is seen to have gained a step."""
        regular = bool(self.checkpoint_every) and steps % (self.checkpoint_every or 1) == 0
        return regular or any(row.deaths for row in self._rows.values())

    def _make_folders(self, *folders: Path) -> None:
        """Makes folders in the output folder, which is not made anew where it is gone."""
        if not self.folder.is_dir():
            raise FileNotFoundError(
                errno.ENOENT, "the folder is gone, since it was moved or removed or its disk is away"
            )
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)

    def _own_folder(self, owner: str) -> Path:
        """Where a process writes what is not in its place yet."""
        return self.folder / OWN_FOLDER / owner

    def _clear_away(self) -> None:
        """Unfinished files of processes that are no more."""
        left = {path.name for path in (self.folder / OWN_FOLDER).glob("*/")} - {self.states.folder.name}
        for owner in left - self.manifest.processes():
            shutil.rmtree(self._own_folder(owner), ignore_errors=True)
        for part in self.folder.glob(f".*{PART}"):  # of sheets and reports, which take seconds
            with suppress(OSError):
                if abs(time.time() - part.stat().st_mtime) > OLD_SECONDS:
                    part.unlink()

    def _tidy(self) -> None:
        self._clear_away()
        counts = self.manifest.counts()
        if not any(counts[state] for state in OPEN):
            shutil.rmtree(self.folder / OWN_FOLDER, ignore_errors=True)


def _finished(file: Path, record: dict[str, Any], weights: str, seconds: dict[str, float]) -> Finished:
    sha256, size = digest(file)
    return Finished(
        sha256=sha256,
        size=size,
        frames_sha256=record["frames_sha256"],
        seconds=seconds,
        batch=record["batch"]["largest"],
        isolation=record["isolation"],
        model_hash=weights,
        versions=record["versions"],
    )


def _asked(request: Any) -> Any:
    """What a request's record asks for, wherever its image lies."""
    image = request.get("image") if isinstance(request, dict) else None
    return {**request, "image": image.get("sha256")} if isinstance(image, dict) else request


def is_damaged(path: Path, request: VideoRequest) -> str | None:
    """What is wrong with a video file: it cannot be decoded, or is not of the request's size; None if nothing is."""
    try:
        frames = read_video(path)
    except (OSError, ValueError) as error:
        return f"cannot be decoded: {error}"
    wanted = (request.frames, request.height, request.width, 3)
    return None if frames.shape == wanted else f"has {frames.shape[:3]} frames, rows and columns, not {wanted[:3]}"


def _of_the_folder(error: Exception) -> bool:
    own = isinstance(error, FileExistsError) or getattr(error, "errno", None) in OF_THE_FILE
    return isinstance(error, OSError) and not own


def _reason(error: BaseException) -> str:
    """An error as the manifest keeps it."""
    if isinstance(error, FileExistsError):
        return (
            f"{error}: a file of that name is there which is not this job's; move it away, then `reelbatch job retry`"
        )
    text = str(error).strip()
    return text if isinstance(error, ValueError | OSError) and text else f"{type(error).__name__}: {text}"
