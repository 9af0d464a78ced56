"""Random videos in random batches, each against the same request alone: bit for bit, or it is counted.

Sizes, lengths, steps, guidance, rules, who joins when, who is cancelled, LoRA, offload, a memory limit,
decoding beside the steps, weights at odd addresses, memory that runs out anywhere, and samples that are saved and go on
in another process are all drawn at random.

    python benchmarks/random_videos.py --videos 2000
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import random
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from reelbatch import Video, VideoRequest
from reelbatch.device import OutOfMemory, held_bytes
from reelbatch.engine.engine import Engine, Failure
from reelbatch.engine.sample import SavedState
from reelbatch.loading.hub import DEMO_FOLDER
from reelbatch.loading.load import load
from reelbatch.loading.lora import save_lora
from reelbatch.loading.model import Model

WORDS = (
    *("a", "large", "small", "red", "blue", "circle", "cross", "moving", "left", "right", "up", "on", "the"),
    *("black", "white", "background", "slowly"),
)
CPU = torch.device("cpu")


def draw_request(rng: random.Random, number: int) -> VideoRequest:
    """A small request that differs from the others in everything that can differ."""
    cfg = rng.random() < 0.3
    return VideoRequest(
        prompt=" ".join(rng.choices(WORDS, k=rng.randint(1, 12))),
        negative_prompt=rng.choice(["", "blurry", "small and slow"]) if cfg else None,
        true_cfg=rng.choice([1.5, 4.0]) if cfg else 1.0,
        seed=rng.getrandbits(rng.choice([8, 32, 64])),
        height=rng.choice([16, 32, 48]),
        width=rng.choice([16, 32, 64]),
        frames=rng.choice([1, 5, 9]),
        steps=rng.randint(1, 4),
        guidance=rng.choice([1.0, 4.5, 6.0]),
        flow_shift=rng.choice([None, 3.0]),
        attention_rule=rng.choice([None, None, None, "own-frame", "spatial-temporal"]),
        vae_tiling=rng.choice([None, None, 0, 64]),
        id=f"v{number}",
    )


def result_of(video: Video) -> tuple[str, bytes]:
    assert video.latents is not None
    return video.frames_sha256, video.latents.numpy().tobytes()


# -- settings that must not change a bit -----------------------------------------------------------


def move_weights(model: Model, offset: int) -> None:
    """Puts every weight at an address that is `offset` bytes past a multiple of 64."""
    for network in model.family.parts.values():
        for parameter in network.parameters():
            room = torch.empty(parameter.nbytes + 128, dtype=torch.uint8)
            start = (offset - room.data_ptr()) % 64
            moved = room[start : start + parameter.nbytes].view(parameter.dtype).view(parameter.shape)
            parameter.data = moved.copy_(parameter.data)


def make_lora(folder: Path) -> Path:
    """A LoRA of random weights beside every attention layer."""
    from peft import LoraConfig

    torch.manual_seed(0)
    transformer = load(DEMO_FOLDER, CPU, "float32").family.parts["transformer"]
    transformer.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_v"], init_lora_weights=False))
    path = folder / "lora.safetensors"
    save_lora(transformer, path)
    return path


@contextmanager
def faults(model: Model, share: float, rng: random.Random) -> Iterator[None]:
    """Memory runs out in a share of all pieces of work."""

    def strike(*_: object) -> None:
        if rng.random() < share:
            raise rng.choice([MemoryError, torch.OutOfMemoryError])("out of memory")

    parts = model.family.parts
    networks = [parts["transformer"], parts["text_encoder"], parts["text_encoder_2"], parts["vae"].decoder]
    handles = [network.register_forward_pre_hook(strike) for network in networks] if share else []
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# -- another process -------------------------------------------------------------------------------


def _other_process(pipe: Connection, lora: list[tuple[str, float]], threads: int) -> None:
    torch.set_num_threads(threads)
    model = load(DEMO_FOLDER, CPU, "float32", lora=lora)
    while (asked := pipe.recv()) is not None:
        request, step, latents = asked
        engine = Engine(model, keep_latents=True)
        engine.submit(request, SavedState(step, torch.from_numpy(latents)))
        (video,) = list(engine.run())
        pipe.send(result_of(video))


class OtherProcess:
    """A process that goes on with saved samples."""

    def __init__(self, lora: list[tuple[str, float]]) -> None:
        self.pipe, theirs = multiprocessing.get_context("spawn").Pipe()
        self.process = multiprocessing.get_context("spawn").Process(
            target=_other_process, args=(theirs, lora, torch.get_num_threads()), daemon=True
        )
        self.process.start()

    def go_on(self, request: VideoRequest, saved: SavedState) -> tuple[str, bytes]:
        self.pipe.send((request, saved.step, saved.latents.numpy()))
        return self.pipe.recv()

    def close(self) -> None:
        self.pipe.send(None)
        self.process.join()


# -- rounds ----------------------------------------------------------------------------------------


class Side:
    """One set of weights: how requests are made alone, and what makes them in batches."""

    def __init__(self, lora: list[tuple[str, float]], folder: Path) -> None:
        self.alone = load(DEMO_FOLDER, CPU, "float32", lora=lora)
        self.batched = load(DEMO_FOLDER, CPU, "float32", lora=lora)
        self.offloaded = load(DEMO_FOLDER, CPU, "float32", offload="block", lora=lora)
        self.other = OtherProcess(lora)


def run_round(side: Side, rng: random.Random, first: int, counts: Counter[str]) -> None:
    """One batch with random settings; every video is held against the same request alone."""
    requests = [draw_request(rng, first + i) for i in range(rng.randint(2, 8))]
    model = side.offloaded if rng.random() < 0.2 else side.batched
    if model is side.batched:
        move_weights(model, 4 * rng.randrange(16))
    limited = rng.random() < 0.2
    share = 0.0 if limited else rng.choice([0.0, 0.0, 0.05, 0.2])  # estimates run the networks, too
    options: dict[str, Any] = {
        "max_batch_size": rng.randint(1, 6),
        "max_batch_tokens": rng.choice([None, 200, 1000]),
        "decode_beside": rng.choice([0, 2]),
        "max_memory": held_bytes(CPU) + rng.choice([256, 512]) * 2**20 if limited else None,
    }
    engine = Engine(model, keep_latents=True, keep_pixels=True, **options)
    joins = {request.id: rng.choice([0, 0, 1, 3]) for request in requests}
    cancels = {request.id: rng.randint(0, 4) for request in requests if rng.random() < 0.1}
    leaves = {request.id: rng.randint(1, 3) for request in requests if rng.random() < 0.2}
    ended: dict[str, Video | Failure] = {}
    moved: dict[str, tuple[str, bytes]] = {}
    waiting, steps = list(requests), 0
    with faults(model, share, rng):
        while waiting or engine.busy:
            for request in [r for r in waiting if joins[r.id] <= steps]:
                waiting.remove(request)
                engine.submit(request)
            for id in [id for id, at in cancels.items() if at == steps]:
                engine.cancel(id)
            states = engine.states()
            for id in [id for id, at in leaves.items() if at <= steps and id in states]:
                del leaves[id]
                request = next(r for r in requests if r.id == id).for_model(engine.limits)
                moved[id] = side.other.go_on(request, states[id])
                engine.cancel(id)
            for end in engine.step():
                ended[end.request.id] = end
            steps += 1
    reference = Engine(side.alone, keep_latents=True)
    for request in requests:
        counts["videos"] += 1
        end = ended.get(request.id)
        if end is None:
            counts["lost"] += 1
            continue
        results = [moved[request.id]] if request.id in moved else []
        counts["went on in another process"] += len(results)
        if isinstance(end, Video):
            results.append(result_of(end))
        elif not end.cancelled and not (isinstance(end.error, OutOfMemory) and (share or options["max_memory"])):
            counts["failed otherwise"] += 1
            print(f"{request.id}: {end.error!r}")
        else:
            counts["cancelled" if end.cancelled else "out of memory"] += 1
        if results:
            (video,) = reference.generate(request)
            expected = result_of(video)
            counts["compared"] += 1
            if any(result != expected for result in results):
                counts["differ"] += 1
                print(f"differs: {request!r}, {options}, offload {model.offload}, faults {share}")
    counts["in batches"] += sum(
        isinstance(end, Video) and end.provenance["batch"]["largest"] > 1 for end in ended.values()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    rng, counts = random.Random(asked.seed), Counter[str]()
    started = shown = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        lora = [(str(make_lora(Path(name))), 0.7)]
        sides = [Side([], Path(name)), Side(copy.copy(lora), Path(name))]
        while counts["videos"] < asked.videos:
            run_round(rng.choice(sides), rng, counts["videos"], counts)
            if time.monotonic() - shown > 30:
                shown = time.monotonic()
                print(f"{shown - started:.0f} s: {dict(counts)}", flush=True)
        for side in sides:
            side.other.close()
    print(f"{asked.videos} videos, {time.monotonic() - started:.0f} s: {dict(sorted(counts.items()))}")
    print("differ:", counts["differ"], "lost:", counts["lost"])


if __name__ == "__main__":
    main()
