"""`reelbatch model-info` and `reelbatch doctor`: what a model folder and this machine hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from reelbatch.cli.common import SOME_FAILED, SafeConsole, app

if TYPE_CHECKING:
    from reelbatch.loading.inspection import ModelInfo


@app.command()
def model_info(
    folder: Annotated[
        str, typer.Argument(help="A model folder, demo, or a hub id; or a file or folder of another layout.")
    ],
    kind: Annotated[
        str | None, typer.Option("--as", help="Which model a file of another layout is, as for convert.")
    ] = None,
    device: Annotated[str, typer.Option(help="Where it should run: auto, cpu, cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Show what a model folder holds, what is wrong with it, and whether it can run here.

    Of files of weights, LoRA files, and folders as Tencent publishes them, it says what they are and how to use them.
    """
    from reelbatch.loading.checkpoints.layouts import is_foreign
    from reelbatch.loading.hub import resolve
    from reelbatch.loading.inspection import inspect

    path = Path(folder).expanduser()
    if folder != "demo" and is_foreign(path):
        _explain(path, kind, as_json)
        raise typer.Exit(SOME_FAILED)  # it does not run as it is
    info = inspect(resolve(folder))
    if as_json:
        typer.echo(json.dumps(_info_record(info, device, dtype)))
    else:
        _show_info(info, device, dtype)
    raise typer.Exit(SOME_FAILED if info.problems or not info.fits(device, dtype) else 0)


def _explain(path: Path, kind: str | None, as_json: bool) -> None:
    from reelbatch.loading.checkpoints.explain import explain

    found = explain(path, kind)
    if as_json:
        typer.echo(json.dumps({**vars(found), "path": str(path)}))
        return
    answer = SafeConsole()
    stored = ", ".join(f"{size / 2**20:.1f} MiB {dtype}" for dtype, size in found.stored_bytes.items())
    lines = {
        "what": found.about,
        "layout": found.layout,
        "holds": ", ".join(found.holds),
        "parameters": f"{found.parameters:,}",
        "stored as": stored,
        "config": ", ".join(f"{name} {value}" for name, value in found.config.items()),
        "lacks": "; ".join(f"{name} (from {source})" for name, source in found.missing.items()),
    }
    for name, value in lines.items():
        if value:
            answer.print(f"{name:<11} {value}", markup=False, highlight=False, soft_wrap=True)
    answer.print(found.verdict, markup=False, highlight=False, soft_wrap=True)


@app.command()
def doctor(
    device: Annotated[str, typer.Option(help="auto, cpu, cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Show what this machine has: versions, device, memory, and the attention kernel that is chosen, and why."""
    from reelbatch.doctor import examine

    machine = examine(device, dtype)
    if as_json:
        typer.echo(json.dumps(machine))
        return
    _show_machine(machine)


def _show_machine(report: dict[str, Any]) -> None:
    from rich.table import Table

    answer = SafeConsole()
    for name, value in report["machine"].items():
        answer.print(f"{name:<14} {value}", highlight=False, markup=False, soft_wrap=True)
    chosen = Table("attention with", "kernel", "why", title=f"chosen on {report['device']} in {report['dtype']}")
    for kind, choice in report["chosen"].items():
        chosen.add_row(kind, choice["backend"], choice["why"])
    answer.print(chosen)
    backends = Table("--attention", "what it is", "cannot here")
    for backend in report["backends"]:
        refused = "; ".join(f"{kind}: {why}" for kind, why in backend["refuses"].items())
        backends.add_row(backend["name"], backend["what"], backend["never"] or refused or "")
    answer.print(backends)
    answer.print(f"attention rules: {', '.join(report['rules'])}", highlight=False)


def _info_record(info: ModelInfo, device: str, dtype: str) -> dict[str, Any]:
    return {
        "name": info.name,
        "folder": str(info.folder),
        "about": info.profile.about,
        "components": [
            {
                "name": component.name,
                "class": component.class_name,
                "parameters": component.parameters,
                "stored_bytes": dict(component.stored_bytes),
            }
            for component in info.components
        ],
        "defaults": vars(info.limits.defaults),
        "spatial_stride": info.limits.spatial_stride,
        "temporal_stride": info.limits.temporal_stride,
        "flow_shift": info.flow_shift,
        "weight_bytes": info.weight_bytes(dtype, device),
        "fits": info.fits(device, dtype),
        "verdict": info.verdict(device, dtype),
        "problems": list(info.problems),
    }


def _show_info(info: ModelInfo, device: str, dtype: str) -> None:
    from rich.table import Table

    table = Table("component", "class", "parameters", "stored as", title=f"{info.name} ({info.folder})")
    for component in info.components:
        stored = ", ".join(f"{size / 2**20:.1f} MiB {kind}" for kind, size in component.stored_bytes)
        count = f"{component.parameters:,}" if component.parameters else ""
        table.add_row(component.name, component.class_name, count, stored)
    answer = SafeConsole()
    answer.print(table)
    if info.profile.about:
        answer.print(info.profile.about, markup=False)
    d = info.limits.defaults
    answer.print(
        f"by default {d.width}×{d.height}, {d.frames} frames, {d.steps} steps, guidance {d.guidance}, "
        f"flow shift {info.flow_shift}; sizes are multiples of {info.limits.spatial_stride}",
        highlight=False,
    )
    for problem in info.problems:
        answer.print(f"problem: {problem}", style="red", markup=False, highlight=False, soft_wrap=True)
    answer.print(info.verdict(device, dtype), highlight=False, soft_wrap=True)
