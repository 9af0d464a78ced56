"""`reelbatch plan`: what a batch costs in memory."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from reelbatch.cli.common import SOME_FAILED, SafeConsole, app

if TYPE_CHECKING:
    from reelbatch.tune.plan import Answer


@app.command()
def plan(
    model: Annotated[
        str, typer.Option(help="demo, a folder in the Diffusers layout, or hunyuanvideo-13b (no folder needed).")
    ] = "demo",
    height: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    frames: Annotated[int | None, typer.Option(help="4k + 1: 1, 5, 9, …")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Videos that share a step.")] = 1,
    true_cfg: Annotated[float, typer.Option(min=1, help="Classifier-free guidance scale; 1 is off.")] = 1.0,
    dtype: Annotated[str, typer.Option(help="As of `generate`: auto, float32, bfloat16, int8, part by part.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N; with --max-memory also one not here.")] = "auto",
    isolation: Annotated[Literal["exact", "packed"], typer.Option(help="As of `generate`.")] = "exact",
    offload: Annotated[
        Literal["none", "component", "block"],
        typer.Option(help="Weights on the device: all; of the component at work; of the blocks at work."),
    ] = "none",
    max_memory: Annotated[
        str | None, typer.Option(help="What may be used, such as 20GiB; what the device has if not given.")
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
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Show what a batch is estimated to cost in memory, whether it fits, and what would make it fit.

    Examples:

    - `reelbatch plan --model hunyuanvideo-13b --device cuda --max-memory 80GiB --batch-size 2`

    - `reelbatch plan --model /models/HunyuanVideo --height 544 --width 960 --frames 97`

    Nothing is downloaded, and without --calibrate nothing is loaded. The exit code is 1 for what does not fit.
    """
    from reelbatch.device import parse_bytes
    from reelbatch.tune.plan import answer

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


def _show_plan(result: Answer) -> None:
    from rich.table import Table

    from reelbatch.memory.estimate import how_far_off
    from reelbatch.tune.plan import LARGEST_BATCH, PHASES

    setup, request = result.setup, result.setup.request
    title = (
        f"{setup.model.name}: {setup.batch_size} × {request.width}×{request.height}, {request.frames} frames"
        f"{', true CFG' if request.uses_cfg else ''}; {setup.precision}, {setup.isolation}, offload {setup.offload}, "
        f"{setup.model.device}"
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
    for number, remedy in enumerate(result.remedies):
        start = "what would make it fit, the cheapest first: " if number == 0 else "  or: "
        show(f"{start}{', '.join(remedy.changes)} (estimated peak {remedy.peak / 2**30:.2f} GiB)")
    if not result.fits and not result.remedies:
        show("no smaller batch, dtype, offload or VAE tiling makes it fit: make it smaller or shorter")
    most = f"{result.largest_batch}{' or more' if result.largest_batch == LARGEST_BATCH else ''}"
    show(f"largest batch that fits as it is set: {most if result.largest_batch else 'none'}")
    if result.calibrated:
        show(result.calibrated)
    show(how_far_off(setup.model.device))
