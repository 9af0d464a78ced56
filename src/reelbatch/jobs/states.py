"""Saved states: the latents and step of videos that are not done, so that a later process goes on from there."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from reelbatch.engine.sample import SavedState
from reelbatch.outside_json import parse
from reelbatch.video import aside


class States:
    """One file a video, in a folder. A file holds for one fingerprint, that is for one request, model and settings."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _path(self, fingerprint: str) -> Path:
        return self.folder / f"{fingerprint}.safetensors"

    def save(self, fingerprint: str, state: SavedState) -> None:
        """Replaces an earlier one, at once: a kill leaves the one or the other."""
        self.folder.mkdir(parents=True, exist_ok=True)
        about = {
            "step": state.step,
            "seconds": state.seconds,
            "largest_batch": state.largest_batch,
            "batch_mates": sorted(state.batch_mates),
        }
        with aside(self._path(fingerprint)) as part:
            save_file({"latents": state.latents.contiguous()}, part, {"state": json.dumps(about)})

    def load(self, fingerprint: str) -> SavedState | None:
        """None where there is none, or none that can be read: the video then starts anew."""
        try:
            with safe_open(self._path(fingerprint), "pt") as file:
                about = parse(file.metadata()["state"])
                latents = file.get_tensor("latents")
            about["batch_mates"] = frozenset(about["batch_mates"])
            return SavedState(latents=latents, **about)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError):
            return None

    def forget(self, fingerprint: str) -> None:
        self._path(fingerprint).unlink(missing_ok=True)
