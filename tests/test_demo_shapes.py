"""The little world of the bundled model: what is drawn is what is read, whatever the size and a little damage."""

from __future__ import annotations

import numpy as np
import pytest

from reelbatch.demo import shapes

SIZES = [(64, 64, 9), (64, 96, 9), (64, 64, 5), (96, 64, 13)]


def read_share(height: int, width: int, frames: int, damage: float = 0.0) -> float:
    """The share of attributes that are read right, in a clip of every seventh scene (each value in many of them)."""
    rng, right = np.random.default_rng(5), []
    for scene in shapes.scenes()[::7]:
        clip = shapes.draw(scene, height, width, frames, rng)
        if damage:
            soft = (clip.astype(np.float32) + np.roll(clip, 1, axis=2) + np.roll(clip, -1, axis=2)) / 3
            clip = np.clip(soft + rng.normal(0, damage, clip.shape), 0, 255).astype(np.uint8)
        right += shapes.read(clip).matches(scene).values()
    return float(np.mean(right))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_what_is_drawn_is_read(size: tuple[int, int, int]) -> None:
    assert read_share(*size) >= 0.99


def test_a_blurred_and_noisy_clip_is_read_as_well() -> None:
    assert read_share(64, 64, 9, damage=12) >= 0.99


def test_a_clip_that_shows_something_else_is_not_read_as_it() -> None:
    rng = np.random.default_rng(0)
    red = shapes.Scene("red", "circle", "large", "left", "black")
    for other in (
        shapes.Scene("blue", "square", "small", "up", "white"),
        shapes.Scene("green", "cross", "small", "still", "white"),
    ):
        assert not any(shapes.read(shapes.draw(other, rng=rng)).matches(red).values())


def test_an_empty_picture_has_no_shape() -> None:
    clip = np.zeros((9, 64, 64, 3), np.uint8)
    clip[:, 56:] = shapes.FLOOR_COLOR
    found = shapes.read(clip)
    assert (found.shape, found.size) == (None, None)


def test_there_are_640_scenes_and_a_quarter_is_held_out() -> None:
    train, held_out = shapes.split()
    assert len(set(train)) == 480
    assert len(set(held_out)) == 160
    assert not set(train) & set(held_out)
    for attribute in shapes.ATTRIBUTES:  # every word of a held-out caption was seen in training
        assert {getattr(scene, attribute) for scene in held_out} <= {getattr(scene, attribute) for scene in train}


def test_each_scene_has_wordings_of_different_length_and_no_two_scenes_share_one() -> None:
    for wording in range(len(shapes.WORDINGS)):
        captions = {shapes.caption(scene, wording) for scene in shapes.scenes()}
        assert len(captions) == len(shapes.scenes())
    scene = shapes.scenes()[0]
    assert len({len(shapes.caption(scene, wording).split()) for wording in range(len(shapes.WORDINGS))}) >= 2


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_shape_stays_in_the_picture_and_off_the_floor(size: tuple[int, int, int]) -> None:
    height, width, frames = size
    rng = np.random.default_rng(1)
    for scene in shapes.scenes()[::7]:
        _, cover = shapes.draw_masked(scene, height, width, frames, rng)
        edge = np.concatenate([cover[:, 0], cover[:, shapes._floor_row(height, width)]], axis=1)
        assert edge.max() == 0
        assert cover[:, :, [0, -1]].max() == 0
