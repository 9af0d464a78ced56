"""Options that several commands share: what a video is, and how it is made."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from reelbatch.cli.common import ENGINE, REQUEST

Copies = Annotated[
    int | None, typer.Option(help="Videos of each prompt, with seeds one after another.", rich_help_panel=REQUEST)
]
Prompt2 = Annotated[str | None, typer.Option("--prompt-2", help="A separate prompt for the second text encoder.", rich_help_panel=REQUEST)]
NegativePrompt = Annotated[
    str | None, typer.Option(help="What to keep away from; needs --true-cfg above 1.", rich_help_panel=REQUEST)
]
Seed = Annotated[
    int, typer.Option(help="Of the first video of a prompt; further ones count on.", rich_help_panel=REQUEST)
]
Height = Annotated[int | None, typer.Option(help="Pixels.", rich_help_panel=REQUEST)]
Width = Annotated[int | None, typer.Option(help="Pixels.", rich_help_panel=REQUEST)]
Frames = Annotated[int | None, typer.Option(help="4k + 1: 1, 5, 9, …", rich_help_panel=REQUEST)]
Steps = Annotated[int | None, typer.Option(help="Denoising steps.", rich_help_panel=REQUEST)]
Guidance = Annotated[float | None, typer.Option(help="Embedded guidance scale.", rich_help_panel=REQUEST)]
TrueCfg = Annotated[
    float | None, typer.Option(help="Classifier-free guidance scale; 1 is off.", rich_help_panel=REQUEST)
]
FlowShift = Annotated[
    float | None, typer.Option(help="Timestep shift; the model's own if not given.", rich_help_panel=REQUEST)
]
Fps = Annotated[int | None, typer.Option(help="Frames a second of the file.", rich_help_panel=REQUEST)]
AttentionRule = Annotated[
    str | None,
    typer.Option(
        help="Which tokens a head attends to: own-frame, sliding-tile, spatial-temporal; all if not given.",
        rich_help_panel=REQUEST,
    ),
]
Tag = Annotated[list[str] | None, typer.Option(help="Kept in the sidecar; may be repeated.", rich_help_panel=REQUEST)]
Model = Annotated[
    str,
    typer.Option(help="demo, a folder in the Diffusers layout, or a hub id.", rich_help_panel=ENGINE),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N.", rich_help_panel=ENGINE)]
Dtype = Annotated[
    str,
    typer.Option(
        help="auto, float32, bfloat16, float16, int8 (8-bit weights), or transformer=…,vae=…,text=….",
        rich_help_panel=ENGINE,
    ),
]
IsolationOption = Annotated[
    Literal["exact", "packed"],
    typer.Option(
        help="exact: bit for bit the video alone. packed: equal to rounding, faster for small videos.",
        rich_help_panel=ENGINE,
    ),
]
AttentionOption = Annotated[
    str, typer.Option(help="Attention kernel: auto, or a name that `doctor` shows.", rich_help_panel=ENGINE)
]
BatchSize = Annotated[
    int | None,
    typer.Option(
        min=1, help="Videos that share a step; as `tune` found it, else 8, if not given.", rich_help_panel=ENGINE
    ),
]
BatchTokens = Annotated[
    int | None, typer.Option(min=1, help="Transformer rows that share a step, at most.", rich_help_panel=ENGINE)
]
MaxMemory = Annotated[
    str | None,
    typer.Option(help="Memory that the run may hold, as 20GiB; videos wait for it.", rich_help_panel=ENGINE),
]
LoraOption = Annotated[
    list[str] | None,
    typer.Option(
        help="A LoRA file, as style.safetensors or style.safetensors:0.8; may be repeated.", rich_help_panel=ENGINE
    ),
]
OffloadOption = Annotated[
    Literal["none", "component", "block"] | None,
    typer.Option(
        help="Weights on the device: all; of the component at work; of the blocks at work. As `tune` found it, else "
        "none, if neither this nor --batch-size is given.",
        rich_help_panel=ENGINE,
    ),
]
CheckpointEvery = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Steps after which the running videos' state is saved, for a crash to cost no more than these.",
        rich_help_panel=ENGINE,
    ),
]
