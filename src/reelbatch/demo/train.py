"""Makes the bundled model, from nothing: `python -m reelbatch.demo.train --help`.

Its transformer is trained by `reelbatch train` itself, with `train.yaml` beside this file:

    python -m reelbatch.demo.train text --work W     # and vae, whiten, polish
    python -m reelbatch.demo.train export --work W --to W/start          # with an untrained transformer
    python -m reelbatch.demo.shapes --out W/clips
    reelbatch train src/reelbatch/demo/train.yaml --model W/start --data W/clips --out W/run
    python -m reelbatch.demo.train export --work W
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from transformers import CLIPTextModel, LlamaModel, PreTrainedTokenizerFast

from reelbatch.demo import autoencoder, shapes, text_towers
from reelbatch.demo.tokenizers import clip_tokenizer, llama_tokenizer
from reelbatch.train.report import read_metrics

BUNDLED = Path(__file__).parent / "model"
RECORD = Path(__file__).parent / "training.json"
"""Settings and loss curves of the run that made the bundled model."""

ARCHITECTURE: dict[str, Any] = {
    "num_attention_heads": 4,
    "attention_head_dim": 48,
    "num_layers": 2,
    "num_single_layers": 4,
    "num_refiner_layers": 1,
    "patch_size": 2,
    "text_embed_dim": text_towers.TEXT_DIM,
    "pooled_projection_dim": text_towers.POOLED_DIM,
    "rope_axes_dim": (8, 20, 20),
}
"""The transformer's."""
FLOW_SHIFT = 3.0
WHITENED_OVER = 300
"""Clips whose latents are looked at for their mean and variance."""
ENCODE_BATCH = 16
TRAINED = ("vae", "vae_polished")

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
Work = Annotated[Path, typer.Option(help="Folder for the parts, between the stages.")]
Minutes = Annotated[float, typer.Option(help="How long to train; the learning rate follows the clock.")]


@app.command()
def text(work: Work) -> None:
    """Stage 1: the text encoders and their tokenizers (about a minute)."""
    torch.manual_seed(0)
    words = text_towers.vocabulary()
    tokenizer, tokenizer_2 = llama_tokenizer(words), clip_tokenizer(words, work / "tokenizer_2")
    llama, clip = text_towers.build_llama(tokenizer), text_towers.build_clip(tokenizer_2)
    typer.echo(f"Llama: {text_towers.train_llama(llama, tokenizer):.3f} nats a token")
    typer.echo(f"CLIP: {text_towers.train_clip(clip, tokenizer_2):.1%} of attributes read from the pooled vector")
    tokenizer.save_pretrained(work / "tokenizer")
    tokenizer_2.save_pretrained(work / "tokenizer_2")
    llama.save_pretrained(work / "text_encoder")
    clip.save_pretrained(work / "text_encoder_2")


@app.command()
def vae(work: Work, minutes: Minutes = 30) -> None:
    """Stage 2: the VAE."""
    _train(work, "vae", minutes, autoencoder.train(minutes))


@app.command()
@torch.no_grad()
def whiten(work: Work) -> None:
    """Stage 3: gives the VAE's latents mean 0 and variance 1 in every channel."""
    model = AutoencoderKLHunyuanVideo.from_pretrained(work / "vae").eval()
    scenes, _ = shapes.split()
    rng = np.random.default_rng(2)
    seen = []
    for start in range(0, WHITENED_OVER, ENCODE_BATCH):
        height, width, frames = shapes.CLIP_SIZES[start // ENCODE_BATCH % len(shapes.CLIP_SIZES)]
        batch = [scenes[rng.integers(len(scenes))] for _ in range(ENCODE_BATCH)]
        video = autoencoder.to_video([shapes.draw(scene, height, width, frames, rng) for scene in batch])
        seen += list(model.encode(video).latent_dist.mean)
    autoencoder.whiten(model, seen)
    model.save_pretrained(work / "vae_whitened")


@app.command()
def polish(work: Work, minutes: Minutes = 10) -> None:
    """Stage 4: the VAE's decoder alone, further; may run before, beside or after the transformer."""
    model = AutoencoderKLHunyuanVideo.from_pretrained(work / "vae_whitened")
    _train(work, "vae_polished", minutes, autoencoder.polish(model, minutes))


@app.command()
def export(work: Work, to: Annotated[Path, typer.Option(help="The model folder.")] = BUNDLED) -> None:
    """Stages 5 and 7: a model folder in the Diffusers layout, with the transformer of WORK/run, else an untrained one.

    Into the package itself, the record of the training is written too.
    """
    trained = work / "run" / "model" / "transformer"
    llama, tokenizer, clip, tokenizer_2 = _text_towers(work)
    pipeline = HunyuanVideoPipeline(
        text_encoder=llama,
        tokenizer=tokenizer,
        # half precision keeps the package small; it is loaded in the dtype that is asked for
        transformer=HunyuanVideoTransformer3DModel.from_pretrained(trained, torch_dtype=torch.float16)
        if trained.exists()
        else HunyuanVideoTransformer3DModel(**ARCHITECTURE).half(),
        vae=AutoencoderKLHunyuanVideo.from_pretrained(_vae(work)),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=FLOW_SHIFT),
        text_encoder_2=clip,
        tokenizer_2=tokenizer_2,
    )
    pipeline.save_pretrained(to)
    for config in to.glob("*/config.json"):  # where the parts lay on this machine is nobody else's business
        kept = {key: value for key, value in json.loads(config.read_text()).items() if key != "_name_or_path"}
        config.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
    profile = {
        "about": "a little HunyuanVideo that draws one moving shape: "
        f"{', '.join(shapes.COLORS)}; {', '.join(shapes.SHAPES)}; small or large; moving left, right, up, down or "
        "standing still; on a black or white background; in 64×64 to 128×128 pixels and 5 to 17 frames",
        "defaults": {"height": 64, "width": 64, "frames": 9, "steps": 20, "guidance": 6.0, "fps": 8},
        "vocabulary": [word for word in text_towers.vocabulary() if word.isalpha()],
    }
    (to / "reelbatch.json").write_text(json.dumps(profile, indent=2) + "\n", encoding="utf-8")
    if to == BUNDLED:
        record = {
            stage: json.loads((work / f"{stage}.json").read_text())
            for stage in TRAINED
            if (work / f"{stage}.json").exists()
        }
        if (work / "run" / "metrics.csv").exists():
            rows = read_metrics(work / "run" / "metrics.csv")
            curve = [{"step": int(row["step"]), "loss": round(float(row["loss"]), 5)} for row in rows if row["loss"]]
            record["transformer"] = {"legs": [{"about": "reelbatch train with train.yaml", "curve": curve}]}
        RECORD.write_text(json.dumps(record) + "\n", encoding="utf-8")


def _vae(work: Path) -> Path:
    polished = work / "vae_polished"
    return polished if polished.exists() else work / "vae_whitened"


def _text_towers(work: Path) -> tuple[LlamaModel, PreTrainedTokenizerFast, CLIPTextModel, PreTrainedTokenizerFast]:
    return (
        LlamaModel.from_pretrained(work / "text_encoder", dtype=torch.float32).eval(),
        PreTrainedTokenizerFast.from_pretrained(work / "tokenizer"),
        CLIPTextModel.from_pretrained(work / "text_encoder_2", dtype=torch.float32).eval(),
        clip_tokenizer(text_towers.vocabulary(), work / "tokenizer_2"),
    )


def _train(work: Path, name: str, minutes: float, run: Iterator[tuple[Any, dict[str, float]]]) -> None:
    """Follows a training run: saves its averaged weights every minute and at the end, and keeps its loss curve."""
    record: dict[str, Any] = {"minutes": minutes, "threads": torch.get_num_threads(), "curve": []}
    save: Callable[[Any], None] = lambda model: model.save_pretrained(work / name)  # noqa: E731
    saved, model = time.monotonic(), None
    for model, log in run:
        record["curve"].append({key: round(value, 5) for key, value in log.items()})
        typer.echo(" ".join(f"{key} {value:.4g}" for key, value in log.items()))
        if time.monotonic() - saved > 60:
            save(model)
            saved = time.monotonic()
    save(model)
    (work / f"{name}.json").write_text(json.dumps({"legs": [record]}) + "\n", encoding="utf-8")


if __name__ == "__main__":
    app()
