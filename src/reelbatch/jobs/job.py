"""A job: the requests of one call as rows of a manifest. Opening it again finds what is made and what is missing."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from reelbatch.device import choose_device, threads_of
from reelbatch.engine.config import EngineConfig
from reelbatch.formats import ENDINGS, Format
from reelbatch.formats import size as size_of
from reelbatch.jobs.changes import JobChanged, request_changes, setting_changes
from reelbatch.jobs.manifest import OPEN, JobRow, Manifest, State, VideoRow
from reelbatch.jobs.naming import Naming, name_all, without_ending
from reelbatch.jobs.verify import make_again
from reelbatch.loading.hashing import weights_hash
from reelbatch.loading.inspection import ModelInfo
from reelbatch.loading.lora import lora_label
from reelbatch.loading.precision import Precision
from reelbatch.request import MAX_ID_LENGTH, NAMES_ONLY, VideoRequest
from reelbatch.video import is_own_sidecar

Mode = Literal["resume", "add", "new"]


@dataclass(frozen=True)
class Settings:
    """What decides, besides the requests, about frames and names.

    Attributes:
        weights: a hash of the model's weight files.
        lora: the files' names, scales and hashes.
        threads: that a CPU computes with, which changes the last bits. None on other devices, and in jobs of versions
            that did not record it; they are taken as this machine's.
        format: of the files; it changes no frame.
    """

    model: str
    weights: str
    device: str
    dtype: str
    attention: str
    isolation: str
    naming: Naming = "default"
    lora: tuple[str, ...] = ()
    threads: int | None = None
    format: Format = "mp4"

    @property
    def values(self) -> dict[str, Any]:
        """All of them, as JSON has them."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}

    @property
    def record(self) -> dict[str, Any]:
        """As a manifest keeps it. What versions before did not know is left out where it says nothing."""
        silent = {"threads": None, "format": "mp4"}
        return {name: value for name, value in self.values.items() if name not in silent or value != silent[name]}

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> Settings:
        """As `record` gave it, whatever notes stand beside it."""
        known = {field.name: record[field.name] for field in fields(cls) if field.name in record}
        return cls(**{**known, "lora": tuple(known.get("lora", ()))})

    def fingerprint(self, request: VideoRequest) -> str:
        """The same for two requests if and only if their frames are the same."""
        decides = {name: value for name, value in self.record.items() if name not in ("naming", "format")}
        asked = request.model_dump(mode="json", exclude=set(NAMES_ONLY))
        if request.image is not None:
            asked["image"] = request.image.sha256  # wherever it lies
        return hashlib.sha256(json.dumps([asked, decides], sort_keys=True).encode()).hexdigest()

    def job_key(self, requests: Sequence[VideoRequest]) -> str:
        """The same for two jobs if and only if they ask for the same videos, under the same names."""
        its = sorted([self.fingerprint(request), request.name or ""] for request in requests)
        return hashlib.sha256(json.dumps([its, self.record], sort_keys=True).encode()).hexdigest()

    def fingerprints(self, request: VideoRequest) -> tuple[str, ...]:
        """Its fingerprint, and the one that a version which did not record `threads` gave it."""
        own = self.fingerprint(request)
        return (own,) if self.threads is None else (own, replace(self, threads=None).fingerprint(request))


def settings_of(config: EngineConfig, info: ModelInfo, naming: Naming, format: Format = "mp4") -> Settings:
    """Settings of a run; reads pieces of the weight files and whole LoRA files, and loads nothing.

    Raises:
        ValueError: for a device that is not there, or a LoRA file that cannot be read.
    """
    device = choose_device(config.device)
    return Settings(
        model=info.name,
        weights=weights_hash(info.folder),
        device=device.type,
        dtype=str(Precision.parse(config.dtype, device)),
        attention=config.attention,
        isolation=config.isolation,
        naming=naming,
        lora=tuple(lora_label(path, scale) for path, scale in config.loras),
        threads=threads_of(device),
        format=format,
    )


@dataclass(frozen=True)
class Job:
    """Where a call stands before it runs. kept: rows that are made already. remade: those whose file was gone."""

    number: int
    rows: list[VideoRow]
    kept: list[VideoRow]
    remade: int = 0

    @property
    def open(self) -> list[VideoRow]:
        """Rows that are to be made."""
        return [row for row in self.rows if row.state in OPEN]


def open_job(
    manifest: Manifest,
    folder: Path,
    requests: Sequence[VideoRequest],
    settings: Settings,
    *,
    mode: Mode,
    overwrite: bool = False,
    notes: Mapping[str, Any] | None = None,
) -> Job:
    """The job of these requests in `folder`: the one that is there, or a new one.

    Args:
        requests: with the model's defaults filled in.
        mode: "resume" goes on with the job that is there, if it is this one; "add" keeps what any job there holds of
            these requests, and adds the rest; "new" makes all of them anew, beside what is there.
        overwrite: with "add": nothing is kept, and files of the same names are replaced.
        notes: kept beside the settings, such as the command; they decide about nothing.

    One transaction looks and adds, so that of several processes that start at once one adds the job, and the others
    go on with it.

    Raises:
        JobChanged: with "resume", if another job is there.
    """
    with manifest.one_transaction():
        jobs = manifest.jobs()
        if mode == "resume" and jobs:
            return _resumed(manifest, folder, jobs, requests, settings)
        if mode == "add" and not overwrite:
            asked_before = [job for job in jobs if job.number == manifest.job_of(settings.job_key(requests))]
            with suppress(JobChanged):
                return _resumed(manifest, folder, asked_before, requests, settings, retry=True)
        return _added(manifest, folder, requests, settings, mode, overwrite, notes or {})


def _resumed(
    manifest: Manifest,
    folder: Path,
    jobs: Sequence[JobRow],
    requests: Sequence[VideoRequest],
    settings: Settings,
    *,
    retry: bool = False,
) -> Job:
    """The job that is there. retry: what failed or was cancelled is made as well."""
    number, its = _the_same(manifest, folder, jobs, requests, settings)
    remade = _remake_lost(manifest, folder)
    if retry:
        manifest.retry((State.FAILED, State.CANCELLED), its)
    now = {row.id: row for row in manifest.rows()}
    rows = [now[id] for id in its]
    _find_images(manifest, rows, requests)
    manifest.take_over(number, [row.id for row in rows if row.job != number and row.state in OPEN])
    return Job(number, rows, [row for row in rows if row.state == State.DONE], remade)


def _added(
    manifest: Manifest,
    folder: Path,
    requests: Sequence[VideoRequest],
    settings: Settings,
    mode: Mode,
    overwrite: bool,
    notes: Mapping[str, Any],
) -> Job:
    """A new job, of rows that are there already and of new ones."""
    remade = 0 if overwrite else _remake_lost(manifest, folder)
    there = manifest.rows()
    known = _match(there, requests, settings) if mode == "add" else {}
    new = [i for i in range(len(requests)) if i not in known]
    home, ending = _home(settings.naming), ENDINGS[settings.format]
    files_there = {row.file for row in there} | {str(path.relative_to(folder)) for path in _taken_names(folder / home)}
    if overwrite:
        manifest.remake([row.id for row in known.values()])
        others = {file for file in files_there if Path(file).suffix not in (ending, ".json")}  # theirs are the sidecars
        files_there = {row.file for row in known.values()} | others
    taken = {Path(file).name for file in files_there if Path(file).parent == home}
    names = name_all([requests[i] for i in new], settings.naming, taken, ending=ending)
    files = [str(home / name) for name in names]
    if overwrite:
        manifest.forget_files(files)
    turns, ids = in_order(requests), {row.id for row in there}
    added = [
        _row(_with_new_id(requests[i], ids), i, turns[i], file, settings) for i, file in zip(new, files, strict=True)
    ]
    again = [row.id for row in known.values() if overwrite or row.state != State.DONE]
    manifest.retry((State.FAILED, State.CANCELLED), again)
    key = None if mode == "new" else settings.job_key(requests)
    number = manifest.add_job({**settings.record, **notes}, added, again, key)
    every = {**dict(zip(new, added, strict=True)), **known}
    now = {row.id: row for row in manifest.rows()}
    rows = [now[every[i].id] for i in range(len(requests))]
    _find_images(manifest, rows, requests)
    return Job(number, rows, [row for row in rows if row.state == State.DONE], remade)


def _find_images(manifest: Manifest, rows: Sequence[VideoRow], requests: Sequence[VideoRequest]) -> None:
    """Rows that are not made yet get the places of their images from the requests: they may lie elsewhere by now."""
    moved = {
        row.id: {**row.request, "image": request.image.record}
        for row, request in zip(rows, requests, strict=True)
        if request.image and row.state != State.DONE and row.request.get("image") != request.image.record
    }
    manifest.replace_requests(moved)


def forecast(
    manifest: Manifest | None,
    folder: Path,
    requests: Sequence[VideoRequest],
    settings: Settings,
    *,
    mode: Mode,
    overwrite: bool = False,
) -> Job:
    """The job as `open_job` would give it. Nothing is written: its number is 0, and rows that are new have no file.

    Args:
        manifest: of the folder; None where there is none.

    Raises:
        JobChanged: where `open_job` would.
    """
    jobs, there = ([], []) if manifest is None else (manifest.jobs(), manifest.rows())
    known: dict[int, VideoRow] = {}
    if manifest is not None and mode == "resume" and jobs:
        ids = {row.id: row for row in there}
        _, its = _the_same(manifest, folder, jobs, requests, settings)
        known = {i: ids[id] for i, id in enumerate(its)}
    elif mode == "add":
        known = _match(there, requests, settings)
    lost = [] if overwrite else _lost(folder, there)
    again = {State.FAILED, State.CANCELLED} if mode == "add" else set()
    if overwrite:
        again.add(State.DONE)
    gone = {row.id for row in lost}
    for row in known.values():
        if row.id in gone or row.state in again:
            row.state = State.WAITING
    rows = [known.get(i) or _row(request, i, i, "", settings) for i, request in enumerate(requests)]
    return Job(0, rows, [row for row in rows if row.state == State.DONE], len(lost))


def _taken_names(home: Path) -> Iterator[Path]:
    """Whatever is there, but for the sidecars of videos that are gone: they may be replaced."""
    there = list(home.glob("*"))
    videos = {without_ending(path.name) for path in there if path.suffix != ".json"}
    return (path for path in there if path.suffix != ".json" or path.stem in videos or not is_own_sidecar(path))


def _home(naming: Naming) -> Path:
    """Where videos lie in the output folder: VBench's scorer wants a folder with nothing else in it."""
    return Path("videos") if naming == "vbench" else Path()


def in_order(requests: Sequence[VideoRequest]) -> list[int]:
    """The turn of each request: the most work first, so that the last batch is of small ones and full; requests that
    are alike follow one another."""
    alike = [(-r.work, r.height, r.width, r.frames, r.steps, i) for i, r in enumerate(requests)]
    turns = [0] * len(requests)
    for turn, (*_, i) in enumerate(sorted(alike)):
        turns[i] = turn
    return turns


def _row(request: VideoRequest, number: int, turn: int, file: str, settings: Settings) -> VideoRow:
    return VideoRow(
        id=request.id,
        number=number,
        turn=turn,
        request=request.model_dump(mode="json"),
        fingerprint=settings.fingerprint(request),
        prompt=request.prompt,
        seed=str(request.seed),
        tags=list(request.tags),
        file=file,
        state=State.WAITING,
        step=0,
        attempts=0,
    )


def _with_new_id(request: VideoRequest, taken: set[str]) -> VideoRequest:
    """A manifest holds an id once; that of a prompt file comes again when the file is run again."""
    if request.id not in taken:
        return request
    return request.model_copy(update={"id": f"{request.id[: MAX_ID_LENGTH - 7]}~{secrets.token_hex(3)}"})


def _match(rows: Sequence[VideoRow], requests: Sequence[VideoRequest], settings: Settings) -> dict[int, VideoRow]:
    """A row of its own, with its frames, its name and its format, for each request that has one, by the request's
    place. What is done comes first."""
    alike: dict[tuple[str, str | None], deque[VideoRow]] = defaultdict(deque)
    rows = [row for row in rows if Path(row.file).suffix == ENDINGS[settings.format]]
    for row in sorted(rows, key=lambda row: (row.state != State.DONE, row.state not in OPEN)):
        alike[row.fingerprint, row.request.get("name")].append(row)
    matches = {}
    for i, request in enumerate(requests):
        keys = [(fingerprint, request.name) for fingerprint in settings.fingerprints(request)]
        if key := next((key for key in keys if alike[key]), None):
            matches[i] = alike[key].popleft()
    return matches


def _the_same(
    manifest: Manifest, folder: Path, jobs: Sequence[JobRow], requests: Sequence[VideoRequest], settings: Settings
) -> tuple[int, list[str]]:
    """Number of the latest job that is this one, and the ids of the requests' rows; raises `JobChanged`, with what sets
    the latest apart, if none is."""
    there = manifest.rows()
    latest: list[str] = []
    for job in reversed(jobs):
        matches = _rows_of(job, there, requests)
        differences = _differences(job, there, matches, requests, settings)
        if not differences:
            return job.number, [matches[i].id for i in range(len(requests))]
        latest = latest or differences
    raise JobChanged(folder, latest)


def _rows_of(job: JobRow, there: Sequence[VideoRow], requests: Sequence[VideoRequest]) -> dict[int, VideoRow]:
    """The requests' rows, by their places: the job's own, and videos that earlier jobs had made when it was added."""
    settings = Settings.of_record(job.settings)
    own = _match([row for row in there if row.job == job.number], requests, settings)
    rest = [i for i in range(len(requests)) if i not in own]
    earlier = [row for row in there if row.job < job.number and row.state == State.DONE]
    kept = _match(earlier, [requests[i] for i in rest], settings)
    return own | {rest[place]: row for place, row in kept.items()}


def _differences(
    before: JobRow,
    there: Sequence[VideoRow],
    matches: Mapping[int, VideoRow],
    requests: Sequence[VideoRequest],
    settings: Settings,
) -> list[str]:
    then = Settings.of_record(before.settings)
    if then.threads is None or then.device != settings.device:  # not recorded then, or said by the device already
        then = replace(then, threads=settings.threads)
    rows = [row for row in there if row.job == before.number]
    if settings.naming == "ascii" and then.naming == "default" and all(row.file.isascii() for row in rows):
        then = replace(then, naming="ascii")  # their names are those asked for, as are all of earlier versions
    kept = {row.id for row in matches.values()}
    gone = [row.to_request() for row in rows if row.id not in kept]
    new = [request for i, request in enumerate(requests) if i not in matches]
    lines = setting_changes(then.values, settings.values)
    if gone or new:
        lines += request_changes([row.to_request() for row in rows], requests, gone, new)
    return lines


def _remake_lost(manifest: Manifest, folder: Path) -> int:
    """Videos whose file is gone or of another size wait again."""
    lost = _lost(folder, manifest.rows(None, State.DONE))
    make_again(manifest, folder, lost)
    return len(lost)


def _lost(folder: Path, rows: Sequence[VideoRow]) -> list[VideoRow]:
    """Rows that are done and whose file is gone or of another size."""
    return [row for row in rows if row.state == State.DONE and not _there(folder / row.file, row.size)]


def _there(path: Path, size: int | None) -> bool:
    try:
        return size_of(path) == size
    except OSError:
        return False
