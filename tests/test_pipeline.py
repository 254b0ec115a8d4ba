"""The pipeline as a user of the installed package meets it: tiny random models, every error."""

import json
import re
import shutil
import warnings
from functools import partial
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
from cells import run_cells
from diffusers import AutoencoderKL, DDIMScheduler, EulerDiscreteScheduler
from diffusers.callbacks import SDCFGCutoffCallback
from diffusers.utils import export_to_video
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from versvideo.media.video import read_video
from versvideo.models.saving import save_pipeline
from versvideo.models.sizes import SIZES
from versvideo.models.text import ClipSize, build_clip, split_clip
from versvideo.models.tokenizer import build_tokenizer, known_words
from versvideo.models.unet import VersVideoUNet
from versvideo.pipelines import loading as pipeline
from versvideo.pipelines.loading import find_pipeline, load_pipeline
from versvideo.pipelines.schedulers import SCHEDULERS, get_scheduler
from versvideo.pipelines.text_to_video import VersVideoPipeline

UNET_WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
TEXT_WEIGHTS = "text_encoder/model.safetensors"
WORDS = "a red blue circle star moving left right on navy black background"


def awake(unet):
    "Random weights in place of zeros: a new UNet predicts 0 whatever it is given."
    for p in unet.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.1)
    return unet


def build(**changes) -> VersVideoPipeline:
    torch.manual_seed(0)
    tokenizer = build_tokenizer(WORDS.split(), max_length=12)
    tower = ClipSize(width=128, text_layers=1, vision_layers=1, heads=2, image=16, patch=8,
                     projection=16)
    parts = dict(
        tokenizer=tokenizer,
        text_encoder=split_clip(build_clip(tokenizer, tower))[0],
        vae=AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
            block_out_channels=(8, 8, 8, 8), norm_num_groups=4).eval(),
        unet=awake(VersVideoUNet(**SIZES["smoke"].unet, sample_size=(4, 2, 2)).eval()),
        scheduler=DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                                clip_sample=False, set_alpha_to_one=False, steps_offset=1))
    pipe = VersVideoPipeline(**(parts | changes))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe():
    return build()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_pipeline(build(), tmp_path_factory.mktemp("saved") / "tiny")


@pytest.fixture
def copied(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(b=1, t=4, h=2, w=2, seed=0):
    return torch.randn(b, 4, t, h, w, generator=seeded(seed))


def latents_of(pipe, prompt="a red circle", **changes):
    return pipe(prompt, **(dict(latents=noise(), num_inference_steps=3, output_type="latent")
                           | changes)).videos


def close(one, other):
    "Equal but for the order of sums; another prompt or seed changes these latents by 0.3 or more."
    torch.testing.assert_close(one, other, rtol=0, atol=5e-3)


def same_weights(one, other):
    pairs = [(getattr(p, part).state_dict() for p in (one, other))
             for part in ("unet", "vae", "text_encoder")]
    return all(a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a) for a, b in pairs)


# What comes out

def test_defaults_are_the_trained_size(pipe):
    videos = pipe("a red circle", num_inference_steps=2).videos
    assert videos.shape == (1, 3, 4, 16, 16) and videos.dtype == torch.float32
    assert 0 <= videos.min() and videos.max() <= 1


@pytest.mark.parametrize(("frames", "height", "width"), [(1, 16, 16), (3, 8, 24), (6, 40, 72)])
def test_other_sizes(pipe, frames, height, width):
    videos = pipe("a red circle", num_frames=frames, height=height, width=width,
                  num_inference_steps=2).videos
    assert videos.shape == (1, 3, frames, height, width)


def test_output_types_hold_the_same_video(pipe):
    def out(kind):
        return pipe("a red circle", latents=noise(), num_inference_steps=2, output_type=kind).videos

    videos, array, frames, latents = map(out, ("pt", "np", "pil", "latent"))
    assert array.shape == (1, 4, 16, 16, 3) and latents.shape == (1, 4, 4, 2, 2)
    np.testing.assert_allclose(array, videos.permute(0, 2, 3, 4, 1).numpy(), atol=1e-6)
    assert len(frames) == 1 and len(frames[0]) == 4 and isinstance(frames[0][0], Image.Image)
    assert abs(np.array(frames[0][3]) / 255 - array[0, 3]).max() <= 0.51 / 255


@pytest.mark.parametrize("kind", [None, "np", "pil"])
def test_diffusers_writes_the_frames(pipe, tmp_path, kind):
    out = pipe("a red circle", num_frames=3, height=48, width=64, latents=noise(t=3, h=6, w=8),
               num_inference_steps=2, output_type=kind)
    file = export_to_video(out.frames[0], str(tmp_path / "frames.mp4"), quality=9)  # noise compresses badly
    again = read_video(Path(file))
    videos = pipe("a red circle", num_frames=3, height=48, width=64, latents=noise(t=3, h=6, w=8),
                  num_inference_steps=2).videos
    assert again.shape == (3, 3, 48, 64) and (again / 255 - videos[0]).abs().mean() < 0.05


def test_frames_have_the_layout_of_diffusers(pipe):
    def out(kind):
        return pipe("a red circle", latents=noise(), num_inference_steps=2, output_type=kind)

    assert out("pt").frames.shape == (1, 4, 3, 16, 16) and out("np").frames.shape == (1, 4, 16, 16, 3)
    assert [len(video) for video in out("pil").frames] == [len(video) for video in out(None).frames] == [4]
    assert isinstance(out(None).videos, torch.Tensor) and isinstance(out(None).frames[0][0], Image.Image)


def test_tuple(pipe):
    both = [pipe("a red circle", latents=noise(), num_inference_steps=2, return_dict=r)
            for r in (True, False)]
    assert isinstance(both[1], tuple) and torch.equal(both[0].videos, both[1][0])


def test_chunks_do_not_matter(pipe):
    one, all_ = (pipe("a red circle", latents=noise(), num_inference_steps=2, decode_chunk_size=n)
                 .videos for n in (1, 16))
    torch.testing.assert_close(one, all_, rtol=0, atol=1e-5)


# What decides it

def test_seed(pipe):
    first, again, other = (pipe("a red circle", num_inference_steps=3, eta=1.0,
                                generator=seeded(s)).videos for s in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_a_generator_for_each_video(pipe):
    go = dict(num_inference_steps=3, eta=1.0, output_type="latent")
    three = pipe(["a red circle"] * 3, generator=[seeded(s) for s in (5, 6, 5)], **go).videos
    alone = pipe("a red circle", generator=[seeded(6)], **go).videos
    close(three[0], three[2])
    close(three[1:2], alone)


def test_batch_equals_single_calls(pipe):
    start, prompts = noise(2), ["a red circle", "a blue star on black"]
    both = latents_of(pipe, prompts, latents=start, negative_prompt=["", "red"])
    alone = [latents_of(pipe, p, latents=start[i:i + 1], negative_prompt=n)
             for i, (p, n) in enumerate(zip(prompts, ["", "red"], strict=True))]
    close(both, torch.cat(alone))


def test_videos_of_a_prompt_follow_each_other(pipe):
    start = noise(4)
    four = latents_of(pipe, ["a red circle", "a blue star"], latents=start, num_videos_per_prompt=2)
    second = latents_of(pipe, "a red circle", latents=start[1:2])
    third = latents_of(pipe, "a blue star", latents=start[2:3])
    close(four[1:3], torch.cat([second, third]))


def test_guidance(pipe):
    plain = latents_of(pipe, guidance_scale=1.0)
    assert torch.equal(plain, latents_of(pipe, guidance_scale=0.0, negative_prompt="a star"))
    assert not torch.equal(plain, latents_of(pipe))
    same = latents_of(pipe, negative_prompt="a red circle")
    close(same, plain)
    assert not torch.equal(latents_of(pipe), latents_of(pipe, negative_prompt="a star"))
    assert pipe.guidance_scale == 4.0 and pipe.do_classifier_free_guidance


def test_embeddings_stand_for_texts(pipe):
    pipe._guidance_scale = 4.0
    told, avoided = pipe.encode_prompt("a red circle", "a star")
    by_text = latents_of(pipe, negative_prompt="a star")
    by_embeds = latents_of(pipe, None, prompt_embeds=told, negative_prompt_embeds=avoided)
    close(by_embeds, by_text)
    half = latents_of(pipe, None, prompt_embeds=told)
    close(half, latents_of(pipe))


@pytest.mark.parametrize("kind", [CLIPTextModel, CLIPTextModelWithProjection])
def test_both_text_encoders(pipe, kind, tmp_path):
    pipe.text_encoder.save_pretrained(tmp_path)
    other = build(text_encoder=kind.from_pretrained(tmp_path))
    close(latents_of(other), latents_of(pipe))


# Schedulers

@pytest.mark.parametrize("name", SCHEDULERS)
def test_scheduler(pipe, name):
    try:
        pipe.scheduler = get_scheduler(name, pipe.scheduler.config)
    except ImportError as error:
        pytest.skip(str(error).strip().splitlines()[0])
    first, again = (pipe("a red circle", num_inference_steps=4, generator=seeded()).videos
                    for _ in range(2))
    assert torch.isfinite(first).all()
    if name != "DPMSolverSDE":
        assert torch.equal(first, again)
    assert pipe.num_timesteps == len(pipe.scheduler.timesteps) >= 4


@pytest.mark.parametrize("name", SCHEDULERS)
def test_few_steps_work_or_are_refused(pipe, name):
    try:
        pipe.scheduler = get_scheduler(name, pipe.scheduler.config)
    except ImportError as error:
        pytest.skip(str(error).strip().splitlines()[0])
    for steps in (1, 2, 3):
        try:
            videos = pipe("a red circle", num_inference_steps=steps, generator=seeded()).videos
        except ValueError as error:
            assert name == "PNDM" and f"num_inference_steps={steps} does not suit" in str(error)
        else:
            assert torch.isfinite(videos).all()


def test_ddim_by_hand(pipe):
    "Two steps written out: equation (1) solved for x, then taken to the next noise level."
    latents = latents_of(pipe, guidance_scale=1.0, num_inference_steps=2)
    text, _ = pipe.encode_prompt("a red circle")
    ahead = pipe.scheduler.alphas_cumprod
    z = noise()
    for step, following in ((501, ahead[1]), (1, ahead[0])):
        with torch.no_grad():
            eps = pipe.unet(z, step, text).sample
        x = (z - (1 - ahead[step]).sqrt() * eps) / ahead[step].sqrt()
        z = following.sqrt() * x + (1 - following).sqrt() * eps
    close(latents, z)


# Callbacks

def test_callback_changes_latents(pipe):
    seen = []

    def halve(pipe, i, t_idx, tensors):
        seen.append((i, int(t_idx), sorted(tensors)))
        return {"latents": tensors["latents"] / 2}

    halved = latents_of(pipe, num_inference_steps=1, callback_on_step_end=halve)
    assert seen == [(0, 1, ["latents"])]
    torch.testing.assert_close(halved * 2, latents_of(pipe, num_inference_steps=1))


def test_callback_gets_what_it_asks_for(pipe):
    shapes = {}

    def look(pipe, i, t_idx, tensors):
        shapes.update({name: tuple(tensor.shape) for name, tensor in tensors.items()})

    names = ["latents", "prompt_embeds", "negative_prompt_embeds"]
    looked = latents_of(pipe, callback_on_step_end=look, callback_on_step_end_tensor_inputs=names)
    assert shapes == {"latents": (1, 4, 4, 2, 2), "prompt_embeds": (1, 12, 128),
                      "negative_prompt_embeds": (1, 12, 128)}
    assert torch.equal(looked, latents_of(pipe))


def test_callback_may_return_more_than_the_walk_uses(pipe):
    extra = latents_of(pipe, callback_on_step_end=lambda *args: {"frames": 3})
    assert torch.equal(extra, latents_of(pipe))


def test_official_callback_switches_guidance_off(pipe):
    off = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=0)
    cut = latents_of(pipe, callback_on_step_end=off)
    assert pipe.guidance_scale == 0.0 and not torch.equal(cut, latents_of(pipe))


def test_interrupt(pipe):
    steps = []

    def stop(pipe, i, t_idx, tensors):
        steps.append(tensors["latents"])
        pipe._interrupt = i == 1

    stopped = latents_of(pipe, num_inference_steps=5, callback_on_step_end=stop)
    assert len(steps) == 2 and torch.equal(stopped, steps[-1])
    assert not torch.equal(latents_of(pipe, num_inference_steps=5), stopped)


# Wrong arguments

@pytest.mark.parametrize(("arguments", "error", "message"), [
    (dict(prompt=""), ValueError, "prompt='' is empty"),
    (dict(prompt="  "), ValueError, "is empty: say what"),
    (dict(prompt=[]), ValueError, r"prompt=\[\] is empty"),
    (dict(prompt=["a star", ""]), ValueError, "is empty"),
    (dict(prompt=None), ValueError, "neither of prompt and prompt_embeds"),
    (dict(prompt_embeds=torch.zeros(1, 12, 128)), ValueError, "both of prompt and prompt_embeds"),
    (dict(prompt=3), TypeError, "prompt=3: give a text"),
    (dict(prompt=["a", 3]), TypeError, "give a text or a list of texts"),
    (dict(negative_prompt=3), TypeError, "negative_prompt=3"),
    (dict(negative_prompt=["a", "b"]), ValueError, "2 texts for 1 prompts"),
    (dict(negative_prompt_embeds=torch.zeros(2, 12, 128)), ValueError, r"shape \(2, 12, 128\)"),
    (dict(negative_prompt="a", negative_prompt_embeds=torch.zeros(1, 12, 128)), ValueError,
     "both of negative_prompt and negative_prompt_embeds"),
    (dict(prompt=None, prompt_embeds=torch.zeros(12, 128)), ValueError, r"\(12, 128\).*d=128"),
    (dict(prompt=None, prompt_embeds=torch.zeros(1, 12, 64)), ValueError, r"64\).*b n d.*d=128"),
    (dict(num_frames=0), ValueError, "num_frames=0: give a whole number of at least 1"),
    (dict(num_frames=2.5), ValueError, "num_frames=2.5"),
    (dict(height=60), ValueError, "height=60 is not a multiple of 8: use 64"),
    (dict(width=1), ValueError, "width=1 is not a multiple of 8: use 8"),
    (dict(width=-8), ValueError, "width=-8: give a whole number"),
    (dict(num_inference_steps=0), ValueError, "num_inference_steps=0"),
    (dict(num_videos_per_prompt=0), ValueError, "num_videos_per_prompt=0"),
    (dict(decode_chunk_size=0), ValueError, "decode_chunk_size=0"),
    (dict(latents=noise(t=5)), ValueError, r"of shape \(1, 4, 5, 2, 2\).*\(1, 4, 4, 2, 2\)"),
    (dict(generator=[seeded()] * 2), ValueError, "a list of 2 for 1 videos"),
    (dict(eta=5), ValueError, "eta=5: give a number from 0 to 1"),
    (dict(eta=None), ValueError, "eta=None: give a number"),
    (dict(guidance_scale=float("nan")), ValueError, "guidance_scale=nan: give a number"),
    (dict(guidance_scale=float("inf")), ValueError, "guidance_scale=inf: give a number"),
    (dict(guidance_scale="4"), ValueError, "guidance_scale='4': give a number"),
    (dict(generator=42), TypeError, r"generator=42: give torch.Generator\(\).manual_seed"),
    (dict(generator=[42]), TypeError, r"generator=\[42\]: give torch.Generator"),
    (dict(latents=np.zeros((1, 4, 4, 2, 2))), TypeError, "latents is a ndarray"),
    (dict(num_inference_steps=1000), ValueError, "num_inference_steps=1000 does not suit DDIMSch"),
    (dict(num_inference_steps=1001), ValueError, "num_inference_steps=1001 does not suit DDIMSch"),
    (dict(output_type="gif"), ValueError, "output_type='gif' is unknown: choose one of pt, np"),
    (dict(callback_on_step_end_tensor_inputs=["eps"]), ValueError, "tensor_inputs='eps' is unkn"),
    (dict(num_frames=10**8), MemoryError, r"num_frames=100000000, .* needs .* GiB are free: give fewer frames"),
    (dict(height=8 * 10**6), MemoryError, r"height=8000000, .* GiB are free: .* a smaller height"),
])
def test_error(pipe, monkeypatch, arguments, error, message):
    monkeypatch.setattr(pipe.unet, "forward", None)
    with pytest.raises(error, match=message):
        pipe(**({"prompt": "a red circle"} | arguments))


def test_unknown_words_are_named_once_and_the_video_is_made(pipe):
    with pytest.warns(UserWarning) as caught:
        videos = pipe(["a crimson circle", "a crimson zebra"], num_inference_steps=1).videos
    assert len(caught) == 1 and len(videos) == 2
    assert re.search("doesn't know 'crimson'.*, 'zebra'", str(caught[0].message))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe("A red circle, moving left.", num_inference_steps=1)


def test_longer_than_trained_is_made_with_a_warning(pipe):
    frames = pipe.trained_size[0]
    with pytest.warns(UserWarning, match=f"num_frames={frames + 1} is more than the {frames} that") as caught:
        assert pipe("a red circle", num_frames=frames + 1, num_inference_steps=1).videos.shape[2] == frames + 1
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe("a red circle", num_frames=frames - 1, num_inference_steps=1)


def test_words_that_the_unet_never_saw_are_unknown_too(tmp_path):
    pipe = build(words="a red circle moving")
    again = load_pipeline(save_pipeline(pipe, tmp_path / "saved"), device="cpu")
    for model in (pipe, again):
        with pytest.warns(UserWarning, match="doesn't know 'left'$"):
            model("a red circle moving left", num_inference_steps=1)
    embedded = load_pipeline("XS", device="cpu")
    assert "pixelated" in known_words(embedded.tokenizer)
    with pytest.warns(UserWarning, match="doesn't know 'pixelated'"):
        embedded.encode_prompt("a pixelated red circle")


def test_prompt_without_a_word_is_made_with_a_warning(pipe):
    with pytest.warns(UserWarning, match=r"reads no word in '\?!'"):
        unread = latents_of(pipe, prompt="?!", latents=noise())
    with pytest.warns(UserWarning, match="reads no word"):
        close(latents_of(pipe, prompt="...", latents=noise()), unread)


def test_long_prompt_is_cut_with_a_warning(pipe):
    with pytest.warns(UserWarning, match="reads 12 tokens"):
        pipe("a red circle " * 9, num_inference_steps=1)


# Precision and memory

def test_bfloat16(pipe):
    exact = pipe("a red circle", latents=noise(), num_inference_steps=2).videos
    pipe.to(torch.bfloat16)
    rough = pipe("a red circle", latents=noise(), num_inference_steps=2).videos
    assert rough.dtype == torch.float32 and torch.isfinite(rough).all()
    assert (rough - exact).abs().mean() < 0.05


def test_offloading_knows_every_model(pipe):
    models = {n for n, m in pipe.components.items() if isinstance(m, torch.nn.Module)}
    order = set(pipe.model_cpu_offload_seq.split("->"))
    assert models <= order <= set(pipe.components)   # beside the ControlNet, which each step needs
    assert set(pipe.components) - order == {"controlnet", "tokenizer", "scheduler"}


def test_too_large_a_model_is_refused_before_loading(saved, monkeypatch):
    monkeypatch.setattr("versvideo.core.machine.free_memory", lambda device: 1000)
    monkeypatch.setattr(VersVideoPipeline, "from_pretrained", None)
    with pytest.raises(MemoryError, match="dtype=torch.float16 or a larger machine"):
        load_pipeline(saved, device="cpu")


# Saving and loading

def test_save_pretrained_round_trip(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["unet"] == ["versvideo.models.unet", "VersVideoUNet"]
    again = VersVideoPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert same_weights(again, pipe)
    close(latents_of(again), latents_of(pipe))
    assert not list(tmp_path.rglob("*.bin"))


def test_half_precision_on_disk_single_in_memory(saved):
    for file in saved.rglob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            assert {weights.get_tensor(name).dtype for name in weights.keys()} == {torch.float16}
    loaded = load_pipeline(saved, device="cpu")
    models = (loaded.unet, loaded.vae, loaded.text_encoder)
    assert {p.dtype for m in models for p in m.parameters()} == {torch.float32}
    assert not any(m.training for m in models)
    loaded.set_progress_bar_config(disable=True)
    go = dict(latents=noise(), num_inference_steps=2)
    error = (loaded("a red circle", **go).videos - build()("a red circle", **go).videos).abs()
    assert error.mean() < 1e-2


def test_merged_experts_are_saved_merged(pipe, tmp_path):
    pipe.unet.merge_experts()
    assert type(pipe.unet).from_config(pipe.unet.config).middle.spatial.experts.experts == 1
    again = load_pipeline(save_pipeline(pipe, tmp_path / "merged", torch.float32), device="cpu")
    assert same_weights(again, pipe)
    again.set_progress_bar_config(disable=True)
    close(latents_of(again), latents_of(pipe))


def test_saving_keeps_what_lies_beside_and_replaces_the_rest(copied):
    (copied / "README.md").write_text("card")
    (copied / "image_encoder").mkdir()
    (copied / "image_encoder" / "config.json").write_text("{}")
    changed = build()
    torch.nn.init.zeros_(changed.unet.conv_in.bias)
    save_pipeline(changed, copied, torch.float32)
    assert (copied / "README.md").read_text() == "card"
    assert (copied / "image_encoder" / "config.json").exists()
    assert load_file(copied / UNET_WEIGHTS)["conv_in.bias"].abs().max() == 0
    assert [p.name for p in copied.parent.iterdir()] == ["copy"]


def test_weights_that_do_not_fit_leave_the_old_ones(pipe, copied):
    before = (copied / UNET_WEIGHTS).read_bytes()
    torch.nn.init.constant_(pipe.unet.conv_in.bias, 1e5)
    with pytest.raises(ValueError, match="conv_in.bias in .* does not fit torch.float16"):
        save_pipeline(pipe, copied)
    assert (copied / UNET_WEIGHTS).read_bytes() == before
    assert [p.name for p in copied.parent.iterdir()] == ["copy"]


def test_loading_is_quiet(saved, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_pipeline(saved, scheduler="EulerDiscrete", device="cpu")
    shown = capsys.readouterr()
    assert shown.out + shown.err == ""


@pytest.mark.parametrize("scheduler", ["EulerDiscrete", "EulerDiscreteScheduler",
                                       EulerDiscreteScheduler()])
def test_scheduler_of_a_loaded_pipeline(saved, scheduler):
    loaded = load_pipeline(saved, scheduler=scheduler, device="cpu")
    assert type(loaded.scheduler) is EulerDiscreteScheduler
    if isinstance(scheduler, str):
        assert loaded.scheduler.config.beta_end == 0.012


@pytest.mark.parametrize(("scheduler", "error", "message"), [
    ("Eular", ValueError, "scheduler='Eular' is unknown: choose one of DDIM, DDPM"),
    ("ddim", ValueError, "did you mean 'DDIM'"),
    (7, TypeError, "scheduler=int"),
])
def test_unknown_scheduler(saved, scheduler, error, message):
    with pytest.raises(error, match=message):
        load_pipeline(saved, scheduler=scheduler, device="cpu")


@pytest.mark.parametrize("file", [
    "model_index.json", "unet/config.json", UNET_WEIGHTS, TEXT_WEIGHTS,
    "vae/diffusion_pytorch_model.safetensors", "tokenizer/tokenizer_config.json",
    "tokenizer/tokenizer.json", "scheduler/scheduler_config.json"])
def test_missing_file(copied, file):
    (copied / file).unlink()
    with pytest.raises(FileNotFoundError, match=f"{file} is missing.*: copy or download the folder again"):
        load_pipeline(copied)


@pytest.mark.parametrize("file", [UNET_WEIGHTS, TEXT_WEIGHTS])
@pytest.mark.parametrize("keep", [0, 5, 0.5, 0.999])
def test_truncated_weights(copied, file, keep):
    content = (copied / file).read_bytes()
    kept = content[:keep if isinstance(keep, int) else int(keep * len(content))]
    (copied / file).write_bytes(kept)
    message = rf"{file} \({len(kept)} bytes\) is truncated or damaged.*copy or download"
    with pytest.raises(ValueError, match=message):
        load_pipeline(copied)


@pytest.mark.parametrize("file", ["unet/config.json", "tokenizer/tokenizer.json"])
def test_damaged_json(copied, file):
    (copied / file).write_text('{"half": ')
    with pytest.raises(ValueError, match=f"{file} is not valid JSON"):
        load_pipeline(copied)


@pytest.mark.parametrize("text", ["{}", "[]", "3", '"unet"'])
@pytest.mark.parametrize("file", ["model_index.json", "unet/config.json",
                                  "scheduler/scheduler_config.json"])
def test_json_without_settings(copied, file, text):
    (copied / file).write_text(text)
    with pytest.raises(ValueError, match=f"{file} holds no settings: copy or download"):
        load_pipeline(copied)


def test_saved_pipeline_does_not_say_where_its_parts_came_from(saved, tmp_path):
    for config in save_pipeline(load_pipeline(saved), tmp_path / "again").glob("*/config.json"):
        assert "_name_or_path" not in json.loads(config.read_text())


def test_weights_of_another_shape(copied):
    weights = load_file(copied / UNET_WEIGHTS)
    weights["conv_in.bias"] = torch.zeros(3)
    save_file(weights, copied / UNET_WEIGHTS, {"format": "pt"})
    with pytest.raises(ValueError, match="conv_in.bias"):
        load_pipeline(copied, device="cpu")


@pytest.mark.parametrize(("file", "name"), [
    (UNET_WEIGHTS, "conv_in.bias"), (TEXT_WEIGHTS, "text_model.embeddings.position_embedding.weight")])
def test_weights_that_lack_a_tensor(copied, file, name):
    weights = load_file(copied / file)
    del weights[name]
    save_file(weights, copied / file, {"format": "pt"})
    with pytest.raises(ValueError, match=f"{file.split('/')[0]} lacks {name}"):
        load_pipeline(copied, device="cpu")


def test_pickled_weights_are_not_read(copied):
    weights = load_file(copied / UNET_WEIGHTS)
    (copied / UNET_WEIGHTS).unlink()
    torch.save(weights, copied / "unet/diffusion_pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=f"{UNET_WEIGHTS} is missing"):
        load_pipeline(copied)


@pytest.mark.parametrize(("name", "error", "message"), [
    ("H", FileNotFoundError, "comes without weights.*20_train_unet size=H"),
    ("Q", ValueError, r"='Q' is unknown: choose one of smoke, XS, S, SD15, L, H"),
    ("xs", ValueError, "did you mean 'XS'"),
    ("results/none/weights", FileNotFoundError, "there is no folder results/none/weights"),
    ("", ValueError, "='' is unknown: choose one of smoke, XS"),
])
def test_unknown_size(name, error, message):
    with pytest.raises(error, match=message):
        load_pipeline(name)


def test_folder_from_here_or_from_the_repository(monkeypatch, tmp_path):
    (tmp_path / "nbs").mkdir()
    (tmp_path / "settings.ini").touch()
    (tmp_path / "results").mkdir()
    monkeypatch.chdir(tmp_path / "nbs")
    assert find_pipeline("results") == tmp_path / "results"
    (tmp_path / "nbs/results").mkdir()
    assert find_pipeline("results") == Path("results")


def test_precision_by_name_is_refused(saved):
    with pytest.raises(TypeError, match=r"dtype='float16' is no torch dtype: give torch.float16"):
        load_pipeline(saved, dtype="float16")


def test_an_unknown_device_is_refused_in_one_line(saved):
    with pytest.raises(ValueError) as error:
        load_pipeline(saved, device="gpu")
    assert str(error.value).startswith("device='gpu' is not on this machine: give ") and len(str(error.value)) < 80


def test_hub(saved, monkeypatch):
    asked = []

    def download(name, **options):
        asked.append((name, options))
        return saved

    monkeypatch.setattr(VersVideoPipeline, "download", download)
    assert isinstance(load_pipeline("owner/name", device="cpu"), VersVideoPipeline)
    assert asked == [("owner/name", {"use_safetensors": True})]


def test_hub_out_of_reach(monkeypatch):
    def download(name, **options):
        raise OSError("no network")

    monkeypatch.setattr(VersVideoPipeline, "download", download)
    with pytest.raises(FileNotFoundError, match=r"owner/name is no folder here .*\(no network\)"):
        load_pipeline("owner/name")


# The embedded size

def test_embedded_size():
    loaded = load_pipeline("XS", device="cpu")
    size = SIZES["XS"]
    assert tuple(loaded.unet.config.sample_size) == size.latent()
    loaded.set_progress_bar_config(disable=True)
    videos = loaded("a red circle moving left on a navy background", num_inference_steps=2).videos
    assert videos.shape == (1, 3, size.frames, size.height, size.width)


def test_embedded_weights_are_small_and_half():
    folder = Path(str(resources.files("versvideo"))) / "weights" / "XS"
    files = list(folder.rglob("*.safetensors"))
    assert {f.parent.name for f in files} == {"unet", "vae", "text_encoder", "image_encoder", "image_vae",
                                              "classifier", "controlnet", "style_adapter", "student"}
    assert sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) <= 32e6
    for file in files:
        with safe_open(file, "pt") as weights:
            assert {weights.get_tensor(name).dtype for name in weights.keys()} == {torch.float16}
    assert (folder / "README.md").read_text()


# nbs/30_generate.ipynb, cell by cell in this process

generate = partial(run_cells, "30_generate.ipynb")


def test_notebook_writes_both_files(saved, tmp_path, capsys):
    generate(size=str(saved), out=str(tmp_path / "new"), name="star", prompt="a blue star", steps=5)
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["star.gif", "star.mp4"]
    shown = capsys.readouterr().out
    assert "star.mp4" in shown and "star.gif" in shown and "step 5 of 5" in shown
    with Image.open(tmp_path / "new" / "star.gif") as gif:
        assert gif.size == (256, 256)


def test_notebook_leaves_nothing_in_the_repository_by_default(saved, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.mkdtemp", lambda **options: str(tmp_path))
    generate(size=str(saved), steps=1, frames=1, width=24)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["generate.gif", "generate.mp4"]


@pytest.mark.parametrize(("parameters", "error", "message"), [
    (dict(prompt=" "), ValueError, "prompt=' ' is empty"),
    (dict(frames=-1), ValueError, "num_frames=-1"),
    (dict(height=20), ValueError, "height=20 is not a multiple of 8"),
    (dict(steps=-1), ValueError, "num_inference_steps=-1"),
    (dict(scheduler="DDIN"), ValueError, "did you mean 'DDIM'"),
    (dict(size="Q"), ValueError, "'Q' is unknown"),
    (dict(size="L"), FileNotFoundError, "20_train_unet size=L"),
    (dict(size=""), ValueError, "='' is unknown"),
    (dict(name=""), ValueError, "name is empty"),
])
def test_notebook_error(saved, parameters, error, message, tmp_path):
    with pytest.raises(error, match=message):
        generate(**({"size": str(saved), "out": str(tmp_path)} | parameters))
    assert list(tmp_path.iterdir()) == []


def test_notebook_needs_a_folder_it_can_write(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "load_pipeline", None)
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="choose another folder"):
        generate(size=str(saved), out=str(tmp_path / "file"))
    with pytest.raises(PermissionError, match="choose another folder"):
        generate(size=str(saved), out="/proc/versvideo")
