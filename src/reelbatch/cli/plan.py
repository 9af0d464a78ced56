"""`reelbatch plan`: what a batch costs in memory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from reelbatch.cli.common import SOME_FAILED, SafeConsole, app

if TYPE_CHECKING:
    from reelbatch.tune.plan import Answer
    from reelbatch.tune.setup import Planned


@app.command()
def plan(
    model: Annotated[
        str | None,
        typer.Option(
            help="demo, a folder in the Diffusers layout, or a published model, for which no folder is needed: "
            "hunyuanvideo-13b, hunyuanvideo-i2v, skyreels-v1-t2v, skyreels-v1-i2v, hunyuanvideo-1.5 (480p_t2v), or "
            "another of its variants, as hunyuanvideo-1.5-720p_i2v. demo if not given, but hunyuanvideo-13b with "
            "--cards."
        ),
    ] = None,
    height: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    frames: Annotated[int | None, typer.Option(help="4k + 1: 1, 5, 9, …")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Videos that share a step.")] = 1,
    true_cfg: Annotated[
        float,
        typer.Option(
            min=1,
            help="Classifier-free guidance scale; above 1, steps have a "
            "second branch, as they have with models of such guidance anyhow, but for distilled ones.",
        ),
    ] = 1.0,
    dtype: Annotated[str, typer.Option(help="As of `generate`: auto, float32, bfloat16, int8, part by part.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N: a device of this machine.")] = "auto",
    on: Annotated[
        str | None,
        typer.Option(
            help="A card to plan for, whatever this machine has: rtx4090, l40s, a100-80gb, h100, h200 … or a size, as "
            "24GiB. In bfloat16 (float16 where the card has none) if --dtype is not given."
        ),
    ] = None,
    isolation: Annotated[Literal["exact", "packed"], typer.Option(help="As of `generate`.")] = "exact",
    offload: Annotated[
        Literal["none", "component", "block"],
        typer.Option(help="Weights on the device: all; of the component at work; of the blocks at work."),
    ] = "none",
    max_memory: Annotated[
        str | None,
        typer.Option(help="As of `generate`, such as 20GiB: videos wait rather than pass it; no fallback is taken."),
    ] = None,
    vae_tiling: Annotated[
        int | None,
        typer.Option(help="Side of the VAE's tiles in pixels, 0 for none; the model's own rule if not given."),
    ] = None,
    calibrate: Annotated[
        bool,
        typer.Option(
            "--calibrate",
            help="First make a few small videos and measure them: later plans for this model, device and dtype are "
            "corrected by it.",
        ),
    ] = False,
    cards: Annotated[
        bool,
        typer.Option(
            "--cards",
            help="A table of what fits on cards of 12, 16, 24, 48, 80 and 141 GB, of several sizes and lengths (or of "
            "the one given). Takes a minute.",
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Show what a batch is estimated to cost in memory, whether the engine can make it, and what would be better.

    Examples:

    - `reelbatch plan --model hunyuanvideo-13b --on rtx4090 --offload block --batch-size 2`

    - `reelbatch plan --model hunyuanvideo-1.5-720p_i2v --on l40s`

    - `reelbatch plan --model /models/HunyuanVideo --height 544 --width 960 --frames 97`

    - `reelbatch plan --cards`: what fits on which card

    What does not fit as it is set may fit by what the engine does by itself when memory runs out: steps in parts,
    weights moved away, smaller VAE tiles. That is said, and counts as fitting; the exit code is 1 for what does not fit
    even so. Videos of models that take an image are planned with one. Nothing is downloaded, and without --calibrate
    nothing is loaded.
    """
    from reelbatch.device import parse_bytes
    from reelbatch.tune.plan import answer
    from reelbatch.tune.setup import open_model

    if cards:
        import torch

        if any((width, height, frames)) and not all((width, height, frames)):
            raise ValueError("--cards goes by whole shapes: give --width, --height and --frames, or none of them")
        shapes = [(width, height, frames)] if width and height and frames else None
        planned = open_model(model or "hunyuanvideo-13b", torch.device("cuda"))
        _show_cards(planned, shapes, dtype, as_json)
        return
    model = model or "demo"
    if calibrate and on is not None:
        raise ValueError(f"--calibrate measures on this machine, and --on {on} is planned for; give one of them")
    if calibrate:
        from reelbatch.engine.calibrate import calibrate as measure

        measure(model, device=device, dtype=dtype)
    result = answer(
        model,
        height=height,
        width=width,
        frames=frames,
        batch_size=batch_size,
        cfg=true_cfg > 1,
        dtype=dtype,
        device=device,
        on=on,
        isolation=isolation,
        offload=offload,
        max_memory=None if max_memory is None else parse_bytes(max_memory),
        vae_tiling=vae_tiling,
    )
    if as_json:
        typer.echo(json.dumps(result.record()))
    else:
        _show_plan(result)
    raise typer.Exit(0 if result.fits else SOME_FAILED)


def _show_cards(model: Planned, shapes: Sequence[tuple[int, int, int]] | None, dtype: str, as_json: bool) -> None:
    from reelbatch.memory.estimate import how_far_off
    from reelbatch.tune.fitting import DTYPES, markdown, rows

    every = list(rows(model, shapes, DTYPES if dtype == "auto" else [dtype]))
    if as_json:
        estimates = how_far_off(model.device)
        typer.echo(json.dumps({"model": model.name, "rows": [r.record() for r in every], "estimates": estimates}))
        return
    typer.echo(
        f"{model.name}: the quickest offload with which a video fits, its estimated peak, and how many fit at once\n"
    )
    typer.echo(f"{markdown(every)}\n\n{how_far_off(model.device)}")


def _show_plan(result: Answer) -> None:
    from rich.table import Table

    from reelbatch.memory.estimate import how_far_off
    from reelbatch.tune.plan import PHASES
    from reelbatch.tune.setup import LARGEST_BATCH

    setup, request = result.setup, result.setup.request
    title = (
        f"{setup.model.name}: {setup.batch_size} × {request.width}×{request.height}, {request.frames} frames"
        f"{', true CFG' if request.uses_cfg else ''}; {setup.precision}, {setup.isolation}, offload {setup.offload}, "
        f"{result.where}"
    )
    table = Table("phase", title=title)
    for column in ("weights GiB", "activations GiB", "estimated peak GiB"):
        table.add_column(column, justify="right")
    for phase, total in result.plan.phases.items():
        sizes = (result.plan.weights[phase], getattr(result.plan, phase), total)
        table.add_row(PHASES[phase], *(f"{size / 2**30:.2f}" for size in sizes))
    answer = SafeConsole()

    def show(text: str, style: str | None = None) -> None:
        answer.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    answer.print(table)
    if setup.held:
        show(f"besides, this process holds {setup.held / 2**30:.2f} GiB before a model is loaded")
    show(result.verdict, None if result.fits else "red")
    if not result.fits and setup.model.device.type == "cpu":
        show("planned for this machine's CPU; a graphics card is planned for by its name: --on rtx4090")
    for number, remedy in enumerate(result.remedies):
        start = "what would make it fit as it is set, the cheapest first: " if number == 0 else "  or: "
        show(f"{start}{', '.join(remedy.changes)} (estimated peak {remedy.peak / 2**30:.2f} GiB)")
    if not result.fits and not result.remedies:
        show("no smaller batch, dtype, offload or VAE tiling makes it fit: make it smaller or shorter")
    most = f"{result.largest_batch}{' or more' if result.largest_batch == LARGEST_BATCH else ''}"
    show(f"largest batch that fits as it is set: {most if result.largest_batch else 'none'}")
    if result.calibrated:
        show(result.calibrated)
    show(how_far_off(setup.model.device))
