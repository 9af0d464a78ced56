"""What tests leave behind: threads that go on, and folders for temporary files."""

from __future__ import annotations

import gc
import tempfile
import threading
import time
from collections.abc import Iterator

import pytest

SECONDS = 20.0
"""For threads to see that nobody needs them any more; they do at once."""


@pytest.fixture(scope="module", autouse=True)
def nothing_left(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Fails after the last test of a file if threads or temporary folders of it are still there."""
    folder, before = tmp_path_factory.mktemp("temporary"), set(threading.enumerate())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(folder))
        patch.setattr(tempfile, "tempdir", str(folder))
        yield
    gc.collect()
    deadline = time.monotonic() + SECONDS
    while (left := _threads() - before) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not left, f"threads that go on: {left}"
    folders = {path.name for path in folder.iterdir() if not path.name.startswith("torchinductor")}  # a cache
    assert not folders, f"folders that are left: {folders}"


def _threads() -> set[threading.Thread]:
    """Those that are not of a library's progress bars."""
    return {thread for thread in threading.enumerate() if type(thread).__name__ != "TMonitor"}
