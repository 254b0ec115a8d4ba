"""Control and style as a user of the installed package meets them: tiny random models, real files."""

import copy
import warnings
from fractions import Fraction
from pathlib import Path
from unittest.mock import patch

import av
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

from versvideo.cli import main
from versvideo.core.notebooks import run_cells
from versvideo.core.records import tensors_digest
from versvideo.data.conditions import CONDITIONS, Condition, extract_condition
from versvideo.media.video import write_video
from versvideo.models.controlnet import VersVideoControlNet
from versvideo.models.saving import save_pipeline
from versvideo.models.style import StyleAdapter, join_tokens
from versvideo.models.unet import VersVideoUNet
from versvideo.pipelines.edit import edit_files
from versvideo.pipelines.loading import load_pipeline
from versvideo.trainers.config import FitConfig
from versvideo.trainers.loading import load_trained
from versvideo.trainers.loop import fit
from versvideo.trainers.objectives import denoising_loss, training_scheduler
from versvideo.world.drawing import STYLES
from versvideo.world.shapes import MovingShapes
from versvideo.world.styles import read_style
from versvideo.world.truth import true_maps

REPO = Path(__file__).resolve().parents[1]
UNET = dict(block_out_channels=(8, 16), attention_levels=(True, False), head_dim=4,
            cross_attention_dim=6, experts=(2, 2), norm_groups=4)
FEW = dict(num_inference_steps=1)


def awake(model, std=0.1):
    "Random weights in place of zeros."
    for p in model.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=std)
    return model


@pytest.fixture
def unet():
    torch.manual_seed(0)
    return awake(VersVideoUNet(**UNET)).eval()


@pytest.fixture
def control(unet):
    return VersVideoControlNet.from_unet(unet, dict(canny=1, image=4), adapter_channels=(4, 4, 4, 4))


@pytest.fixture(scope="module")
def pipe():
    torch.manual_seed(0)
    pipe = load_trained("smoke")
    awake(pipe.unet)   # an untrained one does not listen
    parts = VersVideoControlNet.from_unet(pipe.unet, dict(canny=1, softedge=1, image=4),
                                          adapter_channels=(4, 8, 8, 8))
    pipe.register_modules(controlnet=awake(parts).eval(), style_adapter=awake(StyleAdapter(128, 128)))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def inputs(b=2, t=3, h=4, w=6):
    g = torch.Generator().manual_seed(1)
    clips = {"canny": torch.rand(b, 1, t, 8 * h, 8 * w, generator=g),
             "image": torch.rand(b, 4, t, 8 * h, 8 * w, generator=g)}
    return torch.randn(b, 4, t, h, w, generator=g), torch.randn(b, 5, 6, generator=g), clips


def controlled(unet, control, conditions, scales=None):
    z, text, _ = inputs()
    down, middle = control(z, 7, text, conditions, scales, return_dict=False)
    return unet(z, 7, text, down_block_additional_residuals=down,
                mid_block_additional_residual=middle).sample


# The network

@torch.no_grad()
def test_a_new_controlnet_changes_nothing(unet, control):
    z, text, clips = inputs()
    assert torch.equal(controlled(unet, control.eval(), clips), unet(z, 7, text).sample)
    awake(control)
    assert not torch.allclose(controlled(unet, control, clips), unet(z, 7, text).sample, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("shape", [(1, 1, 4, 4), (2, 2, 3, 5), (1, 5, 2, 8)])
def test_any_size_and_an_image(control, shape):
    z, text, clips = inputs(*shape)
    down, middle = awake(control).eval()(z, 7, text, clips, return_dict=False)
    assert middle.shape[2] == shape[1] and all(torch.isfinite(r).all() for r in (*down, middle))


@torch.no_grad()
def test_rows_of_a_batch_do_not_meet(unet, control):
    z, text, clips = inputs()
    awake(control).eval()
    scales = {"canny": torch.tensor([[1.0], [0.0]]), "image": torch.tensor([[0.0], [1.0]])}
    both = control(z, 7, text, clips, scales).mid_block_res_sample
    for i, name in enumerate(clips):
        alone = control(z[[i]], 7, text[[i]], {name: clips[name][[i]]}).mid_block_res_sample
        torch.testing.assert_close(both[[i]], alone, rtol=0, atol=1e-5)


@torch.no_grad()
def test_half_precision_and_a_move(control):
    z, text, clips = inputs()
    low = copy.deepcopy(awake(control)).to(torch.bfloat16).eval()
    out = low(z.bfloat16(), 7, text.bfloat16(), clips)
    exact = control.eval()(z, 7, text, clips)
    assert out.mid_block_res_sample.dtype == torch.bfloat16
    error = (out.mid_block_res_sample.float() - exact.mid_block_res_sample).abs().mean()
    assert error < 0.1 * exact.mid_block_res_sample.abs().mean()


def test_merged_experts_are_dealt_out_again(unet):
    z, text, clips = inputs()
    merged = copy.deepcopy(unet).merge_experts()
    control = VersVideoControlNet.from_unet(merged, dict(canny=1), (3, 2), (4, 4, 4, 4))
    assert tuple(control.config.experts) == (3, 2)
    control = awake(control).eval()
    with torch.no_grad():
        before = control(z, 7, text, {"canny": clips["canny"]}).mid_block_res_sample
        after = control.merge_experts()(z, 7, text, {"canny": clips["canny"]}).mid_block_res_sample
    torch.testing.assert_close(before, after, rtol=0, atol=1e-5)


def test_a_new_condition_leaves_the_others(control, tmp_path):
    digest = tensors_digest(control.state_dict().values())
    old = set(control.state_dict())
    control.add_condition("scribble", 1).save_pretrained(tmp_path)
    again = VersVideoControlNet.from_pretrained(tmp_path)
    assert list(again.adapters) == ["canny", "image", "scribble"]
    kept = [p for name, p in again.state_dict().items() if name in old]
    assert tensors_digest(kept) == digest


# Training

@pytest.fixture
def one_process(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_frozen_means_frozen(unet, control, one_process):
    "A ControlNet and a style adapter learn; not a bit of the UNet changes."
    unet.requires_grad_(False)
    style, scheduler = StyleAdapter(3, 6, tokens=2), training_scheduler()
    z, text, clips = inputs()
    batch = dict(z=z, text=text, picture=torch.nn.functional.normalize(torch.randn(2, 3), dim=1),
                 **clips)

    def control_loss(model, batch):
        def net(noisy, step, text):
            down, middle = model(noisy, step, text, {n: batch[n] for n in clips}, return_dict=False)
            return unet(noisy, step, text, down_block_additional_residuals=down,
                        mid_block_additional_residual=middle)
        return denoising_loss(net, scheduler, batch["z"], batch["text"])

    def style_loss(model, batch):
        tokens, weights = join_tokens(batch["text"], model(batch["picture"]), 1.0)
        return denoising_loss(lambda x, step, text: unet(x, step, text, token_weights=weights),
                              scheduler, batch["z"], tokens)

    for model, loss in ((control, control_loss), (style, style_loss)):
        frozen, own = (tensors_digest(m.state_dict().values()) for m in (unet, model))
        fit(FitConfig(steps=3, batch_size=2, lr=1e-2, warmup=1), model, loss,
            lambda step, turn: batch)
        assert tensors_digest(unet.state_dict().values()) == frozen
        assert tensors_digest(model.state_dict().values()) != own


# Conditions

@pytest.mark.parametrize("name", ["canny", "softedge", "image"])
@pytest.mark.parametrize("shape", [(1, 1, 16, 16), (2, 3, 17, 40)])
def test_conditions_of_any_size(name, shape):
    b, t, h, w = shape
    clip = torch.randint(256, (b, 3, t, h, w), dtype=torch.uint8)
    y = extract_condition(name, clip)
    assert y.shape == (b, CONDITIONS[name].channels, t, h, w) and 0 <= y.min() and y.max() <= 1


def test_a_condition_of_ones_own(monkeypatch):
    monkeypatch.setitem(CONDITIONS, "dark", Condition(lambda clip: 1 - clip.mean(1, keepdim=True)))
    assert extract_condition("dark", torch.ones(1, 3, 2, 8, 8)).eq(0).all()


def test_true_maps_match_the_clip():
    batch = MovingShapes.full("test").batch(range(4))
    truth = true_maps(batch)
    assert (truth["depth"] > 0).eq(batch.masks.any(1, keepdim=True)).all()
    assert truth["depth"].amax((1, 2, 3, 4)).eq(1).all()


def test_styles_are_read():
    clips = torch.cat([MovingShapes("test", styles=(s,)).batch([0, 1]).clips for s in STYLES])
    right = [a == b for a, b in zip(read_style(clips), np.repeat(STYLES, 2), strict=True)]
    assert sum(right) >= 11


# The pipeline

def test_a_pipeline_with_control_is_saved_and_loaded(pipe, tmp_path):
    edges = {"canny": torch.rand(1, 1, 4, 32, 32)}
    again = load_pipeline(save_pipeline(pipe, tmp_path / "control", torch.float32), device="cpu")
    again.set_progress_bar_config(disable=True)
    arguments = dict(prompt="a red circle", conditions=edges, style_image=Image.new("RGB", (9, 9)),
                     num_inference_steps=2, output_type="latent")
    one, two = (p(**arguments, generator=torch.Generator().manual_seed(0)).videos
                for p in (pipe, again))
    torch.testing.assert_close(one, two, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("arguments", "error", "message"), [
    (dict(conditions={"hed": torch.rand(1, 1, 4, 32, 32)}), ValueError, "condition='hed' is unknown"),
    (dict(conditions={"canny": torch.rand(1, 1, 3, 32, 32)}, num_frames=4), ValueError, "need `b c t"),
    (dict(conditions={"canny": torch.rand(1, 1, 4, 32, 36)}), ValueError, "width=36 is not a multiple"),
    (dict(conditions={"canny": torch.rand(1, 1, 4, 32, 32) * 2 - 1}), ValueError, r"give \[0, 1\]"),
    (dict(conditions={"canny": torch.full((1, 1, 4, 32, 32), float("nan"))}), ValueError, "give"),
    (dict(conditions={"canny": torch.rand(1, 3, 4, 32, 32)}), ValueError, "need `b c t h w`"),
    (dict(conditions={"canny": torch.rand(3, 1, 4, 32, 32)}), ValueError, "3 clips for 1 videos"),
    (dict(conditions={"canny": "edges.mp4"}), ValueError, "give a tensor"),
    (dict(conditions={"canny": torch.rand(1, 1, 4, 32, 32)}, condition_scales={"image": 1}),
     ValueError, "names 'image'"),
    (dict(conditions={"canny": torch.rand(1, 1, 4, 32, 32)}, condition_scales=[1, 2]), ValueError,
     "one for each of the 4 frames"),
    (dict(conditions={"canny": torch.rand(1, 1, 4, 32, 32)}, condition_scales=None), ValueError,
     "scale of 'canny' is None"),
    (dict(conditions=["canny"]), TypeError, "give a dict"),
    (dict(condition_scales={"canny": 0.5}), ValueError, "give conditions"),
    (dict(style_scale=0.5), ValueError, "give style_image"),
    (dict(conditions={"canny": torch.rand(1, 1, 4, 32, 32)}, control_start=0.8, control_end=0.2),
     ValueError, "start < end"),
    (dict(style_image="painting.png"), TypeError, "style_image holds a str"),
    (dict(style_image=torch.zeros(3, 4, 4), style_scale=-1), ValueError, "style_scale=-1"),
    (dict(image=torch.full((3, 8, 8), 7.0)), ValueError, "image has values from 7 to 7"),
])
def test_error(pipe, arguments, error, message):
    with pytest.raises(error, match=message):
        pipe("a red circle", **FEW, **arguments)


def test_one_condition_for_several_videos(pipe):
    edges = {"canny": torch.rand(1, 1, 4, 32, 32)}
    each = {"canny": edges["canny"].repeat(2, 1, 1, 1, 1)}
    one, two = (pipe(["a red circle"] * 2, conditions=c, output_type="latent", **FEW,
                     generator=torch.Generator().manual_seed(0)).videos for c in (edges, each))
    assert torch.equal(one, two)


def test_conditions_need_no_text(pipe):
    edges = {"canny": torch.rand(1, 1, 4, 32, 32)}
    drawn = pipe("", conditions=edges, output_type="latent", guidance_scale=1.0, **FEW)
    assert drawn.videos.isfinite().all()
    with pytest.raises(ValueError, match="say what the video should show, or give conditions or a style"):
        pipe("", **FEW)


def test_each_video_has_the_style_of_its_picture(pipe):
    red, blue = (Image.new("RGB", (9, 9), colour) for colour in ("red", "blue"))
    noise = torch.randn(2, 4, 4, 4, 4)

    def draw(pictures, rows=slice(None), **more):
        return pipe(["a red circle"] * len(noise[rows]), style_image=pictures, latents=noise[rows],
                    output_type="latent", **FEW, **more).videos

    for more in ({}, dict(style_guidance=6.0)):
        both = draw([red, blue], **more)
        torch.testing.assert_close(both[:1], draw(red, slice(1), **more), rtol=0, atol=1e-4)
        torch.testing.assert_close(both[1:], draw(blue, slice(1, 2), **more), rtol=0, atol=1e-4)
        assert (draw(red, **more)[1] - both[1]).abs().max() > 1e-3


# A user's own files

def with_sound(path: Path, clip: torch.Tensor) -> Path:
    with av.open(str(path), "w") as file:
        video, sound = file.add_stream("libx264", rate=8), file.add_stream("aac", rate=8000)
        video.height, video.width, video.pix_fmt = *clip.shape[2:], "yuv420p"
        for frame in clip.permute(1, 2, 3, 0).numpy():
            file.mux(video.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        noise = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), "fltp", "mono")
        noise.sample_rate, noise.pts, noise.time_base = 8000, 0, Fraction(1, 8000)
        file.mux(sound.encode(noise))
        file.mux(video.encode())
        file.mux(sound.encode())
    return path


def test_videos_of_every_kind_and_bad_ones(pipe, tmp_path):
    folder, clip = tmp_path / "in", torch.randint(256, (3, 9, 48, 64), dtype=torch.uint8)
    folder.mkdir()
    with_sound(folder / "sound.mp4", clip)
    write_video(clip[:, :1], folder / "one.mp4")
    write_video(clip.repeat(1, 4, 1, 1), folder / "fast.mp4", fps=30)
    write_video(clip[:, :, :40, :16], folder / "narrow.gif")
    (folder / "cut.mp4").write_bytes((folder / "sound.mp4").read_bytes()[:900])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        done = edit_files(pipe, folder, "a red circle", tmp_path / "out", (4, 32, 32),
                          conditions=("canny", "image"), **FEW)
    frames = {name: edit.result.shape[2] for name, edit in done.edits.items()}
    assert frames == {"fast.mp4": 4, "narrow.gif": 4, "one.mp4": 1, "sound.mp4": 4}
    assert list(done.bad) == ["cut.mp4"] and any("cut.mp4" in str(w.message) for w in said)
    made = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"sound-edit.mp4", "sound-edit-beside.mp4", "sound-edit.jpg"} <= made
    assert not [name for name in made if name.startswith("cut")]


def test_a_sentence_a_video_and_a_picture(pipe, tmp_path):
    source = with_sound(tmp_path / "my.mp4", torch.randint(256, (3, 9, 48, 64), dtype=torch.uint8))
    drawn = []
    for colour in ("red", "blue"):
        done = edit_files(pipe, source, "a red circle", tmp_path / colour, (4, 32, 32),
                          conditions=("canny", "image"), style_image=Image.new("RGB", (20, 9), colour),
                          style_guidance=6.0, **FEW)
        drawn.append(done.edits["my.mp4"].result)
        assert (tmp_path / colour / "my-edit.mp4").stat().st_size > 0
    assert (drawn[0] - drawn[1]).abs().max() > 1e-3


def test_a_users_video_is_never_written_over(pipe, tmp_path):
    source = write_video(torch.randint(256, (3, 4, 32, 32), dtype=torch.uint8), tmp_path / "my.mp4")
    before = source.read_bytes()
    edit_files(pipe, source, "a red circle", tmp_path, (4, 32, 32), conditions="canny", **FEW)
    assert source.read_bytes() == before and (tmp_path / "my-edit.mp4").exists()
    source.rename(tmp_path / "other.mp4")
    write_video(torch.zeros(3, 4, 32, 32), tmp_path / "other-edit.mp4")
    with pytest.raises(ValueError, match="other-edit.mp4 would be replaced"):
        edit_files(pipe, tmp_path, "a red circle", tmp_path, (4, 32, 32), **FEW)


def test_results_of_an_earlier_run_are_not_edited(pipe, tmp_path, capsys):
    for name in ("one", "two"):
        write_video(torch.rand(3, 4, 32, 32), tmp_path / f"{name}.mp4")
    for _ in range(2):
        done = edit_files(pipe, tmp_path, "a red circle", tmp_path, (4, 32, 32), conditions="canny", **FEW)
        assert list(done.edits) == ["one.mp4", "two.mp4"]
        lines = [line.split(",")[0] for line in capsys.readouterr().out.splitlines()]
        assert lines == ["edit: 0/2", "edit: 1/2", "edit: 2/2"]


@pytest.mark.parametrize(("option", "value", "message"), [
    ("conditions", "scribble", "condition='scribble' is unknown"), ("height", "60", "height=60 is not a multiple of 8"),
    ("steps", "0", "steps=0"), ("style", "none.png", "none.png"), ("video", "none.mp4", "none.mp4"),
])
def test_wrong_arguments_are_found_before_the_model_is_loaded(tmp_path, capsys, option, value, message):
    video = write_video(torch.rand(3, 4, 32, 32), tmp_path / "my.mp4")
    given = dict(video=str(video), prompt="a star") | {option: value}
    with patch("versvideo.pipelines.loading.load_pipeline", side_effect=AssertionError("it was loaded")):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            run_cells(REPO / "nbs/32_edit.ipynb", [f"{name}={text}" for name, text in given.items()])
        more = [] if option == "video" else [f"--{option}", value]
        assert main(["edit", given["video"], given["prompt"], "-o", str(tmp_path / "out.mp4"), *more]) == 1
    assert message in capsys.readouterr().err


def test_a_file_without_video(pipe, tmp_path):
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as file:
        sound = file.add_stream("aac", rate=8000)
        noise = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), "fltp", "mono")
        noise.sample_rate, noise.pts, noise.time_base = 8000, 0, Fraction(1, 8000)
        file.mux(sound.encode(noise))
        file.mux(sound.encode())
    with pytest.raises(ValueError, match="no video in it"):
        edit_files(pipe, path, "a red circle", tmp_path, (4, 32, 32), **FEW)


def test_styles_whose_names_change_nothing_are_refused():
    "They cannot be asked for in times of what a name changes; the UNet here was never trained."
    with pytest.raises(ValueError, match="does not change where a caption names outline, gradient"):
        run_cells(REPO / "nbs/23_train_style.ipynb", ["stage=captions", "even=True"])
