"""A set on disk becomes shards: tars of pictures, videos of several rates, and a report of bad files that survives."""

import io
import json
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from versvideo.core.notebooks import run_cells
from versvideo.data.batches import is_image_index, unpack_tensors
from versvideo.data.conditions import extract_condition
from versvideo.data.shards import Shards
from versvideo.media.video import write_video
from versvideo.models.latents import decode_latents
from versvideo.trainers.batches import open_shards
from versvideo.trainers.loading import load_frozen
from versvideo.trainers.loop import fit
from versvideo.trainers.objectives import training_scheduler
from versvideo.trainers.recipe_unet import ShardBatches, UNetLoss, build_unet, resolve_unet

REPO = Path(__file__).resolve().parents[1]


def prepare(folder, *arguments: str):
    return run_cells(
        REPO / "nbs/26_prepare.ipynb",
        [f"data={folder / 'set'}", f"out={folder / 'out'}", "size=smoke", "workers=1", *arguments],
    )


def reported(path) -> dict:
    "File name to cause."
    return {name.rpartition("/")[2]: cause for name, cause in json.loads(path.read_text()).items()}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "set").mkdir()
    return tmp_path


def add_video(folder, name: str, frames: int, fps: float, size: tuple = (32, 32)):
    "Frame i has the brightness i / frames."
    clip = torch.linspace(0, 1, frames).view(1, -1, 1, 1).expand(3, -1, *size)
    write_video(clip, folder / "set" / f"{name}.mp4", fps)
    (folder / "set" / f"{name}.txt").write_text(f"clip {name}")


def test_tars_of_pictures_are_prepared_and_bad_ones_reported_through_a_resume(folder):
    picture = io.BytesIO()
    Image.new("RGB", (40, 48), "red").save(picture, "JPEG")
    with tarfile.open(folder / "set" / "00000.tar", "w") as tar:
        for i in range(6):
            for name, data in (
                (f"{i}.jpg", b"none" if i in (1, 4) else picture.getvalue()),
                (f"{i}.txt", b"a red wall"),
            ):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    prepare(folder, "per_shard=3")
    shards, made = Shards(folder / "out"), {path.name: path.read_bytes() for path in (folder / "out").glob("*.tar")}
    assert [shards[i]["__key__"] for i in range(len(shards))] == ["00000000", "00000002", "00000003", "00000005"]
    assert unpack_tensors(shards[0])["latents"].shape[1] == 1 and shards[0]["txt"] == b"a red wall"
    both = reported(folder / "out" / "bad.json")
    assert list(both) == ["1.jpg", "4.jpg"] and reported(folder / "out" / "bad-000001.json").keys() == {"4.jpg"}
    for name in ("shard-000001.tar", "shard-000001.json"):
        (folder / "out" / name).unlink()
    prepare(folder, "per_shard=3")
    assert reported(folder / "out" / "bad.json") == both
    assert {path.name: path.read_bytes() for path in (folder / "out").glob("*.tar")} == made


def test_a_run_that_too_many_bad_files_stop_leaves_their_report(folder):
    add_video(folder, "good", 8, 8)
    for i in range(120):
        (folder / "set" / f"{i:03d}.mp4").write_bytes(b"")
        (folder / "set" / f"{i:03d}.txt").write_text("a clip")
    with pytest.raises(RuntimeError, match="too many bad files, more than 10%"):
        prepare(folder, "per_shard=60")
    assert (
        len(reported(folder / "out" / "bad-000000.json")) == 60
        and len(reported(folder / "out" / "bad-000001.json")) == 40
    )


def test_videos_of_two_rates_become_clips_of_one(folder):
    add_video(folder, "slow", 16, 8)
    add_video(folder, "swift", 32, 16)
    add_video(folder, "too short", 2, 8)
    prepare(folder, "fps=4")
    assert reported(folder / "out" / "bad.json") == {"too short.mp4": "too short"}
    shards = Shards(folder / "out")
    slow, swift = (unpack_tensors(shards[i])["latents"].float() for i in range(2))
    assert (slow - swift).abs().mean() < 0.1 * (slow - slow.flip(1)).abs().mean()
    with pytest.raises(ValueError, match="not both"):
        prepare(folder, "fps=4", "stride=2")


def test_a_controlnet_is_trained_on_what_was_prepared(folder):
    "Its conditions are those of the decoded latents; depth needs a model, and the shards the same encoders."
    for name in ("one", "two"):
        add_video(folder, name, 8, 8)
    prepare(folder)

    def train(*arguments: str):
        return run_cells(
            REPO / "nbs/22_train_controlnet.ipynb", [f"data={folder / 'out'}", "conditions=image,softedge", *arguments]
        )

    run = train(f"out={folder / 'control'}")
    assert json.loads((folder / "control/config.json").read_text())["shards"] == run.shards.digest
    batch = run.batches(0, 0)
    clips = decode_latents(run.pipe.vae, batch["latents"])
    assert not any(name.startswith("condition") for name in batch)
    maps = run.make_conditions(clips, batch["given"].tolist(), {})
    assert torch.equal(maps["softedge"], extract_condition("softedge", clips))
    assert maps["image"][:, 3].mean() == len(batch["given"]) / clips.shape[2]
    with pytest.raises(ValueError, match="condition_models=depth=FOLDER, or leave depth out"):
        train("conditions=image,depth")
    made = folder / "out/made.json"
    text = json.loads(made.read_text())
    made.write_text(json.dumps(text | dict(about=text["about"] | dict(vae="another"))))
    with pytest.raises(ValueError, match="was made with another vae than"):
        train()


# Buckets

BUCKETS = "buckets=4x32x32,4x24x40,1x32x32"


class Killed(Exception):
    pass


@pytest.fixture
def bucketed(folder):
    "Square and wide clips, one that is too short for either, and a picture; prepared in buckets."
    for i in range(4):
        add_video(folder, f"square {i}", 8, 8)
    for i in range(3):
        add_video(folder, f"wide {i}", 8, 8, (24, 40))
    add_video(folder, "short", 2, 8, (24, 40))
    Image.new("RGB", (40, 48), "red").save(folder / "set" / "picture.png")
    (folder / "set" / "picture.txt").write_text("a red wall")
    prepare(folder, "per_shard=4", BUCKETS)
    return folder


def test_clips_are_sorted_into_buckets_also_through_a_resume(bucketed):
    texts = {}
    for name in ("4x32x32", "4x24x40", "1x32x32"):
        shards = Shards(bucketed / "out" / name)
        texts[name] = [sample["txt"].decode() for sample in shards]
        t, h, w = map(int, name.split("x"))
        assert all(unpack_tensors(sample)["latents"].shape == (4, t, h // 8, w // 8) for sample in shards)
    assert texts == {"4x32x32": [f"clip square {i}" for i in range(4)], "4x24x40": [f"clip wide {i}" for i in range(3)],
                     "1x32x32": ["a red wall", "clip short"]}
    made = {path: path.read_bytes() for path in (bucketed / "out").rglob("*.tar")}
    assert len(made) == 5 and not list((bucketed / "out").glob("*.tar"))
    for ending in ("tar", "json"):
        (bucketed / f"out/4x24x40/shard-000001.{ending}").unlink()
    run = prepare(bucketed, "per_shard=4", BUCKETS)
    assert {path: path.read_bytes() for path in (bucketed / "out").rglob("*.tar")} == made and run.left_out == 0
    assert reported(bucketed / "out/bad.json") == {}
    with pytest.raises(ValueError, match="give another folder"):
        prepare(bucketed, "per_shard=4", "buckets=4x32x32,1x32x32")


def test_what_is_too_short_for_all_buckets_is_reported(folder):
    add_video(folder, "long", 8, 8)
    add_video(folder, "short", 2, 8)
    run = prepare(folder, "buckets=4x32x32,4x24x40")
    assert reported(folder / "out/bad.json") == {"short.mp4": "too short"} and run.left_out == 1
    with pytest.raises(ValueError, match="buckets='4x30x32'"):
        prepare(folder, "buckets=4x30x32")


def test_training_takes_turns_between_buckets_and_resumes_in_the_same_order(bucketed):
    row, cfg, plan = resolve_unet("smoke", steps=16, batch=2, save_every=3, log_every=1, seed=0)
    vae, text_encoder, tokenizer = load_frozen("smoke")
    no_text = tokenizer("", padding="max_length", return_tensors="pt").input_ids[0]

    def train(where, dies=None):
        "Shapes of the latents of each step."
        shards = open_shards(str(bucketed / "out"), row.latent(), vae, text_encoder, 2, 0, plan.image_rank_fraction)
        batches, seen = ShardBatches(shards, shards, cfg, plan), {}

        def batch(step, batch_index):
            if step == dies:
                raise Killed
            found = batches(step, batch_index)
            seen[step] = tuple(found["latents"].shape)
            assert not has_clips(step) or len(found["latents"]) == 2
            return found

        torch.manual_seed(0)
        unet, _ = build_unet(row, plan)
        log = fit(cfg, unet, UNetLoss(text_encoder, no_text, plan, training_scheduler()), batch, bucketed / where)
        assert all(torch.isfinite(torch.tensor(r["loss"])) for r in log.rows)
        return seen

    def has_clips(step):
        return step >= plan.image_steps and not is_image_index(step, plan.image_rank_fraction)

    whole = train("whole")
    clips = [shape[2:] for step, shape in whole.items() if has_clips(step)]
    assert all(clips.count(shape) >= 2 for shape in ((4, 4, 4), (4, 3, 5)))
    assert (1, 4, 4) in clips and {shape[2] for step, shape in whole.items() if not has_clips(step)} == {1}
    with pytest.raises(Killed):
        train("parts", dies=11)
    resumed = train("parts")
    assert resumed == {step: shape for step, shape in whole.items() if step >= 9}
    one, other = (load_file(bucketed / where / "step-000016/model.safetensors") for where in ("whole", "parts"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
