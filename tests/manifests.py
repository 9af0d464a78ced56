"""Manifests for tests, on SQLite and, where `REELBATCH_TEST_DATABASE` names one, on PostgreSQL."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import make_url

from reelbatch.jobs import manifest as room
from reelbatch.jobs.manifest import Finished, Manifest, VideoRow

FINISHED = Finished("aa", 12, "bb", {"denoise": 1.0}, 4, "exact", "weights", {"torch": "2"})
URL = os.environ.get("REELBATCH_TEST_DATABASE")
"""A PostgreSQL database to run these tests on as well; its tables are dropped."""


def rows(count: int) -> list[VideoRow]:
    return [
        VideoRow(
            id=f"v{i}",
            number=i,
            turn=count - i,
            request={"prompt": f"prompt {i}", "seed": i, "id": f"v{i}"},
            fingerprint=f"f{i}",
            prompt=f"prompt {i}",
            seed=str(2**64 - 1 - i),
            tags=["a", "ü"],
            file=f"{i}.mp4",
        )
        for i in range(count)
    ]


@pytest.fixture(params=["sqlite", *(["postgresql"] if URL else [])])
def manifest(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Manifest]:
    opened = Manifest.in_folder(tmp_path, URL if request.param == "postgresql" else None, lease_seconds=0.3)
    yield opened
    if request.param == "postgresql":
        room.Base.metadata.drop_all(opened._engine)
    opened.close()


def another(manifest: Manifest) -> Manifest:
    """As another process has it."""
    return Manifest(manifest.url, lease_seconds=0.3)


def text_of(manifest: Manifest) -> str:
    return make_url(manifest.url).render_as_string(hide_password=False)


def nothing() -> None:
    pass
