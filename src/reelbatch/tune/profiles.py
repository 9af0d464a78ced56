"""What was measured, kept for later runs: one small JSON file a profile in the user's cache directory.

A profile holds for one model, its weights, LoRAs, device, dtype, attention kernel, versions and shapes, and for nothing
else: `find` gives one that fits, or says why those that are there do not.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from reelbatch.device import cache_folder, choose_device
from reelbatch.engine.planner import Isolation
from reelbatch.loading.identity import described, identity
from reelbatch.memory.identity import Identity
from reelbatch.memory.placement import Offload
from reelbatch.versions import versions

__all__ = [
    "Advice",
    "Identity",
    "Lookup",
    "Profile",
    "advice",
    "find",
    "forget",
    "identity",
    "stale",
    "store",
    "stored",
]


class Profile(BaseModel):
    """What `tune` measured for an identity. Rates are those of the advised batch.

    Attributes:
        offload: which weights were on the device. Profiles without it are of a time in which all were.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    identity: Identity
    batch_size: int = Field(ge=1)
    isolation: Isolation
    exact_batch_size: int = Field(ge=1)
    packed_batch_size: int = Field(ge=1)
    videos_per_hour: float = Field(gt=0)
    last_video_seconds: float = Field(gt=0)
    peak_bytes: int = Field(ge=0)
    offload: Offload = "none"
    why: str
    measured: date

    def batch_of(self, isolation: Isolation) -> int:
        """The batch size for a run that has settled on an isolation: a profile never changes what videos look like."""
        return self.exact_batch_size if isolation == "exact" else self.packed_batch_size


class Lookup(NamedTuple):
    """The profile that fits, or None and why not (None as well if there is nothing of this model)."""

    profile: Profile | None
    refused: str | None = None


# -- files -----------------------------------------------------------------------------------------


def store(profile: Profile) -> Path:
    """Writes a profile, in the place of one of the same identity; returns its file."""
    key = hashlib.sha256(profile.identity.model_dump_json().encode()).hexdigest()[:12]
    path = _folder() / f"{_readable(profile.identity.model)}-{key}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_text(profile.model_dump_json(indent=2) + "\n", encoding="utf-8")
    part.replace(path)
    return path


def stored() -> list[tuple[Path, Profile | str]]:
    """Every profile file with its profile, or with what is wrong with it; the latest measured first."""
    pairs = [(path, _read(path)) for path in sorted(_folder().glob("*.json"))]
    return sorted(pairs, key=lambda pair: pair[1].measured if isinstance(pair[1], Profile) else date.min, reverse=True)


def forget(model: str, shapes: Sequence[str] = ()) -> list[tuple[Path, Profile | str]]:
    """Removes the profiles of a model, with its damaged ones; returns what was removed, as `stored` does.

    Args:
        shapes: only those of exactly these, with and without classifier-free guidance.
    """
    wanted = {kind for shape in shapes for kind in (shape, f"{shape} cfg")}

    def is_meant(path: Path, profile: Profile | str) -> bool:
        if isinstance(profile, str):
            return not wanted and re.fullmatch(f"{_readable(model)}-[0-9a-f]{{12}}", path.stem) is not None
        return profile.identity.model == model and (not wanted or profile.identity.shapes in wanted)

    removed = [pair for pair in stored() if is_meant(*pair)]
    for path, _ in removed:
        path.unlink(missing_ok=True)
    return removed


def find(wanted: Identity) -> Lookup:
    """The profile of exactly this identity; otherwise what keeps the nearest one of the same model from being used."""
    broken: list[str] = []
    others: list[Identity] = []
    for path, profile in stored():
        if isinstance(profile, str):
            if path.name.startswith(_readable(wanted.model)):
                broken.append(f"{path.name} {profile}")
        elif profile.identity == wanted:
            return Lookup(profile)
        elif profile.identity.model == wanted.model:
            others.append(profile.identity)
    # other shapes are the farthest: a profile of the same shapes that became stale says more
    nearest = min(others, key=lambda o: (o.shapes != wanted.shapes, len(o.differences(wanted))), default=None)
    return Lookup(None, "; ".join(nearest.differences(wanted) if nearest else broken) or None)


def _folder() -> Path:
    return cache_folder() / "profiles"


def _readable(model: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", model.lower()).strip("-")[:60]


def _read(path: Path) -> Profile | str:
    try:
        return Profile.model_validate_json(path.read_text(encoding="utf-8"))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        return f"is damaged or of another version ({where}: {first['msg']})"
    except (OSError, ValueError) as error:
        return f"cannot be read ({error})"


# -- whether a profile can be used here ------------------------------------------------------------


def stale(profile: Profile, brief: bool = False) -> str | None:
    """Why a profile cannot be used on this machine as it is now; None if it can (its model's weights are not read).

    Args:
        brief: in a few words.
    """
    then = profile.identity
    try:
        device = choose_device(then.device.partition(":")[0])
    except ValueError:
        return "no such device" if brief else f"its device {then.device!r} is not here"
    now = then.model_copy(update={"device": described(device), "versions": versions()})
    if not brief:
        return "; ".join(then.differences(now)) or None
    reasons = ["another device"] if then.device != now.device else []
    old = {name: then.versions.get(name, "none") for name in now.versions}
    reasons += [f"{name} {old[name]} → {new}" for name, new in now.versions.items() if old[name] != new]
    return ", ".join(reasons) or stale(profile)


# -- advice ----------------------------------------------------------------------------------------


class Advice(NamedTuple):
    """How to run, and a line that says where that comes from (None: nothing was ever measured)."""

    batch_size: int
    line: str | None
    offload: Offload = "none"


def advice(wanted: Sequence[Identity], isolation: Isolation, otherwise: int, offload: Offload | None = None) -> Advice:
    """The batch size and the offload for a run, as they were measured.

    Args:
        wanted: the run's own identity, and then, for a mix of shapes, that of each shape: where the mix was not
            measured but each of its shapes was, the smallest of their batch sizes is taken.
        isolation: which the run has settled on.
        otherwise: the size where no profile fits.
        offload: which the run has settled on; None takes that of the profile.
    """
    whole, *parts = map(find, wanted)
    profiles = [lookup.profile for lookup in ([whole] if whole.profile else parts) if lookup.profile]
    reason = whole.refused
    if profiles and (whole.profile or len(profiles) == len(parts)):
        used = max((profile.offload for profile in profiles), key=get_args(Offload).index)  # that of the least memory
        if offload in (None, used):
            return _as_tuned(min(profiles, key=lambda profile: profile.batch_of(isolation)), isolation, used)
        reason = f"it was measured with --offload {used}, and this is {offload}"
    line = reason and (f"batch size {otherwise}: the stored profile is not used: {reason}; run `reelbatch tune`")
    return Advice(otherwise, line, offload or "none")


def _as_tuned(profile: Profile, isolation: Isolation, offload: Offload) -> Advice:
    size = profile.batch_of(isolation)
    line = f"batch size {size}" + ("" if offload == "none" else f", offload {offload}")
    line += f": as tuned for {profile.identity.shapes} on {profile.measured}"
    if profile.isolation == "packed" and isolation == "exact":
        line += f"; packed was faster there (--isolation packed, batch size {profile.packed_batch_size})"
    return Advice(size, f"{line} (--batch-size overrides)", offload)
