"""A denoiser of another kind, a small diffusion transformer, goes wherever the UNet goes."""

from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.pipelines import pipeline_utils
from einops import rearrange
from torch import nn

from versvideo.lab.plan import SavedBytes, count_flops, example_inputs
from versvideo.models.contracts import Autoencoder, Denoiser
from versvideo.models.image_vae import build_vae
from versvideo.models.latents import decode_latents, encode_clips
from versvideo.models.text import ClipSize, build_clip, split_clip
from versvideo.models.tokenizer import build_tokenizer
from versvideo.models.unet import UNetOutput
from versvideo.pipelines.text_to_video import VersVideoPipeline
from versvideo.trainers.config import FitConfig
from versvideo.trainers.loop import fit
from versvideo.trainers.objectives import denoising_loss, training_scheduler


class TransformerBlock(nn.Module):
    "Attention over all patches of a clip, attention to the text, and a feed-forward network."

    def __init__(self, width, heads):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.attention, self.text_attention = (
            nn.MultiheadAttention(width, heads, batch_first=True) for _ in range(2))
        self.feed_forward = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x, text):
        y = self.norms[0](x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        x = x + self.text_attention(self.norms[1](x), text, text, need_weights=False)[0]
        return x + self.feed_forward(self.norms[2](x))


class TinyDiT(ModelMixin, ConfigMixin):
    "Patches of every frame as tokens, two blocks, and back. It knows no style, no ControlNet."

    @register_to_config
    def __init__(self, in_channels=4, sample_size=(4, 4, 4), cross_attention_dim=16, width=32, patch=2):
        super().__init__()
        self.into, self.out = (nn.Linear(a, b) for a, b in (
            (in_channels * patch**2, width), (width, in_channels * patch**2)))
        self.text, self.step = nn.Linear(cross_attention_dim, width), nn.Linear(width, width)
        self.place = nn.Parameter(torch.randn(sample_size[0], sample_size[1] // patch, sample_size[2] // patch, width))
        self.blocks = nn.ModuleList(TransformerBlock(width, heads=2) for _ in range(2))

    def forward(self, sample, timestep, encoder_hidden_states, return_dict=True):
        p, (_, _, t, h, w) = self.config.patch, sample.shape
        step = torch.as_tensor(timestep, device=sample.device).expand(len(sample))
        step = self.step(get_timestep_embedding(step, self.config.width).to(sample.dtype))
        x = self.into(rearrange(sample, "b c t (h p) (w q) -> b t h w (c p q)", p=p, q=p))
        x = (x + self.place[:t, :h // p, :w // p]).flatten(1, 3) + step[:, None]
        text = self.text(encoder_hidden_states)
        for block in self.blocks:
            x = block(x, text)
        noise = rearrange(self.out(x), "b (t h w) (c p q) -> b c t (h p) (w q)", t=t, h=h // p, w=w // p, p=p, q=p)
        return UNetOutput(sample=noise) if return_dict else (noise,)


@pytest.fixture
def dit():
    torch.manual_seed(0)
    return TinyDiT().eval()


@pytest.fixture
def pipe(dit):
    tokenizer = build_tokenizer("a red blue circle star".split(), max_length=8)
    tower = ClipSize(width=16, text_layers=1, vision_layers=1, heads=2, image=16, patch=8, projection=16)
    text_encoder, _ = split_clip(build_clip(tokenizer, tower))
    pipe = VersVideoPipeline(vae=build_vae("smoke").eval(), tokenizer=tokenizer, text_encoder=text_encoder, unet=dit,
                             scheduler=training_scheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe, prompt="a red circle", **arguments):
    return pipe(prompt, num_inference_steps=2, generator=torch.Generator().manual_seed(0), **arguments).videos


def test_it_fulfils_the_contract(dit):
    assert isinstance(dit, Denoiser) and isinstance(build_vae("smoke"), Autoencoder)
    assert not isinstance(dit, Autoencoder)


def test_the_pipeline_generates_with_it(pipe):
    videos = generate(pipe)
    assert videos.shape == (1, 3, 4, 32, 32) and 0 <= videos.min() and videos.max() <= 1
    assert torch.equal(videos, generate(pipe))
    assert not torch.equal(videos, generate(pipe, "a blue star"))
    assert generate(pipe, num_frames=1, height=16).shape == (1, 3, 1, 16, 32)


def test_style_and_conditions_are_refused_by_name(pipe):
    with pytest.raises(ValueError, match="nbs/23_train_style.ipynb"):
        generate(pipe, style_image=torch.zeros(3, 8, 8))
    with pytest.raises(ValueError, match="nbs/22_train_controlnet.ipynb"):
        generate(pipe, conditions={"canny": torch.zeros(1, 1, 4, 32, 32)})


def test_diffusers_saves_and_loads_it_without_a_warning(pipe, tmp_path, monkeypatch):
    "diffusers compares what it loads with the annotations of the pipeline's arguments."
    warned = []
    monkeypatch.setattr(pipeline_utils.logger, "warning", lambda message, *args: warned.append(message))
    pipe.save_pretrained(tmp_path)
    again = VersVideoPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert type(again.unet).__name__ == "TinyDiT" and warned == []
    torch.testing.assert_close(generate(again), generate(pipe), rtol=0, atol=1e-5)


def test_the_loop_trains_it(dit, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    AcceleratorState._reset_state(reset_partial_state=True)
    before = [p.clone() for p in dit.parameters()]
    batch = dict(latents=torch.randn(2, 4, 4, 4, 4), text=torch.randn(2, 8, 16))
    scheduler = training_scheduler()
    log = fit(FitConfig(steps=1, batch_size=2, lr=1e-2, warmup=1), dit,
              lambda model, batch: denoising_loss(model, scheduler, batch["latents"], batch["text"]),
              lambda step, batch_index: batch)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert torch.isfinite(torch.tensor(log.rows[-1]["loss"]))
    assert any(not torch.equal(p, old) for p, old in zip(dit.parameters(), before, strict=True))


def test_its_operations_are_counted(dit):
    one, two = (count_flops(dit, (4, 4, 4), batch) for batch in (1, 2))
    assert two == 2 * one
    projections = 2 * 16 * (16 * 32 + 32 * 16)   # into and out of 16 patches of 16 numbers, 2 operations a weight
    assert one > projections


def test_the_memory_of_a_training_step_is_counted(dit):
    def saved_bytes(batch):
        with torch.enable_grad(), SavedBytes(dit.train()) as saved:
            dit(*example_inputs(dit, (4, 4, 4), batch))
        return saved.total

    one, two = saved_bytes(1), saved_bytes(2)
    assert 1.5 * one < two < 2.5 * one   # weights do not count; at batch 1 some tensors share their storage


class BlockAutoencoder(ModelMixin, ConfigMixin):
    "Means of blocks of 8x8 pixels as latents; the decoder mixes time: each frame is the mean of those up to it."
    decodes_clips = True

    @register_to_config
    def __init__(self, latent_channels=4, block_out_channels=(1, 1, 1, 1), scaling_factor=1.0, shift_factor=None):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def encode(self, x):
        mean = nn.functional.avg_pool2d(nn.functional.pad(x, (0, 0, 0, 0, 0, 1)), 8)
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=mean, sample=lambda: mean))

    def decode(self, z, window=None):
        self.decoded = tuple(z.shape)
        frames = z[:, :3].cumsum(2) / torch.arange(1, z.shape[2] + 1, device=z.device)[:, None, None]
        return SimpleNamespace(sample=frames.repeat_interleave(8, 3).repeat_interleave(8, 4))


def test_an_autoencoder_of_another_kind(pipe):
    "A decoder that mixes time is given whole clips; clips go through it and back."
    vae = BlockAutoencoder()
    assert isinstance(vae, Autoencoder)
    grey = torch.full((2, 3, 4, 16, 16), 0.25)
    latents = encode_clips(vae, grey)
    assert latents.shape == (2, 4, 4, 2, 2)
    assert torch.allclose(decode_latents(vae, latents), grey, atol=1e-6) and vae.decoded == (2, 4, 4, 2, 2)
    pipe.register_modules(vae=vae)
    assert generate(pipe, num_frames=4, height=32, width=32).shape == (1, 3, 4, 32, 32)
    assert vae.decoded == (1, 4, 4, 4, 4)
