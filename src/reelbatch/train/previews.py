"""Videos of the sample prompts while a run trains, to look at."""

from __future__ import annotations

from pathlib import Path

from reelbatch.engine.engine import Engine
from reelbatch.jobs.prompts import Entry, make_requests, read_entries
from reelbatch.loading.model import Model
from reelbatch.request import ModelLimits, VideoRequest
from reelbatch.train.config import TrainConfig
from reelbatch.video import contact_sheet

PROMPT_FILES = frozenset({".txt", ".jsonl", ".csv", ".tsv"})


def preview_requests(config: TrainConfig, limits: ModelLimits) -> list[VideoRequest]:
    """The requests of `sample_prompts`, with seeds from 0 on. Raises ValueError for a prompt file with faults."""
    entries = []
    for number, prompt in enumerate(config.sample_prompts, 1):
        path = Path(prompt)
        if path.suffix.lower() in PROMPT_FILES:
            entries += read_entries(path)
        else:
            entries.append(Entry(f"sample prompt {number}", {"prompt": prompt}))
    return make_requests(entries, first_seed=0, limits=limits)


def draw_previews(config: TrainConfig, model: Model, requests: list[VideoRequest], step: int) -> Path:
    """Writes a contact sheet of these requests into the run's folder, and returns its path."""
    model.family.forget()  # what the transformer made of prompts and images it made with the weights of before
    videos = Engine(model, attention=config.attention).generate(requests)
    return contact_sheet(videos, config.out / "samples" / f"step-{step:07d}.png")
