"""Moving Shapes from outside: the same bytes everywhere, clean splits, true labels, right readings."""

import hashlib

import numpy as np
import pytest
import torch

from versvideo.world.captions import captions, vocabulary
from versvideo.world.drawing import BACKGROUNDS, COLOURS, SHAPES, STYLES, TEXTURES
from versvideo.world.motion import MOTIONS
from versvideo.world.recogniser import recognise, score
from versvideo.world.shapes import MovingShapes, prompt_set
from versvideo.world.splits import split_table


def digest(clips):
    return hashlib.sha256(clips.numpy().tobytes()).hexdigest()[:16]


@pytest.mark.parametrize("world, expected", [
    (MovingShapes(), "3b46e82180982d0d"),
    (MovingShapes("test", seed=1, frames=8, size=32), "dad96bf7ba9e1a63"),
    (MovingShapes.full(), "48b553107e3669a3"),
    (MovingShapes.full("all", seed=2, frames=5, size=(40, 72)), "bab17b8829937777")])
def test_pixels_are_pinned(world, expected):
    assert digest(world.batch([0, 1, 2, 3, 1_000_000]).clips) == expected


@pytest.mark.parametrize("world", [MovingShapes(), MovingShapes.full("test", seed=3)])
def test_a_clip_does_not_depend_on_its_batch(world):
    alone, among = world.batch([5], truth=True), world.batch([1, 5, 9])
    assert torch.equal(alone.clips[0], among.clips[1])
    assert torch.equal(alone.depth[0], among.depth[1])
    assert torch.equal(alone.masks[0], among.masks[1])
    assert alone.captions[0] == among.captions[1]
    assert alone.attributes == world.attributes([5])


def combinations(world, n=4_000):
    return {(o["colour"], o["shape"], o["motion"], a["background"])
            for a in world.attributes(range(n)) for o in a["objects"]}


@pytest.mark.parametrize("objects", [(1,), (2,)])
def test_no_combination_is_in_both_splits(objects):
    train = combinations(MovingShapes("train", objects=objects))
    test = combinations(MovingShapes("test", objects=objects))
    assert len(train) > 2_000 and len(test) > 300
    assert not train & test
    values = (COLOURS, SHAPES, MOTIONS, BACKGROUNDS)
    for i, table in enumerate(values):
        assert {c[i] for c in train} == {c[i] for c in test} == set(table)
    assert not any(c[1] == "circle" and c[2] == "spin" for c in train | test)
    assert 0.09 < split_table().mean() < 0.11


def test_two_objects_differ_in_colour_and_truth_is_consistent():
    batch = MovingShapes.full("train", seed=4).batch(range(48))
    for clip in batch.attributes:
        assert len({o["colour"] for o in clip["objects"]}) == len(clip["objects"])
    assert batch.masks.shape == (48, 2, 16, 64, 64) and batch.masks.dtype == torch.bool
    assert not batch.masks.all(1).any()
    assert torch.equal(batch.depth[:, 0] < 1, batch.masks.any(1))
    one = torch.tensor([len(a["objects"]) == 1 for a in batch.attributes])
    assert 0.2 < one.float().mean() < 0.8 and not batch.masks[one, 1].any()
    assert [MOTIONS[i] for i in batch.labels] == [
        a["objects"][0]["motion"] for a in batch.attributes]


def test_a_pan_moves_the_background_and_not_the_object():
    options = {"textures": ("stripes", "dots"), "seed": 5}
    still, moved = (MovingShapes("all", pan=pan, **options).batch(range(24)) for pan in (False, True))
    panned = [i for i, a in enumerate(moved.attributes) if a["pan"] in ("left", "right")]
    assert panned and torch.equal(still.masks, moved.masks)
    off = ~moved.masks.any(1)
    for i in panned:
        assert (still.clips[i] != moved.clips[i])[:, off[i]].float().mean() > 0.1


def test_objects_stay_inside_the_frame():
    masks = MovingShapes("all", seed=6).batch(range(200)).masks[:, 0]
    assert masks.flatten(2).any(-1).all()
    border = torch.ones(64, 64, dtype=torch.bool)
    border[1:-1, 1:-1] = False
    assert not masks[..., border].any()


def test_captions_use_the_vocabulary_and_stay_short():
    words = set(vocabulary())
    for clip in MovingShapes.full("all", seed=7).attributes(range(400)):
        texts = captions(clip)
        assert len(texts) == len(set(texts)) == 20
        for text in texts:
            assert text == text.lower() and len(text.split()) <= 28
            assert set(text.split()) <= words
    assert captions({"objects": [{"colour": "red", "shape": "circle", "motion": "left",
                                  "size": "small", "style": "flat"}], "background": "navy",
                     "texture": "plain", "pan": None}
                    )[0] == "a red circle moving left on a navy background"


def test_prompts_are_unseen_and_balanced():
    prompts = prompt_set(64)
    train = combinations(MovingShapes("train"), 20_000)
    seen = {(a["objects"][0]["colour"], a["objects"][0]["shape"], a["objects"][0]["motion"],
             a["background"]) for _, a in prompts}
    assert len(seen) == 64 and not seen & train
    counts = np.unique([a["objects"][0]["motion"] for _, a in prompts], return_counts=True)[1]
    assert len(counts) == 9 and np.ptp(counts) <= 2
    assert prompt_set(64) == prompts and prompt_set(64, seed=1) != prompts


@pytest.mark.parametrize("options", [
    {}, {"styles": STYLES, "textures": TEXTURES, "pan": True}, {"frames": 8},
    {"size": (64, 96)}, {"size": 128, "frames": 12}])
def test_the_recogniser_reads_rendered_clips(options):
    batch = MovingShapes("test", seed=8, **options).batch(range(64))
    assert min(score(recognise(batch.clips), batch.attributes).values()) >= 0.98


def test_the_recogniser_reads_floats_and_blurred_clips():
    batch = MovingShapes("test", seed=9).batch(range(48))
    clips = torch.nn.functional.avg_pool3d(batch.clips / 255, (1, 2, 2))
    clips = torch.nn.functional.interpolate(clips, scale_factor=(1, 2, 2), mode="trilinear")
    noise = torch.randn(clips.shape, generator=torch.Generator().manual_seed(0))
    clips = (clips + 0.05 * noise).clamp(0, 1)
    assert min(score(recognise(clips), batch.attributes).values()) >= 0.95


def test_the_recogniser_is_not_fooled():
    batch = MovingShapes("test", seed=10).batch(range(48))
    frozen = recognise(batch.clips[:, :, :1].expand(-1, -1, 16, -1, -1))
    assert {r["motion"] for r in frozen} == {"still"}
    back = recognise(batch.clips.flip(2))  # Time reversed
    turned = {"left": "right", "right": "left", "up": "down", "down": "up", "grow": "shrink",
              "shrink": "grow"}
    for r, a in zip(back, batch.attributes, strict=True):
        motion = a["objects"][0]["motion"]
        assert r["motion"] == turned.get(motion, r["motion"])
    noise = torch.randint(0, 256, (4, 3, 8, 32, 32), dtype=torch.uint8,
                          generator=torch.Generator().manual_seed(0))
    recognise(noise)
    empty = recognise(torch.full((1, 3, 8, 32, 32), 20, dtype=torch.uint8))[0]
    assert empty == {"colour": None, "shape": None, "motion": None, "background": "black"}


@pytest.mark.parametrize("make, message", [
    (lambda: MovingShapes("tset"), "did you mean 'test'"),
    (lambda: MovingShapes(styles=("dottd",)), "did you mean 'dotted'"),
    (lambda: MovingShapes(objects=(3,)), "choose one of 1, 2"),
    (lambda: MovingShapes(size=8), "16 pixels"),
    (lambda: MovingShapes(frames=0), "frames from 1 on"),
    (lambda: MovingShapes().batch([-1]), "from 0 on"),
    (lambda: prompt_set(10_000), "ask for 1 to"),
    (lambda: recognise(torch.zeros(3, 8, 32, 32)), "pass b 3 t h w"),
    (lambda: recognise(torch.full((1, 3, 8, 32, 32), -1.0)), "give uint8, or floats in"),
    (lambda: score([], []), "one a clip")])
def test_errors_name_the_value_and_the_remedy(make, message):
    with pytest.raises(ValueError, match=message):
        make()
