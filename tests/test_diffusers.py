"""The pipeline at home in diffusers: its folders, its arguments and its habits, with tiny random models."""

import json
import pickle
import re
import shutil
import subprocess
import sys
import warnings
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    AsymmetricAutoencoderKL,
    ConfigMixin,
    DDIMScheduler,
    DiffusionPipeline,
    ModelMixin,
    StableDiffusionPipeline,
)
from diffusers.configuration_utils import register_to_config
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import retrieve_timesteps
from huggingface_hub import ModelCard
from test_pipeline import TEXT_WEIGHTS, UNET_WEIGHTS, WORDS, build, close, latents_of, noise, same_weights

from versvideo.core.files import WEIGHTS
from versvideo.models.controlnet import VersVideoControlNet
from versvideo.models.image_vae import build_vae
from versvideo.models.pretrained import load_init
from versvideo.models.saving import check_saved, save_pipeline
from versvideo.models.style import StyleAdapter
from versvideo.models.text import ClipSize, build_clip, split_clip
from versvideo.models.tokenizer import build_tokenizer
from versvideo.models.unet import UNetOutput, VersVideoUNet
from versvideo.models.vae import TCMVAE
from versvideo.pipelines import saved as saved_pipelines
from versvideo.pipelines.edit import dry_run
from versvideo.pipelines.loading import load_pipeline
from versvideo.pipelines.schedulers import get_scheduler
from versvideo.pipelines.text_to_video import VersVideoPipeline
from versvideo.trainers.loading import load_trained


@pytest.fixture
def pipe():
    return build()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return save_pipeline(build(), tmp_path_factory.mktemp("whole") / "tiny", torch.float32)


@pytest.fixture
def copied(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "copy")


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


# The same parts in another pipeline

def test_from_pipe_takes_all_parts(pipe):
    again = quiet(VersVideoPipeline.from_pipe(pipe))
    assert again.components == pipe.components and again.config.words == pipe.config.words
    close(latents_of(again), latents_of(pipe))


def test_from_pipe_adds_and_drops_parts(pipe):
    control = VersVideoControlNet.from_unet(pipe.unet, dict(canny=1), adapter_channels=(4, 8, 8, 8))
    more = quiet(VersVideoPipeline.from_pipe(pipe, controlnet=control))
    assert more.controlnet is control and more.unet is pipe.unet and pipe.controlnet is None
    edges = {"canny": torch.rand(1, 1, 4, 16, 16)}
    assert latents_of(more, conditions=edges).shape == (1, 4, 4, 2, 2)
    assert VersVideoPipeline.from_pipe(more, controlnet=None).controlnet is None


def test_from_pipe_keeps_the_precision(pipe):
    pipe.unet.to(torch.bfloat16)
    again = VersVideoPipeline.from_pipe(pipe)
    assert (again.unet.dtype, again.vae.dtype) == (torch.bfloat16, torch.float32)
    assert again.unet is pipe.unet and pipe.unet.dtype == torch.bfloat16
    assert VersVideoPipeline.from_pipe(pipe, dtype=torch.float32).unet.dtype == torch.float32


# Folders

def test_a_class_of_a_script_is_saved_as_the_one_it_inherits_from(pipe, tmp_path):
    mine = type("Mine", (VersVideoPipeline,), dict(__module__="__main__"))(**pipe.components)
    mine.save_pretrained(tmp_path / "mine")
    assert "import VersVideoPipeline " in (tmp_path / "mine/pipeline.py").read_text()
    opened = quiet(DiffusionPipeline.from_pretrained(tmp_path / "mine", trust_remote_code=True))
    assert type(opened).__name__ == "VersVideoPipeline"


@pytest.mark.parametrize("name", ["/no/such/folder", "./none", "a/b/c"])
def test_a_folder_that_is_not_there(name):
    with pytest.raises(FileNotFoundError, match=f"there is no folder {name}"):
        VersVideoPipeline.from_pretrained(name)


def test_a_fresh_process_opens_folders_with_diffusers_alone(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "tiny")
    torch.save(noise(), tmp_path / "noise.pt")
    code = f"""
import sys, torch
from diffusers import DiffusionPipeline
assert not [name for name in sys.modules if name.startswith("versvideo")]
tiny, embedded = (DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
                  for folder in ({str(tmp_path / "tiny")!r}, {str(WEIGHTS / "XS")!r}))
print(*(f"{{type(p).__module__}}.{{type(p).__name__}}" for p in (tiny, embedded)))
print(*sorted(name for name, part in embedded.components.items() if part is not None))
start = torch.load({str(tmp_path / "noise.pt")!r})
out = tiny("a red circle", latents=start, num_inference_steps=3, output_type="latent")
torch.save(out.videos, {str(tmp_path / "latents.pt")!r})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    kinds, parts = done.stdout.splitlines()
    assert kinds.split() == ["versvideo.pipelines.text_to_video.VersVideoPipeline"] * 2
    assert {"controlnet", "style_adapter", "image_encoder"} < set(parts.split())
    close(torch.load(tmp_path / "latents.pt"), latents_of(pipe))


def test_diffusers_opens_what_save_pipeline_writes(whole, pipe):
    assert len((whole / "pipeline.py").read_text().splitlines()) == 3
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        DiffusionPipeline.from_pretrained(whole)
    again = DiffusionPipeline.from_pretrained(whole, trust_remote_code=True)
    assert type(again) is VersVideoPipeline and same_weights(again, pipe)


def test_our_own_class_runs_no_code_of_a_folder(copied, pipe):
    (copied / "pipeline.py").write_text("raise SystemExit('run')")
    assert same_weights(VersVideoPipeline.from_pretrained(copied), pipe)
    assert same_weights(load_pipeline(copied, device="cpu"), pipe)


def test_a_hub_id_is_downloaded_without_pickles(whole, pipe, monkeypatch):
    asked = {}

    def download(name, **options):
        asked.update(options, name=name)
        return str(whole)

    monkeypatch.setattr(saved_pipelines, "snapshot_download", download)
    assert same_weights(VersVideoPipeline.from_pretrained("owner/name", revision="v1"), pipe)
    assert asked.pop("ignore_patterns") == saved_pipelines.PICKLED and "*.bin" in saved_pipelines.PICKLED
    assert asked == dict(name="owner/name", revision="v1")


def test_a_saved_pipeline_has_a_card_for_the_hub(whole, copied):
    card = ModelCard.load(whole / "README.md")
    assert card.data.library_name == "diffusers" and card.data.pipeline_tag == "text-to-video"
    assert card.data.license == "unknown" and "text-to-video" in card.data.tags
    assert "4 frames of 16×16 pixels" in card.text and "`epsilon`" in card.text and "load_pipeline(" in card.text
    (copied / "README.md").write_text("mine")
    save_pipeline(build(), copied)
    assert (copied / "README.md").read_text() == "mine"


def test_the_embedded_card_has_front_matter():
    card = ModelCard.load(WEIGHTS / "XS" / "README.md")
    assert (card.data.library_name, card.data.pipeline_tag, card.data.license) == (
        "diffusers", "text-to-video", "apache-2.0")
    written = saved_pipelines.OPENER.format(module="versvideo.pipelines.text_to_video", kind="VersVideoPipeline")
    assert (WEIGHTS / "XS" / "pipeline.py").read_text() == written


# Precision

@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
@pytest.mark.filterwarnings("ignore:`torch_dtype` is deprecated:FutureWarning")
def test_both_names_of_the_precision(whole, tmp_path, name):
    half = {name: torch.bfloat16}
    for loaded in (load_pipeline(whole, device="cpu", **half), VersVideoPipeline.from_pretrained(whole, **half)):
        assert {p.dtype for p in (*loaded.unet.parameters(), *loaded.text_encoder.parameters())} == {torch.bfloat16}
    unet = build().unet
    vae = build_vae("smoke")
    models = [unet, TCMVAE.from_image_vae(vae), StyleAdapter(embedding_dim=16, cross_attention_dim=128),
              VersVideoControlNet.from_unet(unet, dict(canny=1), adapter_channels=(4, 8, 8, 8))]
    for model in models:
        model.save_pretrained(tmp_path / type(model).__name__)
        again = type(model).from_pretrained(tmp_path / type(model).__name__, **half)
        assert {p.dtype for p in again.parameters()} == {torch.bfloat16}


def test_one_name_of_the_precision_at_a_time(whole):
    with pytest.raises(ValueError, match="both of dtype and torch_dtype given: give dtype"):
        load_pipeline(whole, dtype=torch.float16, torch_dtype=torch.float16)
    assert load_pipeline(whole, device="cpu").unet.dtype == torch.float32


# Weight files of other kinds

@pytest.mark.parametrize("pieces", [{}, dict(max_shard_size="300KB")], ids=["whole", "sharded"])
def test_a_variant_is_named_and_loaded(pipe, tmp_path, pieces):
    pipe.save_pretrained(tmp_path, variant="fp16", **pieces)
    for load in (load_pipeline, VersVideoPipeline.from_pretrained):
        with pytest.raises(FileNotFoundError, match="variant fp16: give variant='fp16'") as error:
            load(tmp_path)
        assert "git" not in str(error.value) and "damaged" not in str(error.value)
        assert same_weights(load(tmp_path, variant="fp16"), pipe)
    assert len(list((tmp_path / "unet").glob("*.safetensors"))) > bool(pieces)


def test_a_variant_may_be_there_for_some_parts_alone(pipe, copied):
    weights = copied / UNET_WEIGHTS
    weights.rename(weights.with_suffix(".fp16.safetensors"))
    assert same_weights(load_pipeline(copied, variant="fp16", device="cpu"), pipe)


def test_sharded_weights_are_loaded(pipe, tmp_path):
    pipe.save_pretrained(tmp_path, max_shard_size="300KB")
    assert len(list((tmp_path / "unet").glob("*.safetensors"))) > 1
    assert same_weights(load_pipeline(tmp_path, device="cpu"), pipe)
    assert same_weights(VersVideoPipeline.from_pretrained(tmp_path), pipe)


def test_pickled_weights_are_refused_with_the_way_to_convert_them(pipe, copied, monkeypatch):
    pipe.unet.save_pretrained(copied / "unet", safe_serialization=False)
    torch.save(pipe.text_encoder.state_dict(), copied / "text_encoder" / "pytorch_model.bin")
    for file in (UNET_WEIGHTS, TEXT_WEIGHTS):
        (copied / file).unlink()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", None)
        for load in (load_pipeline, VersVideoPipeline.from_pretrained):
            for options in ({}, dict(variant="fp16")):
                with pytest.raises(FileNotFoundError, match="is pickled, which may run code"):
                    load(copied, **options)
    for _ in range(2):
        with pytest.raises(FileNotFoundError) as error:
            check_saved(copied)
        exec(re.search('python -c "(.*)"', str(error.value))[1])
    assert same_weights(load_pipeline(copied, device="cpu"), pipe)


def test_a_damaged_folder_of_ones_own_is_not_restored_by_git(copied):
    (copied / UNET_WEIGHTS).write_bytes(b"")
    for load in (load_pipeline, VersVideoPipeline.from_pretrained):
        with pytest.raises(ValueError, match="truncated or damaged.*copy or download the folder again") as error:
            load(copied)
        assert "git" not in str(error.value)


# Without some of the parts

def test_prompts_are_encoded_without_unet_and_vae(whole, pipe):
    reader = VersVideoPipeline.from_pretrained(whole, unet=None, vae=None)
    told, avoided = reader.encode_prompt("a red circle", "a star", do_classifier_free_guidance=True)
    generator = quiet(VersVideoPipeline.from_pretrained(whole, text_encoder=None, tokenizer=None))
    close(latents_of(generator, None, prompt_embeds=told, negative_prompt_embeds=avoided),
          latents_of(pipe, negative_prompt="a star"))
    blind = quiet(VersVideoPipeline.from_pretrained(whole, vae=None))
    close(latents_of(blind), latents_of(pipe))


@pytest.mark.parametrize(("missing", "arguments", "message"), [
    (["unet", "vae"], {}, "has no unet and no vae: load it with the unet"),
    (["vae"], {}, 'has no vae: load it with the vae, or give output_type="latent"'),
    (["text_encoder", "tokenizer"], {}, "has no text_encoder and no tokenizer: load it with .* or give prompt_embeds"),
    (["text_encoder"], dict(prompt=None, prompt_embeds=torch.zeros(1, 12, 128)), "with guidance, negative_prompt"),
    (["scheduler"], {}, "has no scheduler: set pipe.scheduler"),
])
def test_a_missing_part_is_named(missing, arguments, message):
    few = build(**dict.fromkeys(missing))
    with pytest.raises(ValueError, match=message):
        few(**dict(prompt="a red circle") | arguments)


# Layers of the text encoder, steps

def deep_text():
    torch.manual_seed(0)
    tokenizer = build_tokenizer(WORDS.split(), max_length=12)
    tower = ClipSize(width=128, text_layers=3, vision_layers=1, heads=2, image=16, patch=8, projection=16)
    return tokenizer, split_clip(build_clip(tokenizer, tower))[0]


@pytest.mark.parametrize("skip", [None, 1, 2])
@pytest.mark.parametrize("projection", [True, False])
def test_clip_skip_is_that_of_stable_diffusion(skip, projection):
    tokenizer, text_encoder = deep_text()
    text_encoder = text_encoder if projection else text_encoder.text_model
    pipe = build(tokenizer=tokenizer, text_encoder=text_encoder)
    mine = pipe.encode_prompt("a red circle", "a star", clip_skip=skip, do_classifier_free_guidance=True)
    known = deep_text()[1].text_model
    object.__setattr__(known, "text_model", known)  # where diffusers looks for the norm; not so in transformers 5
    theirs = StableDiffusionPipeline.encode_prompt(
        SimpleNamespace(tokenizer=tokenizer, text_encoder=known, unet=None), "a red circle", "cpu", 1, True, "a star",
        clip_skip=skip)
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_clip_skip_leaves_nothing_behind():
    tokenizer, text_encoder = deep_text()
    pipe = build(tokenizer=tokenizer, text_encoder=text_encoder)
    pipe.encode_prompt("a red circle", clip_skip=1)
    pickle.loads(pickle.dumps(pipe.text_encoder))
    for wrong in (1.0, True, -1, 3):
        with pytest.raises(ValueError, match=f"clip_skip={wrong!r}: the text encoder has 3 layers, give 0 to 2"):
            pipe.encode_prompt("a red circle", clip_skip=wrong)


def test_clip_skip_of_a_call():
    tokenizer, text_encoder = deep_text()
    pipe = build(tokenizer=tokenizer, text_encoder=text_encoder)
    assert not torch.allclose(latents_of(pipe, clip_skip=1), latents_of(pipe), atol=1e-3)
    embeds, _ = pipe.encode_prompt("a red circle", clip_skip=1)
    close(latents_of(pipe, None, prompt_embeds=embeds), latents_of(pipe, clip_skip=1))
    with pytest.raises(ValueError, match="clip_skip=3: the text encoder has 3 layers, give 0 to 2"):
        pipe("a red circle", clip_skip=3)
    with pytest.raises(ValueError, match="clip_skip=1 has no effect: give prompt"):
        pipe(prompt_embeds=embeds, clip_skip=1)


@pytest.mark.parametrize(("name", "custom"), [
    ("DDPM", dict(timesteps=[900, 400, 20])), ("EulerDiscrete", dict(timesteps=[900, 400, 20])),
    ("DPMSolverMultistep", dict(timesteps=[900, 400, 20])), ("EulerDiscrete", dict(sigmas=[10.0, 3.0, 0.5, 0.0])),
])
def test_own_steps_are_those_of_diffusers(pipe, name, custom):
    pipe.scheduler = get_scheduler(name, pipe.scheduler.config)
    own = latents_of(pipe, num_inference_steps=7, generator=torch.Generator().manual_seed(0), **custom)
    taken = pipe.scheduler.timesteps.clone()
    expected, count = retrieve_timesteps(get_scheduler(name, pipe.scheduler.config), **custom)
    assert torch.equal(taken, expected) and pipe.num_timesteps == count == 3
    assert own.isfinite().all()


@pytest.mark.parametrize("custom", ["timesteps", "sigmas"])
def test_a_scheduler_without_own_steps_says_so(pipe, custom):
    with pytest.raises(ValueError, match=f"^DDIMScheduler takes no {custom}: give num_inference_steps") as error:
        pipe("a red circle", **{custom: [500, 1]})
    assert "\n" not in str(error.value)


# Autoencoders and schedulers of diffusers

def test_an_autoencoder_without_a_shift():
    vae = AsymmetricAutoencoderKL(down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
                                  down_block_out_channels=(8,) * 4, up_block_out_channels=(8,) * 4, norm_num_groups=4)
    assert "shift_factor" not in vae.config
    assert build(vae=vae.eval())("a red circle", num_inference_steps=1).videos.shape == (1, 3, 4, 16, 16)


FLOWS = [diffusers.FlowMatchEulerDiscreteScheduler(), diffusers.FlowMatchHeunDiscreteScheduler(),
         diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)]


@pytest.mark.parametrize("scheduler", FLOWS, ids=lambda s: type(s).__name__)
def test_flow_matching_is_refused_with_the_reason(pipe, whole, scheduler):
    reason = f"{type(scheduler).__name__} cannot drive this model: it follows another noise process"
    with pytest.raises(ValueError, match=reason):
        build(scheduler=scheduler)
    with pytest.raises(ValueError, match=reason):
        VersVideoPipeline.from_pretrained(whole, scheduler=scheduler)
    with pytest.raises(ValueError, match=reason):
        get_scheduler(scheduler, {})
    pipe.scheduler = scheduler
    with pytest.raises(ValueError, match=reason):
        pipe("a red circle")


def test_schedulers_that_contradict_the_model(whole, pipe):
    other = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, prediction_type="v_prediction")
    with pytest.raises(ValueError, match="prediction_type='v_prediction', the model 'epsilon'"):
        load_pipeline(whole, scheduler=other, device="cpu")
    with pytest.raises(ValueError, match="num_train_timesteps=100, the model 1000"):
        get_scheduler(diffusers.DDIMScheduler(num_train_timesteps=100), pipe.scheduler.config)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, prediction_type="sample")
    with pytest.raises(ValueError, match="prediction_type='sample'"):
        pipe("a red circle")
    with pytest.raises(ValueError, match="num_inference_steps=60 does not suit LCMScheduler .* give at most 50"):
        load_pipeline(whole, scheduler="LCM", device="cpu")("a red circle", num_inference_steps=60)
    with pytest.raises(ValueError, match="scheduler='Amused'"):
        get_scheduler("Amused", pipe.scheduler.config)


def test_stage_2_refuses_a_velocity_model(pipe, tmp_path):
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, prediction_type="v_prediction")
    pipe.save_pretrained(tmp_path / "v")
    with pytest.raises(ValueError, match="prediction_type='v_prediction'"):
        load_trained("smoke", str(tmp_path / "v"))


def test_flow_matching_by_name(whole):
    for name in ("FlowMatchEulerDiscrete", "FlowMatchEulerDiscreteScheduler"):
        with pytest.raises(ValueError, match="another noise process"):
            load_pipeline(whole, scheduler=name, device="cpu")


@pytest.mark.parametrize("name", ["LCM", "TCD"])
def test_schedulers_of_distilled_models_have_our_settings(whole, name):
    loaded = quiet(load_pipeline(whole, scheduler=name, device="cpu"))
    assert type(loaded.scheduler).__name__ == f"{name}Scheduler"
    old = json.loads((whole / "scheduler" / "scheduler_config.json").read_text())
    for setting in ("beta_start", "beta_end", "beta_schedule", "clip_sample", "set_alpha_to_one", "prediction_type"):
        assert loaded.scheduler.config[setting] == old[setting]
    assert latents_of(loaded, generator=torch.Generator().manual_seed(0), num_inference_steps=4).isfinite().all()


# The velocity

def means(text):
    "A number for each channel, `b c 1 1 1`, of tokens `b n d`; about 1, and other for other prompts."
    return text[:, 1:4, :4].sum(1)[:, :, None, None, None]


class Gaussian(ModelMixin, ConfigMixin):
    "The exact denoiser of clips whose values are normal around a number that the text says; velocity or noise."

    @register_to_config
    def __init__(self, velocity=True, deviation=0.3, in_channels=4, sample_size=(4, 2, 2), cross_attention_dim=128):
        super().__init__()
        self.levels = DDIMScheduler(**NOISE).alphas_cumprod.double().numpy()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, sample, timestep, encoder_hidden_states, return_dict=True):
        ratio = float(np.interp(float(timestep), np.arange(1000), np.sqrt(1 / self.levels - 1)))
        alpha, sigma = (1 + ratio**2) ** -0.5, ratio * (1 + ratio**2) ** -0.5
        mean = means(encoder_hidden_states)
        variance = self.config.deviation**2
        clean = (alpha * variance * sample + sigma**2 * mean) / (alpha**2 * variance + sigma**2)
        eps = (sample - alpha * clean) / sigma
        return UNetOutput(sample=alpha * eps - sigma * clean if self.config.velocity else eps)


NOISE = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
             set_alpha_to_one=False, steps_offset=1)


@pytest.mark.parametrize("rescale", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("name", ["DDIM", "DPMSolverMultistep", "EulerDiscrete", "HeunDiscrete"])
def test_velocity_and_noise_give_the_same_video(name, rescale):
    made = []
    for velocity in (True, False):
        kind = "v_prediction" if velocity else "epsilon"
        pipe = build(unet=Gaussian(velocity), scheduler=DDIMScheduler(prediction_type=kind, **NOISE))
        pipe.scheduler = get_scheduler(name, pipe.scheduler.config)
        assert pipe.scheduler.config.prediction_type == kind
        made.append(latents_of(pipe, num_inference_steps=12, guidance_scale=3.0, guidance_rescale=rescale))
    assert 1 < made[1].abs().max() < 50
    torch.testing.assert_close(made[0], made[1], rtol=1e-3, atol=2e-3)


def test_velocity_is_sampled_right():
    "Without guidance the values have the mean that the text says."
    pipe = build(unet=Gaussian(deviation=0.01), scheduler=DDIMScheduler(prediction_type="v_prediction", **NOISE))
    latents = latents_of(pipe, num_inference_steps=25, guidance_scale=1.0)
    text, _ = pipe.encode_prompt("a red circle")
    assert (latents - means(text)).abs().max() < 0.2 < means(text).abs().max() - 0.3


def test_velocity_from_pure_noise_can_be_rescaled():
    scheduler = DDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing",
                              **NOISE)
    assert latents_of(build(scheduler=scheduler), guidance_rescale=0.7).isfinite().all()


def test_a_video_model_of_the_velocity_is_no_start(tmp_path):
    pipe = build(scheduler=DDIMScheduler(prediction_type="v_prediction", **NOISE))
    pipe.save_pretrained(tmp_path)
    unet = VersVideoUNet.from_config(pipe.unet.config)
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    for folder in (tmp_path, tmp_path / "unet"):
        with pytest.raises(ValueError, match="prediction_type='v_prediction', VersVideo is trained to predict"):
            load_init(unet, str(folder))
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())
    assert "`v_prediction`" in (tmp_path / "README.md").read_text()


# Sizes far from training

@pytest.mark.parametrize(("size", "message"), [
    (dict(num_frames=5), "num_frames=5 is more than the 4 that"),
    (dict(height=32), "height=32, width=16 is far more than the 16×16 pixels .*: objects may appear more than once"),
    (dict(width=8), "height=16, width=8 is far less than the 16×16 pixels .*: objects may be missing or cut off"),
])
def test_sizes_far_from_training_warn_once(pipe, size, message):
    with pytest.warns(UserWarning, match=message) as caught:
        for _ in range(2):
            pipe("a red circle", num_inference_steps=1, **size)
    assert len(caught) == 1
    with pytest.warns(UserWarning, match=message):
        build()("a red circle", num_inference_steps=1, **size)


def test_each_kind_of_size_has_its_own_warning(pipe):
    with pytest.warns(UserWarning) as caught:
        pipe("a red circle", num_inference_steps=1, height=32)
        pipe("a red circle", num_inference_steps=1, num_frames=6)
        pipe("a red circle", num_inference_steps=1, num_frames=6, height=8, width=40)
    assert len(caught) == 3


def test_sizes_near_training_do_not_warn(pipe):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe("a red circle", num_inference_steps=1, height=24, num_frames=2)


def test_a_dry_run_does_not_use_up_the_warning(pipe):
    dry_run(pipe, (5, 16, 16), "a red circle", {})
    with pytest.warns(UserWarning, match="num_frames=5 is more than"):
        pipe("a red circle", num_inference_steps=1, num_frames=5)
