"""Scores: collected by several processes, on other people's pipelines, against published values."""

import json
import os
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from diffusers import (
    AnimateDiffPipeline,
    AutoencoderKL,
    DDIMScheduler,
    MotionAdapter,
    TextToVideoSDPipeline,
    UNet2DConditionModel,
    UNet3DConditionModel,
)
from processes import as_processes, ends
from transformers import CLIPTextConfig, CLIPTextModel

from versvideo.core.files import WEIGHTS
from versvideo.media.video import write_video
from versvideo.metrics.benchmark import benchmark
from versvideo.metrics.collect import collect, load_collected
from versvideo.metrics.distances import Statistics, frechet_distance
from versvideo.metrics.evaluate import compute_scores, evaluate
from versvideo.metrics.features import load_extractor
from versvideo.metrics.networks import Extractor
from versvideo.metrics.peers import clip_maker, collect_models, load_peer
from versvideo.metrics.protocol import score_table
from versvideo.models.text import load_clip
from versvideo.pipelines.loading import load_pipeline
from versvideo.trainers.loading import load_trained
from versvideo.world.shapes import MovingShapes

NARROW = dict(block_out_channels=(8, 8), norm_num_groups=4)
TEXT = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)


class Mean(Extractor):
    "Mean colour of a clip."

    def __init__(self):
        super().__init__("mean", "1")
        self.weight = torch.nn.Parameter(torch.ones(1))

    def read(self, clips):
        return dict(features=clips.mean((2, 3, 4)) * self.weight)


def collect_by_two(folder, fails=None):
    "Exit codes of two processes that collect, of which one may fail after its first clips."
    def work():
        state, world = PartialState(cpu=True), MovingShapes("test", frames=4, size=32)

        def make(numbers):
            if state.process_index == fails and numbers.start >= 4:
                raise RuntimeError("killed in the middle")
            return world.batch(numbers).clips

        try:
            collect(dict(mean=Mean()), make, 11, folder, 2, processes=state)
        except Exception as error:
            Path(f"{folder}-{state.process_index}.txt").write_text(str(error))
            os._exit(3)
        state.destroy_process_group()

    return ends(as_processes(2, work))


def test_two_processes_collect_what_one_does_and_go_on_where_one_failed(tmp_path):
    world = MovingShapes("test", frames=4, size=32)
    alone = load_collected(collect(dict(mean=Mean()), lambda n: world.batch(n).clips, 11, tmp_path / "one", 2),
                      "mean features")
    assert collect_by_two(tmp_path / "two", fails=1)[1] == 3
    assert "killed in the middle" in (tmp_path / "two-1.txt").read_text()
    assert 0 < len(list((tmp_path / "two").glob("part-*"))) < 6
    assert collect_by_two(tmp_path / "two") == [0, 0]
    assert torch.equal(load_collected(tmp_path / "two", "mean features"), alone)
    halves = Statistics(alone[:5]) + Statistics(alone[5:])
    assert abs(frechet_distance(halves, alone + 1) - frechet_distance(alone, alone + 1)) < 1e-10


def text_tower():
    words = load_clip(WEIGHTS / "XS")[2]
    torch.manual_seed(0)
    return words, CLIPTextModel(CLIPTextConfig(
        vocab_size=len(words), max_position_embeddings=words.model_max_length, **TEXT)).eval()


def image_vae():
    torch.manual_seed(0)
    return AutoencoderKL(block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
                         up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1,
                         latent_channels=4, norm_num_groups=4, sample_size=32).eval()


def modelscope(folder):
    words, text = text_tower()
    unet = UNet3DConditionModel(
        layers_per_block=1, sample_size=8, cross_attention_dim=16, attention_head_dim=4, **NARROW,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"))
    pipe = TextToVideoSDPipeline(vae=image_vae(), text_encoder=text, tokenizer=words, unet=unet,
                                 scheduler=DDIMScheduler())
    pipe.save_pretrained(folder / "modelscope")
    return str(folder / "modelscope")


def animatediff(folder):
    words, text = text_tower()
    unet = UNet2DConditionModel(
        layers_per_block=1, sample_size=8, cross_attention_dim=16, attention_head_dim=4, **NARROW,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
    adapter = MotionAdapter(block_out_channels=(8, 8), motion_layers_per_block=1,
                            motion_norm_num_groups=4, motion_num_attention_heads=2)
    adapter.save_pretrained(folder / "adapter")
    pipe = AnimateDiffPipeline(vae=image_vae(), text_encoder=text, tokenizer=words, unet=unet,
                               motion_adapter=adapter, scheduler=DDIMScheduler())
    pipe.save_pretrained(folder / "animatediff")
    return str(folder / "animatediff")


@pytest.mark.parametrize("kind", [modelscope, animatediff])
def test_pipelines_of_others_are_scored_like_ours(kind, tmp_path):
    pipe = load_peer(kind(tmp_path))
    pipe.set_progress_bar_config(disable=True)
    make = clip_maker(pipe, ["a red circle", "a blue star", "a star"], 4, "32 squashed", num_frames=4,
                    height=16, width=16, num_inference_steps=2)
    whole = make(range(3))
    assert whole.shape == (3, 3, 4, 32, 32) and whole.dtype == torch.uint8
    assert (torch.cat([make(range(1)), make(range(1, 3))]).int() - whole.int()).abs().max() <= 2
    folder = collect(dict(mean=Mean()), make, 3, tmp_path / "features", 2)
    assert load_collected(folder, "mean features").shape == (3, 3)


@pytest.mark.filterwarnings("ignore:.*says little", "ignore:.*another protocol")
def test_a_pipeline_of_others_stands_in_a_table_beside_ours(tmp_path):
    bench = benchmark("shapes-ucf101", (4, 32, 32), n=18)
    judges = dict(video=load_extractor("shapes"), clip=load_extractor("clip", str(WEIGHTS / "XS")))
    peer, texts = modelscope(tmp_path), judges["clip"].texts(bench.prompts)
    sets, made = collect_models(bench, judges, load_trained("smoke"), peer, tmp_path / "features", 1, 4.)
    rows = {}
    for name, where in sets.items():
        def protocol(metric, extractor, against, notes="", how=made[name]):
            return bench.protocol(metric, extractor, against, notes=notes, **how)
        rows[name] = compute_scores(where, judges, protocol, "" if name == "real" else sets["real"], texts)
    assert list(rows) == ["real", "real, second set", "real, same texts", "ours", peer]
    assert set(rows[peer]) == {"FVD on shapes", "CLIPSIM on clip:XS", "FC on clip:XS"}
    assert rows[peer]["FC on clip:XS"].value != rows["ours"]["FC on clip:XS"].value
    with pytest.raises(ValueError, match="different protocols"):
        score_table(rows)
    assert peer in str(score_table(rows, ("seed", "size", "sampler", "steps", "guidance")))


def test_the_protocol_of_the_paper_takes_one_caption_of_each_clip_of_msrvtt(tmp_path):
    (tmp_path / "TestVideo").mkdir()
    for i in range(3):
        write_video(MovingShapes("test", frames=18, size=32).batch([i]).clips[0],
                    tmp_path / "TestVideo" / f"video{7010 + i}.mp4")
    videos = [dict(video_id=f"video{7010 + i}", split="test") for i in range(4)]
    said = [dict(video_id=v["video_id"], caption=f"{v['video_id']} says {j}") for v in videos for j in range(20)]
    (tmp_path / "info.json").write_text(json.dumps(dict(videos=videos, sentences=said)))
    with pytest.warns(UserWarning, match="1 of 4 videos of test are not in"):
        bench = benchmark("versvideo-msrvtt", (16, 64, 64), str(tmp_path), n=3)
    assert [p.split()[0] for p in bench.prompts] == ["video7010", "video7011", "video7012"]
    assert bench.real(range(3)).shape == (3, 3, 16, 256, 256)
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="takes 2990 clips"):
        benchmark("versvideo-msrvtt", (16, 64, 64), str(tmp_path))


def test_a_motion_adapter_gets_the_schedule_it_was_trained_with(tmp_path):
    animatediff(tmp_path)
    pipe = load_peer(f"{tmp_path / 'animatediff'}+{tmp_path / 'adapter'}")
    assert isinstance(pipe.scheduler, DDIMScheduler)
    assert pipe.scheduler.config.beta_schedule == "linear" and not pipe.scheduler.config.clip_sample


def test_i3d_gives_the_published_distance_of_black_and_white():
    "The demonstration of TensorFlow's and StyleGAN-V's I3D: 151.26 on clips of 30 frames."
    file = os.environ.get("VERSVIDEO_I3D", "")
    if not Path(file).is_file():
        pytest.skip("VERSVIDEO_I3D names no i3d_torchscript.pt")
    i3d = load_extractor("i3d", file)
    black, white = (torch.full((8, 3, 30, 64, 64), v, dtype=torch.uint8) for v in (0, 255))
    found = frechet_distance(*(i3d(clips)["features"].numpy() for clips in (black, white)))
    assert abs(found - 151.26) < 0.5


def test_scores_of_the_readme_run_offline_and_print_a_table(capsys):
    "The block as written, up to the networks that have to be downloaded; two steps are enough here."
    readme = Path(__file__).resolve().parents[1] / "README.md"
    block = next(b for b in re.findall(r"```python\n(.*?)```", readme.read_text(), re.DOTALL) if "clip:XS" in b)
    pipe = load_pipeline("XS", device="cpu")
    exec(block.split("judges =")[0], dict(pipe=partial(pipe, num_inference_steps=2), evaluate=evaluate))
    lines = capsys.readouterr().out.splitlines()[-3:]
    assert lines[0].split() == ["score", "value", "low", "high", "clips"]
    assert [line.split("  ")[0] for line in lines[1:]] == ["CLIPSIM on clip:XS", "FC on clip:XS"]
