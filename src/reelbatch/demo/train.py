"""Makes the bundled model, from nothing: `python -m reelbatch.demo.train --help`."""

from __future__ import annotations

import json
import time
from collections import Counter
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

from reelbatch.demo import autoencoder, denoiser, shapes, text_towers
from reelbatch.demo.denoiser import EncodedClip
from reelbatch.demo.tokenizers import clip_tokenizer, llama_tokenizer
from reelbatch.models.hunyuan_video import HunyuanVideoTransformer3DModel as Transformer
from reelbatch.models.text import TextEncoder

BUNDLED = Path(__file__).parent / "model"
RECORD = Path(__file__).parent / "training.json"
"""Settings and loss curves of the run that made the bundled model."""

LATENT_SHAPES = ((64, 64, 9),) * 5 + ((64, 96, 9),) * 2 + ((64, 64, 13),) * 2 + ((64, 64, 5),)
"""Height, width and frames of the clips that the transformer learns from, in these proportions."""
ENCODE_BATCH = 16
TRAINED = ("vae", "vae_polished", "transformer")

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
def latents(work: Work, clips: Annotated[int, typer.Option(help="How many to encode.")] = 6000) -> None:
    """Stage 3: whitens the VAE's latents, and encodes clips of the training scenes."""
    model = AutoencoderKLHunyuanVideo.from_pretrained(work / "vae").eval()
    scenes, _ = shapes.split()
    rng = np.random.default_rng(2)

    def encoded(count: int) -> Iterator[EncodedClip]:
        for (height, width, frames), share in Counter(LATENT_SHAPES).items():
            left = count * share // len(LATENT_SHAPES)
            while left > 0:
                batch = [scenes[rng.integers(len(scenes))] for _ in range(min(left, ENCODE_BATCH))]
                video = autoencoder.to_video([shapes.draw(scene, height, width, frames, rng) for scene in batch])
                means = model.encode(video).latent_dist.mean
                # cloned: a view would drag its whole batch into the file
                yield from (EncodedClip(mean.clone(), scene) for mean, scene in zip(means, batch, strict=True))
                left -= len(batch)

    autoencoder.whiten(model, [clip.latents for clip in encoded(300)])
    model.save_pretrained(work / "vae_whitened")
    torch.save([(clip.latents, vars(clip.scene)) for clip in encoded(clips)], work / "latents.pt")


@app.command()
def polish(work: Work, minutes: Minutes = 10) -> None:
    """Stage 4: the VAE's decoder alone, further; may run before, beside or after the transformer."""
    model = AutoencoderKLHunyuanVideo.from_pretrained(work / "vae_whitened")
    _train(work, "vae_polished", minutes, autoencoder.polish(model, minutes))


@app.command()
def transformer(
    work: Work,
    minutes: Minutes = 60,
    further: Annotated[bool, typer.Option("--further", help="Go on from the weights of the last time.")] = False,
    seed: Annotated[int, typer.Option(help="Another one for every further leg.")] = 0,
) -> None:
    """Stage 5: the transformer, on the encoded clips."""
    encoded = [EncodedClip(clip, shapes.Scene(**scene)) for clip, scene in torch.load(work / "latents.pt")]
    encoder = TextEncoder(*_text_towers(work), cache_size=len(shapes.scenes()) * len(shapes.WORDINGS) + 1)
    start = Transformer.from_pretrained(work / "transformer") if further else None
    _train(work, "transformer", minutes, denoiser.train(encoded, encoder, minutes, start, seed), further)


@app.command()
def export(work: Work, to: Annotated[Path, typer.Option(help="The model folder.")] = BUNDLED) -> None:
    """Stage 6: a model folder in the Diffusers layout, and the record of the training."""
    llama, tokenizer, clip, tokenizer_2 = _text_towers(work)
    pipeline = HunyuanVideoPipeline(
        text_encoder=llama,
        tokenizer=tokenizer,
        # half precision keeps the package small; it is loaded in the dtype that is asked for
        transformer=HunyuanVideoTransformer3DModel.from_pretrained(work / "transformer", torch_dtype=torch.float16),
        vae=AutoencoderKLHunyuanVideo.from_pretrained(_vae(work)),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=denoiser.FLOW_SHIFT),
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
        "standing still; on a black or white background",
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


def _train(
    work: Path, name: str, minutes: float, run: Iterator[tuple[Any, dict[str, float]]], further: bool = False
) -> None:
    """Follows a training run: saves its averaged weights every minute and at the end, and keeps its loss curve."""
    path = work / f"{name}.json"
    legs = json.loads(path.read_text())["legs"] if further else []
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
    path.write_text(json.dumps({"legs": [*legs, record]}) + "\n", encoding="utf-8")


if __name__ == "__main__":
    app()
