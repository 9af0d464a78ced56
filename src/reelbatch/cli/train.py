"""`reelbatch train` and `reelbatch convert-lora`: what training takes and gives."""

from __future__ import annotations

import inspect as signatures
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer

from reelbatch.cli.common import INTERRUPTED, app, interruptible, quiet_libraries, say, warnings_as_lines
from reelbatch.train.config import TrainConfig, read_config

ABOUT = """Teach the model from videos of any size and length: a LoRA, or all of its weights.

    Examples:

    - `reelbatch train --data clips --out out/style` (a folder of videos, each with a .txt beside it)

    - `reelbatch train style.yaml --rank 32 --steps 4000` (every flag is a line of the file too: `learning_rate: 1e-4`)

    - `reelbatch train style.yaml --resume auto` (goes on from the last checkpoint, bit for bit on the CPU)

    - `accelerate launch --num_processes 4 -m reelbatch train style.yaml` (DDP; with `--use_fsdp --fsdp_version 2` FSDP)

    Clips keep their own size and length: a pack is filled to --batch-tokens, and nothing is padded or cropped to a
    common size. Videos and captions are encoded once and kept. --out holds lora.safetensors (for `generate --lora` and
    Diffusers) or model/, with config.yaml, metrics.csv, loss.png, samples/ and checkpoints/. Ctrl-C finishes the step
    and saves a checkpoint.
    """


def _train(config_file: Path | None, **flags: Any) -> None:
    config = read_config(config_file, {name: value for name, value in flags.items() if value is not None})
    quiet_libraries()
    from reelbatch.train.loop import train

    with warnings_as_lines(), interruptible() as interrupted:
        result = train(config, say, lambda: bool(interrupted))
    if result.weights is None:  # the main process speaks for all
        raise typer.Exit(INTERRUPTED if result.stopped else 0)
    if result.stopped:
        say(f"stopped at step {result.steps}; the same command with --resume auto goes on")
        raise typer.Exit(INTERRUPTED)
    say(f"loss {result.loss:.4g} after {result.steps} steps; written: {result.weights}")


def _flag(name: str, kind: Any, panel: str, help: str, default: Any) -> signatures.Parameter:
    """A field of the config as a flag; what is not given is left to the file."""
    kinds = [one for one in get_args(kind) if one is not type(None)] if type(None) in get_args(kind) else [kind]
    kind = kinds[0]
    flag = f"--{name.replace('_', '-')}"
    if get_origin(kind) is tuple:
        if Ellipsis in get_args(kind):
            kind = list[get_args(kind)[0]]  # type: ignore[misc]
        default = " ".join(map(str, default)) if default else None
    if kind is bool:
        flag, default = f"{flag}/--no-{name.replace('_', '-')}", None
    text = help if default in (None, "", ()) else f"{help} [default: {default}]"
    option = typer.Option(flag, help=text, rich_help_panel=panel, show_default=False)
    return signatures.Parameter(
        name, signatures.Parameter.POSITIONAL_OR_KEYWORD, default=None, annotation=Annotated[kind | None, option]
    )


def _command() -> Any:
    """`_train` with a flag for every field of the config, so that the two cannot drift apart."""
    argument = typer.Argument(help="A YAML file with any of the settings below; flags override it.", show_default=False)
    parameters = [
        signatures.Parameter(
            "config_file",
            signatures.Parameter.POSITIONAL_OR_KEYWORD,
            default=None,
            annotation=Annotated[Path | None, argument],
        )
    ]
    for name, field in TrainConfig.model_fields.items():
        extra = field.json_schema_extra
        panel = str(extra["panel"]) if isinstance(extra, dict) else ""
        parameters.append(_flag(name, field.annotation, panel, field.description or "", field.default))

    def train(*args: Any, **flags: Any) -> None:
        _train(flags.pop("config_file", None), **flags)

    train.__doc__ = ABOUT
    train.__signature__ = signatures.Signature(parameters)  # type: ignore[attr-defined]
    train.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return train


app.command(name="train")(_command())


@app.command()
def convert_lora(
    source: Annotated[Path, typer.Argument(help="A LoRA file, in any of the names below, or of LyCORIS.")],
    to: Annotated[Path, typer.Argument(help="The file to write.")],
    names: Annotated[
        Literal["diffusers", "tencent", "kohya", "comfyui"],
        typer.Option(
            help="diffusers: PEFT's names. tencent: PEFT on Tencent's own layers. kohya: musubi-tuner's. comfyui: "
            "ComfyUI's own layers; it alone also holds differences of whole weights (LoHa, LoKr, .diff)."
        ),
    ],
    model: Annotated[str, typer.Option(help="The model that the LoRA is of: demo, a folder, or a hub id.")] = "demo",
) -> None:
    """Write a LoRA under the names that another program reads.

    Example: `reelbatch convert-lora out/style/lora.safetensors style-kohya.safetensors --names kohya`
    """
    quiet_libraries()
    import torch

    from reelbatch.loading.hub import resolve
    from reelbatch.loading.inspection import inspect
    from reelbatch.loading.lora import convert_file

    info = inspect(resolve(model))
    kind = info.layout.networks["transformer"]
    with torch.device("meta"):  # the shapes of its layers are enough
        network = kind.from_config(kind.load_config(str(info.folder / "transformer")))
    convert_file(source, to, names, network)
    say(f"written: {to}")
