"""Little video files for the tests of training."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

WORDS = ("a red cat moving left", "two large dogs on a street at night", "a robot", "a blue star in the rain")
SIZES = ((32, 32, 9), (32, 48, 5), (48, 32, 13), (32, 32, 1))
"""Height, width and frames."""


def write_video(path: Path, frames: np.ndarray, rate: float = 8, times: list[float] | None = None) -> Path:
    """Without loss; `times` are the frames' seconds, in tens of milliseconds."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(
            "libx264rgb", rate=Fraction(rate).limit_denominator(1000), options={"qp": "0", "bf": "0"}
        )
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "rgb24"
        if times is not None:
            stream.codec_context.time_base = stream.time_base = Fraction(1, 100)
        for i, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            if times is not None:
                picture.pts, picture.time_base = round(times[i] * 100), Fraction(1, 100)
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    return path


def counted(count: int, height: int = 32, width: int = 32) -> np.ndarray:
    """Frames of one brightness each, which tells their number: 10, 20, 30, …"""
    return np.stack([np.full((height, width, 3), 10 * (i + 1), np.uint8) for i in range(count)])


def write_folder(folder: Path, count: int = 8, seed: int = 0) -> Path:
    """Clips of mixed sizes and lengths, with metadata.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        height, width, frames = SIZES[i % len(SIZES)]
        corners = rng.integers(0, 255, (frames, 2, 2, 3))
        video = corners.repeat(height // 2, 1).repeat(width // 2, 2).astype(np.uint8)
        write_video(folder / f"{i}.mp4", video)
        rows.append({"file_name": f"{i}.mp4", "text": WORDS[i % len(WORDS)]})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder
