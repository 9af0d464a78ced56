"""What `tune --show` and `tune --forget` do with the stored profiles."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import typer

from reelbatch.cli.common import SafeConsole, say


def show_profiles(as_json: bool) -> None:
    """Lists all, with what keeps each from being used here."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from reelbatch.device import cache_folder
    from reelbatch.tune import profiles

    stored = profiles.stored()
    if as_json:
        known = [
            {"file": str(path), "profile": None, "problem": profile}
            if isinstance(profile, str)
            else {"file": str(path), "profile": profile.model_dump(mode="json"), "problem": profiles.stale(profile)}
            for path, profile in stored
        ]
        typer.echo(json.dumps(known))
        return
    if not stored:
        say(f"no profile is stored in {cache_folder()}: `reelbatch tune` makes one")
        return
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for column in ("model", "shapes", "dtype", "batch", "isolation", "videos/h", "measured"):
        table.add_column(column, no_wrap=True)
    table.add_column("here")
    for path, profile in stored:
        if isinstance(profile, str):
            table.add_row(path.name, *[""] * 6, profile)
            continue
        about = profile.identity
        kind = about.dtype if about.attention == "auto" else f"{about.dtype}, {about.attention}"
        kind += f", {len(about.loras)} LoRA" if about.loras else ""
        how = profile.isolation if profile.offload == "none" else f"{profile.isolation}, offload {profile.offload}"
        row = (about.model, about.shapes, kind, str(profile.batch_size), how)
        rate = f"{profile.videos_per_hour:,.0f}" if profile.videos_per_hour >= 100 else f"{profile.videos_per_hour:.2f}"
        table.add_row(*row, rate, str(profile.measured), profiles.stale(profile, brief=True) or "usable")
    SafeConsole().print(table)
    say(f"kept in {cache_folder()}; `reelbatch tune --forget` removes those of a model")


def forget_profiles(model: str, shape: Sequence[str], as_json: bool) -> None:
    """Removes those of a model, or of some of its shapes, and says which.

    Raises:
        ValueError: for a shape that cannot be read.
    """
    from reelbatch.loading.hub import DEMO_FOLDER, model_name
    from reelbatch.tune import profiles
    from reelbatch.tune.workload import parse_shape

    folder = DEMO_FOLDER if model == "demo" else Path(model).expanduser()
    name = model_name(folder) if folder.is_dir() else model
    shapes = ["{width}×{height}×{frames}".format(**parse_shape(text)) for text in shape]
    removed = profiles.forget(name, shapes)
    if as_json:
        typer.echo(json.dumps([str(path) for path, _ in removed]))
        return
    for path, profile in removed:
        what = "which was damaged"
        if not isinstance(profile, str):
            about = profile.identity
            what = f"batch size {profile.batch_size}, {about.dtype}, {about.shapes}, measured on {profile.measured}"
        say(f"removed the profile of {name}: {what} ({path.name})")
    if not removed:
        say(f"no profile of {', '.join([name, *shapes])} is stored (tune --show lists what is)")
