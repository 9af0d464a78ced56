"""The videos that are measured, and how far they are from those alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tuning import request

from reelbatch.loading.inspection import ModelInfo
from reelbatch.request import RequestError
from reelbatch.tune import workload
from reelbatch.tune.quality import Alone, attributes, compare, psnr, ssim
from reelbatch.video import Video


def video(frames: np.ndarray, latents: torch.Tensor | None = None) -> Video:
    return Video(request(), frames, {}, latents)


def test_equality_looks_at_every_bit_and_distance_at_the_worst_video() -> None:
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 255, (3, 32, 32, 3), dtype=np.uint8) for _ in range(2)]
    alone = Alone(tuple(video(f, torch.zeros(2)) for f in frames), 10, True, "float32 alone")
    same = compare([video(f, torch.zeros(2)) for f in frames], alone, alone)
    assert (same.equal, same.largest, same.psnr) == (True, 0, None)
    assert same.ssim == pytest.approx(1, abs=1e-9)
    assert not compare([video(f, torch.full((2,), 1e-7)) for f in frames], alone, alone).equal
    off = frames[1].copy()
    off[0, 0, 0, 0] ^= 1
    found = compare([video(frames[0], torch.zeros(2)), video(off, torch.zeros(2))], alone, alone)
    assert (found.equal, found.largest) == (False, 1)
    assert found.psnr == pytest.approx(10 * np.log10(255**2 * off.size))


def test_distances_are_those_of_the_textbook() -> None:
    black, grey = np.zeros((1, 32, 32, 3), np.uint8), np.full((1, 32, 32, 3), 51, np.uint8)
    assert psnr(black, grey) == pytest.approx(20 * np.log10(5))
    c1 = (0.01 * 255) ** 2
    assert ssim(black, grey) == pytest.approx(c1 / (51**2 + c1), rel=1e-6)
    assert ssim(black[:, :8, :8], grey[:, :8, :8]) is None


def test_another_dtype_is_compared_with_the_reference_and_equal_to_its_own() -> None:
    frames = np.zeros((1, 32, 32, 3), np.uint8)
    own = Alone((video(frames + 4),), 10, True, "bfloat16 alone")
    reference = Alone((video(frames),), 10, True, "float32 alone")
    found = compare([video(frames + 4)], own, reference)
    assert (found.equal, found.largest, found.against) == (True, 4, "float32 alone")


def test_attributes_are_read_back_from_frames() -> None:
    from reelbatch.demo import shapes

    scene = shapes.Scene("red", "circle", "large", "left", "black")
    clip = shapes.draw(scene, 64, 64, 9)
    assert attributes([clip], [scene]) == 1.0
    assert attributes([clip], [replace(scene, color="blue")]) == 0.8


def test_a_shape_gives_requests_that_differ_and_waves_of_any_size(info: ModelInfo) -> None:
    one = workload.of_shape(info, {"width": 48, "height": 32, "frames": 5}, 32)
    assert (one.name, one.shapes, one.period) == ("48×32, 5 frames, 3 steps", "48×32×5", 1)
    assert len({(r.prompt, r.seed) for r in one.requests}) == 32
    assert [len(wave) for wave in one.waves(16)] == [16]
    guided = workload.of_shape(info, {"negative_prompt": "", "true_cfg": 2.0}, 2)
    assert guided.shapes == "32×32×9 cfg"
    with pytest.raises(RequestError, match="width=50 must be a multiple of 16"):
        workload.of_shape(info, {"width": 50}, 1)


def test_a_model_of_few_words_is_given_captions_and_what_they_show(info: ModelInfo) -> None:
    from reelbatch.demo import shapes

    scenes = shapes.scenes()
    one = workload.of_shape(info, {}, 9, lambda count: [(scene, shapes.caption(scene)) for scene in scenes[:count]])
    assert [r.prompt for r in one.requests] == [shapes.caption(scene) for scene in one.scenes]
    assert one.scenes == tuple(scenes[:9])
    clip = video(shapes.draw(scenes[0], 64, 64, 9))
    alone = Alone((clip,), 10, True, "float32 alone")
    assert compare([clip], alone, alone, one.scenes[:1]).attributes == 1.0
    assert compare([clip], alone, alone).attributes is None


def test_a_mix_is_represented_with_its_largest_and_every_wave_covers_it(info: ModelInfo) -> None:
    small, large = request(), request(width=64)
    mix = workload.of_mix([small] * 30 + [large] + [small] * 9, "p.csv")
    assert len(mix.requests) == mix.period == 8
    assert sum(r.width == 64 for r in mix.requests) == 1
    assert mix.shapes == "32×32×9 + 64×32×9"
    for batch in (1, 3, 8, 16):
        waves = mix.waves(batch)
        assert all(len(wave) == batch for wave in waves)
        assert any(r.width == 64 for wave in waves for r in wave)
        assert all(len({r.id for r in wave}) == batch for wave in waves)
    assert workload.of_mix([small] * 20, "p.csv").period == 1


@pytest.mark.parametrize("text", ["64", "64x64", "64x64x9x2", "axbxc", ""])
def test_a_shape_that_is_none_is_refused_with_how_to_write_it(text: str) -> None:
    with pytest.raises(ValueError, match="expected WIDTHxHEIGHTxFRAMES"):
        workload.parse_shape(text)
    assert workload.parse_shape("1280×720x129") == {"width": 1280, "height": 720, "frames": 129}
