"""Heartbeat: keeps a process known as living while it works on a manifest."""

from __future__ import annotations

import threading

from reelbatch.device import log
from reelbatch.jobs.manifest import Manifest, ManifestError

BEAT_SECONDS = 5.0


class Heartbeat:
    """While entered, a thread beside the work counts the process's `beat` up.

    Attributes:
        owner: the name under which the process claims rows. It changes when others took the process for dead.
    """

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.owner = ""
        self._stop = threading.Event()

    def __enter__(self) -> Heartbeat:
        self.manifest.reap()
        self.owner = self.manifest.enlist()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        try:
            self.manifest.leave(self.owner)
        except ManifestError as error:
            log.warning("%s", error)  # an error that is to be raised says more

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_SECONDS):
            try:
                if not self.manifest.beat(self.owner):
                    log.warning("another process took this one for dead and goes on with its videos")
                    self.owner = self.manifest.enlist()
            except ManifestError as error:
                log.warning("%s", error)
