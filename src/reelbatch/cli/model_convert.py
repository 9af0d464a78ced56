"""`reelbatch convert`: a model as Tencent or ComfyUI store it, written as a model folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from reelbatch.cli.common import app, quiet_libraries, say

ABOUT = """Write a model folder from files as Tencent or ComfyUI store them.

SOURCE is one of

- a folder of Tencent's: of HunyuanVideo (with `hunyuan-video-t2v-720p/`), or of HunyuanVideo 1.5 (with `transformer/`)

- a file of a transformer: safetensors (also ComfyUI's, also in fp8 with scales), PyTorch's `.pt`, or GGUF

What it is, is read from its names and shapes. Where those are the same for several models, `--as` says which it is (the
message names them). A file has no text encoders and no VAE: they come from `--rest`, a model folder or hub id.

Every file of weights that is written is read back and compared, and the folder is inspected. A conversion that was
stopped goes on when the same command is given again. Nothing in any file is run: `.pt` files are read as weights alone.

Examples:

`reelbatch convert HunyuanVideo/ckpts hunyuan-video`

`reelbatch convert hunyuan_video_fp8.safetensors hunyuan-video --as t2v --rest hunyuanvideo-community/HunyuanVideo`

`reelbatch model-info FILE` says what a file is and what it lacks.
"""


@app.command(help=ABOUT)
def convert(
    source: Annotated[Path, typer.Argument(help="A file of weights, or a folder in one of Tencent's layouts.")],
    out: Annotated[Path, typer.Argument(help="The model folder to write: a new one, or one that is not finished.")],
    kind: Annotated[
        str | None,
        typer.Option("--as", help="Which model it is, where its weights do not tell: t2v, i2v, 480p_t2v, …"),
    ] = None,
    rest: Annotated[
        str | None, typer.Option(help="A model folder or hub id that has what is missing, as the text encoders.")
    ] = None,
    vae: Annotated[Path | None, typer.Option(help="A file or folder of a VAE, where it is not in SOURCE.")] = None,
    dtype: Annotated[
        str,
        typer.Option(help="Of the weights written: auto (as they are; bfloat16 for fp8 and GGUF), bfloat16, …"),
    ] = "auto",
    shard_gib: Annotated[float, typer.Option(min=0.001, max=1000, help="Size of a file of weights, in GiB.")] = 4.65,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object when it is done.")] = False,
) -> None:
    quiet_libraries()
    from reelbatch.loading.checkpoints.convert import base_model, check_out, describe, plan, write
    from reelbatch.loading.hub import resolve
    from reelbatch.loading.precision import DTYPES

    if dtype != "auto" and dtype not in DTYPES:
        raise ValueError(f"--dtype {dtype}: no such dtype; there are auto, {', '.join(DTYPES)}")
    base = None if rest is None else base_model(resolve(rest))
    conversion = plan(source, kind, base, vae, DTYPES.get(dtype))
    check_out(conversion, out)
    record: dict[str, Any] = describe(conversion)
    say(f"{source}: {record['about']}, {record['layout']}")
    files: list[dict[str, Any]] = []

    def progress(path: Path, there: bool) -> None:
        files.append({"file": str(path), "bytes": path.stat().st_size, "was_there": there})
        say(f"{'was there' if there else 'written'} and checked: {path}")

    info = write(conversion, out, progress, int(shard_gib * 2**30))
    if as_json:
        typer.echo(json.dumps({**record, "out": str(out), "files": files, "parameters": info.parameters}))
    else:
        say(f"done: {out} ({info.parameters:,} parameters); use it with --model {out}")
