"""The training loop: what it computes, how it stops and goes on, and what several processes do.

Run as a program by torchrun (`test_two_processes`), this file is one of those processes.
"""

import copy
import json
import math
import os
import shutil
import subprocess
import sys
import time
import types
from pathlib import Path

import literal
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import nn

from versvideo import latents as latents_module
from versvideo import trainers
from versvideo.latents import (
    autoencoder_loss,
    build_vae,
    cached_latents,
    encode_clips,
    fit_latent_scale,
)
from versvideo.saved import change_config
from versvideo.trainers import (
    FitConfig,
    denoising_loss,
    draw_latents,
    draw_timesteps,
    fit,
    is_image_batch,
    load_frozen,
    run_folder,
    training_scheduler,
)
from versvideo.unet import VersVideoUNet

UNET = dict(block_out_channels=(8, 16), attention_levels=(True, False), head_dim=4,
            cross_attention_dim=6, experts=(2, 2), norm_groups=4)


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    "One process on the CPU, wherever the tests run."
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def build_unet(seed=0):
    torch.manual_seed(seed)
    return VersVideoUNet(**UNET)


def latent_batch(step, rank, world):
    "Clips, or images when it is this process's turn."
    g = torch.Generator().manual_seed(1000 * step + rank)
    image = is_image_batch(step, rank, world, 1, 2)
    return dict(latents=torch.randn(2, 4, 1 if image else 3, 4, 4, generator=g),
                text=torch.randn(2, 3, 6, generator=g))


def unet_loss(unet, batch):
    losses = denoising_loss(unet, training_scheduler(), batch["latents"], batch["text"])
    kind = "image_loss" if batch["latents"].shape[2] == 1 else "clip_loss"
    return losses | {kind: losses["loss"]}


def exchange(unet):
    unet.exchange_experts(0.1)


def numbers(**changes):
    return FitConfig(**(dict(steps=7, batch_size=2, lr=1e-2, warmup=2, ema_decay=0.9, log_every=3,
                             save_every=3) | changes))


class Killed(Exception):
    "The process ended without a word."


def dies_at(step, batch_fn):
    def batch(now, rank, world):
        if now == step:
            raise Killed
        return batch_fn(now, rank, world)
    return batch


def train(folder=None, batch_fn=latent_batch, **changes):
    unet = build_unet()
    log = fit(numbers(**changes), unet, unet_loss, batch_fn, folder, exchange)
    return unet, [{k: v for k, v in row.items() if k != "seconds"} for row in log.rows]


def far(ours, theirs):
    ours, theirs = ours.state_dict(), theirs.state_dict()
    return max((ours[n] - theirs[n]).abs().max().item() for n in theirs)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# What a step does

def by_hand(cfg, w, batches):
    "AdamW, warm-up and cosine, clipping and moving average on the loss ‖w x - y‖², step by step."
    w, m, v, mean = w.clone(), torch.zeros_like(w), torch.zeros_like(w), None
    warm = min(cfg.warmup, cfg.steps // 10)
    for k, (x, y) in enumerate(batches):
        g = sum(2 * (w @ x[i] - y[i])[:, None] * x[i][None] for i in range(len(x))) / y.numel()
        norm = g.square().sum().sqrt()
        g = g * min(1, cfg.grad_clip / (norm + 1e-6))
        angle = math.pi * (k - warm) / (cfg.steps - warm)
        lr = cfg.lr * (k / warm if k < warm else (1 + math.cos(angle)) / 2)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        step = m / (1 - 0.9 ** (k + 1)) / ((v / (1 - 0.999 ** (k + 1))).sqrt() + 1e-8)
        w = w - lr * cfg.weight_decay * w - lr * step
        keep = min(1 - (1 + k) ** -0.75, cfg.ema_decay)
        mean = w if k == 0 else keep * mean + (1 - keep) * w
    return w, mean


@pytest.mark.parametrize("ema", [None, 0.6])
@pytest.mark.parametrize("clip", [0.05, 1e9])
def test_fit_is_adamw_by_hand(ema, clip):
    cfg = numbers(steps=20, warmup=50, lr=0.03, weight_decay=0.1, grad_clip=clip, ema_decay=ema)
    torch.manual_seed(0)
    data = torch.randn(20, 2, 4, 3, dtype=torch.double)
    model = nn.Linear(3, 3, bias=False).double()
    w, mean = by_hand(FitConfig(**vars(cfg) | {"ema_decay": 0.6}), model.weight.detach(), data)
    fit(cfg, model, lambda m, b: {"loss": (m(b["x"]) - b["y"]).square().mean()},
        lambda step, rank, world: dict(x=data[step, 0], y=data[step, 1]))
    got = model.weight.detach()
    assert not model.training
    assert (got - (mean if ema else w)).abs().max() < 1e-9
    assert (got - (w if ema else mean)).abs().max() > 1e-4


@pytest.mark.parametrize("share", [0.1, 0.])
def test_pretrained_parameters_learn_at_their_share(share, monkeypatch):
    unet, seen, step = build_unet(), [], torch.optim.AdamW.step

    def watched(self, *args, **kwargs):
        seen.append([(g["lr"], len(g["params"])) for g in self.param_groups])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    old = {name for name, _ in unet.named_parameters() if ".spatial." in name}
    before = {name: p.detach().clone() for name, p in unet.named_parameters()}
    fit(numbers(steps=2, warmup=0, lr=0.01, ema_decay=None, pretrained_share=share), unet,
        unet_loss, latent_batch, pretrained=old)
    (lr, new), *rest = seen[0]
    assert lr == 0.01 and new == len(before) - len(old)
    assert rest == ([(pytest.approx(0.001), len(old))] if share else [])
    moved = {name for name, p in unet.named_parameters() if not torch.equal(p, before[name])}
    assert moved - old and bool(moved & old) == bool(share)


def test_after_step_comes_between_the_optimiser_and_the_moving_average():
    model, seen = nn.Linear(2, 2, bias=False), []

    def loss(m, batch):
        seen.append(("loss", m.weight.detach().clone()))
        return {"loss": m(batch["x"]).square().mean()}

    def after_step(m):
        assert m is model
        seen.append(("after", m.weight.detach().clone()))
        with torch.no_grad():
            m.weight.fill_(5.)

    fit(numbers(steps=2, lr=0.1, ema_decay=0.9), model, loss, lambda *a: dict(x=torch.ones(1, 2)),
        after_step=after_step)
    assert [name for name, _ in seen] == ["loss", "after"] * 2
    (_, before), (_, stepped), (_, second), _ = seen
    assert (stepped - before).abs().min() > 0.05
    assert (second == 5).all() and (model.weight == 5).all()


def test_loss_sees_a_new_seed_every_step_whatever_came_before():
    def draws(waste):
        seen = []

        def loss(m, batch):
            seen.append(torch.rand(()).item())
            return {"loss": m(batch["x"]).square().mean()}

        def batch(step, rank, world):
            torch.rand(waste)
            return dict(x=torch.full((1, 2), 1. + step))

        fit(numbers(steps=3), nn.Linear(2, 2), loss, batch, after_step=lambda m: torch.rand(waste))
        return seen

    first = draws(0)
    assert len(set(first)) == 3
    assert draws(3) != first and draws(0) == first


def test_curve_is_the_mean_since_the_last_row():
    values = [1., 2., 6., 4., 5., 9., 7.]
    log = fit(numbers(), nn.Linear(1, 1), lambda m, b: {
        "loss": m(b["x"]).mean() * 0 + b["x"].mean(), "twice": 2 * b["x"].mean()},
        lambda step, rank, world: dict(x=torch.full((1, 1), values[step])))
    assert [row["step"] for row in log.rows] == [3, 6, 7]
    assert [row["loss"] for row in log.rows] == [3, 6, 7]
    assert [row["twice"] for row in log.rows] == [6, 12, 14]
    assert {"grad_norm", "lr", "seconds"} <= log.rows[0].keys()


# Stopping and going on

@pytest.mark.parametrize("dies", [4, 6])
def test_resumed_run_equals_an_uninterrupted_one(tmp_path, dies):
    want, rows = train(tmp_path / "whole")
    with pytest.raises(Killed):
        train(tmp_path / "parts", dies_at(dies, latent_batch))
    assert names(tmp_path / "parts")[-1] == f"step-{dies // 3 * 3:06d}"
    got, resumed_rows = train(tmp_path / "parts", dies_at(dies // 3 * 3 - 1, latent_batch))
    assert far(got, want) == 0 and resumed_rows == rows
    for name in ("model.safetensors", "optimizer.bin", "custom_checkpoint_0.pkl",
                 "custom_checkpoint_1.pkl"):
        whole, parts = ((tmp_path / run / "step-000007" / name) for run in ("whole", "parts"))
        assert whole.exists() and parts.exists()
    whole, parts = (load_file(tmp_path / run / "step-000007" / "model.safetensors")
                    for run in ("whole", "parts"))
    assert all(torch.equal(whole[n], parts[n]) for n in whole)
    assert any((whole[f"model.{n}"] - p).abs().max() > 1e-4 for n, p in want.named_parameters()), \
        "the moving average is the model itself: the comparison says nothing about it"


@pytest.mark.parametrize("forgotten", [
    "diffusers.training_utils.EMAModel", "torch.optim.AdamW", "torch.optim.lr_scheduler.LambdaLR"])
def test_resume_needs_all_that_is_saved(tmp_path, forgotten, monkeypatch):
    want, _ = train()
    with pytest.raises(Killed):
        train(tmp_path, dies_at(4, latent_batch))
    monkeypatch.setattr(f"{forgotten}.load_state_dict", lambda self, *a, **k: None)
    got, _ = train(tmp_path)
    assert far(got, want) > 1e-6


def test_damaged_checkpoint_is_named(tmp_path):
    with pytest.raises(Killed):
        train(tmp_path, dies_at(6, latent_batch))
    weights = tmp_path / "step-000006" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ValueError, match="step-000006 is damaged.*delete it"):
        train(tmp_path)
    shutil.rmtree(weights.parent)
    train(tmp_path)
    assert names(tmp_path)[-1] == "step-000007"


def test_finished_run_is_read_not_repeated(tmp_path):
    want, rows = train(tmp_path)
    got, again = train(tmp_path, dies_at(0, latent_batch))
    assert far(got, want) == 0 and again == rows


def test_folder_of_another_run_is_refused(tmp_path):
    train(tmp_path)
    for changes, message in [(dict(seed=3), "seed=0, not 3"), (dict(steps=9), "steps=7, not 9")]:
        with pytest.raises(ValueError, match=f"{message}.*choose another folder"):
            train(tmp_path, **changes)
    train(tmp_path, log_every=1, save_every=1)


def test_what_else_makes_a_run_is_kept_with_its_checkpoints(tmp_path):
    def go(**run):
        unet = build_unet()
        fit(numbers(), unet, unet_loss, latent_batch, tmp_path, exchange, run=run)

    go(vae="", plan=dict(shift=3., sizes=(1, 2)))
    go(vae="", plan=dict(shift=3., sizes=(1, 2)))
    with pytest.raises(ValueError, match="vae=, not other"):
        go(vae="other", plan=dict(shift=3., sizes=(1, 2)))
    with pytest.raises(ValueError, match="'shift': 3.0.*not.*'shift': 2.0"):
        go(vae="", plan=dict(shift=2., sizes=(1, 2)))


def test_processes_need_one_folder(monkeypatch):
    monkeypatch.setattr(trainers.PartialState(), "num_processes", 2)
    with pytest.raises(ValueError, match="out='': 2 processes need one folder"):
        run_folder("")


@pytest.mark.parametrize("name", ["steps", "batch_size", "log_every", "save_every"])
def test_numbers_below_one_are_refused(name):
    with pytest.raises(ValueError, match=f"{name}=0: at least 1"):
        numbers(**{name: 0})


@pytest.mark.parametrize("name", ["vae", "clip"])
def test_folder_that_is_not_there_is_named(name):
    with pytest.raises(FileNotFoundError, match=f"{name}='results/nope': there is no folder"):
        load_frozen("XS", **{name: "results/nope"})


def test_two_newest_checkpoints_are_kept(tmp_path):
    train(tmp_path, save_every=1, steps=5)
    assert names(tmp_path) == ["step-000004", "step-000005"]


def test_nan_loss_stops_and_leaves_the_last_checkpoint(tmp_path):
    want, _ = train()

    def broken(step, rank, world):
        batch = latent_batch(step, rank, world)
        return batch | {"latents": batch["latents"] * float("nan")} if step == 5 else batch

    with pytest.raises(RuntimeError, match=r"loss is nan.* at step 5: lower lr=0\.01"):
        train(tmp_path, broken)
    assert names(tmp_path) == ["step-000003"]
    assert all(w.isfinite().all()
               for w in load_file(tmp_path / "step-000003/model.safetensors").values())
    got, _ = train(tmp_path)
    assert far(got, want) == 0


def test_nan_gradient_of_a_finite_loss_stops_before_the_weights_are_nan(tmp_path):
    def loss(m, batch):
        return {"loss": 1 + (m(batch["x"]) * batch["x"]).square().sum().sqrt()}

    model = nn.Linear(1, 1)
    with pytest.raises(RuntimeError, match="nan at step 4"):
        fit(numbers(save_every=1), model, loss,
            lambda step, rank, world: dict(x=torch.full((1, 1), float(step != 4))), tmp_path)
    assert model.weight.isfinite().all()
    assert names(tmp_path) == ["step-000003", "step-000004"]


def test_curve_of_a_resumed_run_forgets_no_step(tmp_path):
    _, rows = train(tmp_path / "whole", save_every=2, log_every=3)
    with pytest.raises(Killed):
        train(tmp_path / "parts", dies_at(5, latent_batch), save_every=2, log_every=3)
    assert train(tmp_path / "parts", save_every=2, log_every=3)[1] == rows


def test_moving_average_comes_back_to_its_device(tmp_path, monkeypatch):
    "Accelerate restores it on the CPU, wherever the weights are."
    with pytest.raises(Killed):
        train(tmp_path, dies_at(4, latent_batch))
    calls = []
    for name in ("load_state_dict", "to", "step"):
        method = getattr(EMAModel, name)
        monkeypatch.setattr(EMAModel, name, lambda self, *a, _name=name, _method=method, **k: (
            calls.append(_name), _method(self, *a, **k))[1])
    train(tmp_path)
    assert calls == ["to", "load_state_dict", "to"] + ["step"] * 4


def test_save_that_fails_half_way_is_no_checkpoint(tmp_path, monkeypatch):
    want, rows = train()
    write = trainers.write_json

    def full(path, obj):
        if "step-000006" in str(path):
            raise OSError("no space left on device")
        return write(path, obj)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
        patch.setattr(trainers, "write_json", full)
        train(tmp_path)
    assert [n for n in names(tmp_path) if n.startswith("step-")] == ["step-000003"]
    got, again = train(tmp_path)
    assert far(got, want) == 0 and again == rows
    assert names(tmp_path) == ["step-000006", "step-000007"]


def test_checkpoint_weights_are_safetensors(tmp_path):
    train(tmp_path, steps=3)
    saved = load_file(tmp_path / "step-000003/model.safetensors")
    assert {f"model.{n}" for n, _ in build_unet().named_parameters()} == set(saved)


# Several processes

def worker(folder):
    "One of two processes: train, be killed, go on, and leave what this process ended with."
    rank, save, kinds = int(os.environ["RANK"]), torch.save, []

    def slow_save(obj, path, *args, **kwargs):
        "The second process is late: a checkpoint must wait for its random state."
        if rank == 1 and "random_states" in str(path):
            time.sleep(0.3)
        save(obj, path, *args, **kwargs)

    torch.save = slow_save

    def batch(step, rank, world):
        data = latent_batch(step, rank, world)
        kinds.append(data["latents"].shape[2])
        return data

    def run(name, batch_fn):
        unet = build_unet(seed=rank)
        save_file(unet.state_dict(), folder / f"start-{rank}.safetensors")
        log = fit(numbers(), unet, unet_loss, batch_fn, folder / name, exchange)
        save_file(unet.state_dict(), folder / f"{name}-{rank}.safetensors")
        return log

    log = run("whole", batch)
    try:
        run("parts", dies_at(5, latent_batch))
    except Killed:
        Accelerator().wait_for_everyone()
        run("parts", latent_batch)
    report = dict(kinds=kinds, world=Accelerator().num_processes, rows=log.rows)
    (folder / f"report-{rank}.json").write_text(json.dumps(report))
    torch.distributed.destroy_process_group()


def test_two_processes(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               "--nproc_per_node", "2", __file__, str(tmp_path)]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300)
    assert done.returncode == 0, done.stdout[-12000:]
    reports = [json.loads((tmp_path / f"report-{r}.json").read_text()) for r in (0, 1)]
    assert reports[0]["world"] == 2
    curve, other = ([{k: v for k, v in row.items() if k != "seconds"} for row in report["rows"]]
                    for report in reports)
    assert curve == other and [row["step"] for row in curve] == [3, 6, 7]
    assert all(row["image_loss"] > 0 and row["clip_loss"] > 0 for row in curve)
    assert reports[0]["kinds"] == [1] * 7 and reports[1]["kinds"] == [1] + [3] * 6

    def weights(name):
        return [load_file(tmp_path / f"{name}-{r}.safetensors") for r in (0, 1)]

    ours, theirs = weights("whole")
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)
    start, other_start = weights("start")
    assert any(not torch.equal(start[n], other_start[n]) for n in start)
    idle = [n for n in ours if torch.equal(ours[n], start[n])]
    assert idle == [], "a part that only clips use was not trained"
    for resumed in weights("parts"):
        assert all(torch.equal(ours[n], resumed[n]) for n in ours)


# Which batch is whose

@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("every", [2, 4])
def test_image_batches_have_their_share(world, every):
    turns = [[is_image_batch(step, rank, world, 5, every) for rank in range(world)]
             for step in range(5, 5 + 12 * every)]
    assert sum(map(sum, turns)) == 12 * world
    assert all(is_image_batch(step, rank, world, 5, every)
               for step in range(5) for rank in range(world))
    if world % every == 0:
        assert all(sum(turn) == world // every for turn in turns)


def test_draw_latents():
    clips = torch.arange(6.)[:, None, None, None, None] * 100 + torch.arange(3.)[:, None, None]
    clips = clips.expand(6, 4, 3, 2, 2).half()
    x, index = draw_latents(clips, 5, False, torch.Generator().manual_seed(0))
    assert x.dtype == torch.float and torch.equal(x, clips[index].float())
    x, index = draw_latents(clips, 5, True, torch.Generator().manual_seed(0))
    assert x.shape == (40, 4, 1, 2, 2)
    frames = x[:, 0, 0, 0, 0] - 100 * index
    assert set(index.tolist()) == set(range(6)) and set(frames.tolist()) == {0, 1, 2}
    assert (x == x[:, :1, :, :1, :1]).all()
    again, _ = draw_latents(clips, 5, True, torch.Generator().manual_seed(0))
    assert torch.equal(again, x)


# Latents

class World:
    "Nine clips, of which each is a number, and a count of how many were made."
    def __init__(self, clips=9):
        torch.manual_seed(2)
        self.clips, self.made = torch.randint(0, 256, (clips, 3, 2, 16, 16), dtype=torch.uint8), 0

    def batch(self, indices):
        self.made += len(indices)
        return types.SimpleNamespace(clips=self.clips[list(indices)])


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return build_vae("smoke").eval()


def test_latents_are_the_scaled_means_of_every_frame(vae):
    vae.register_to_config(scaling_factor=2., shift_factor=0.5)
    clips = World().clips[:2]
    z = encode_clips(vae, clips, chunk=3)
    assert z.shape == (2, 4, 2, 2, 2)
    for b in range(2):
        for t in range(2):
            frame = clips[b, :, t].float() / 127.5 - 1
            mean = vae.encode(frame[None]).latent_dist.mean[0]
            assert (z[b, :, t] - (mean - 0.5) * 2).abs().max() < 1e-5
    assert (encode_clips(vae, clips.float() / 127.5 - 1) - z).abs().max() < 1e-5
    assert (z[0] - z[1]).abs().max() > 1e-3


def test_latent_scale(vae):
    clips = World().clips
    fit_latent_scale(vae, clips)
    assert type(vae).from_config(vae.config).config.scaling_factor == vae.config.scaling_factor
    z = encode_clips(vae, clips)
    assert abs(z.mean()) < 1e-4 and abs(z.std() - 1) < 1e-4


def test_latents_are_made_once(vae, tmp_path):
    fit_latent_scale(vae, World().clips)
    world, path = World(), tmp_path / "cache" / "latents.safetensors"
    z = cached_latents(path, vae, world, 9, batch=4)
    assert world.made == 2 + 9 and z.dtype == torch.half   # two to know the world by
    assert (z.float() - encode_clips(vae, world.clips)).abs().max() < 5e-3
    assert torch.equal(cached_latents(path, vae, world, 9), z) and world.made == 2 + 9 + 2


def test_latents_are_made_anew_for_another_world_or_autoencoder(vae, tmp_path):
    fit_latent_scale(vae, World().clips)
    world, path = World(), tmp_path / "latents.safetensors"
    z = cached_latents(path, vae, world, 9)
    assert len(cached_latents(path, vae, world, 5)) == 5
    other = World()
    other.clips = other.clips.flip(0)

    def changed(vae):
        return (cached_latents(path, vae, other, 9) - z.flip(0)).abs().max() > 0.1

    assert not changed(vae)
    scaled = copy.deepcopy(vae)
    change_config(scaled, scaling_factor=2 * vae.config.scaling_factor)
    assert changed(scaled)
    retrained = copy.deepcopy(vae)
    torch.nn.init.constant_(retrained.quant_conv.bias, 0.5)
    assert changed(retrained)


def test_half_made_latents_are_not_kept(vae, tmp_path, monkeypatch):
    def full(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError("no space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
        patch.setattr(latents_module, "save_file", full)
        cached_latents(tmp_path / "latents.safetensors", vae, World(), 3)
    assert names(tmp_path) == []


def test_autoencoder_loss(vae):
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    torch.manual_seed(3)
    got = autoencoder_loss(vae, {"pixels": x}, kl_weight=0.1)
    torch.manual_seed(3)
    posterior = vae.encode(x).latent_dist
    mean, variance = posterior.mean, posterior.var
    y = vae.decode(mean + variance.sqrt() * torch.randn(mean.shape)).sample
    kl = ((mean ** 2 + variance - 1 - variance.log()) / 2).sum() / mean.numel()
    want = ((x - y) ** 2).sum() / x.numel() + 0.1 * (x - y).abs().sum() / x.numel() + 0.1 * kl
    assert got["loss"].item() == pytest.approx(want.item(), rel=1e-5)
    assert got["kl"].item() == pytest.approx(kl.item(), rel=1e-5)


def test_build_vae_names_the_sizes_it_has():
    with pytest.raises(ValueError, match="size='L' trains no autoencoder.*smoke, XS"):
        build_vae("L")


# Noise

class Spy(nn.Module):
    "Predicts a tenth of what it is given, and remembers it."
    def forward(self, noisy, steps, text):
        self.noisy, self.steps, self.text = noisy, steps, text
        return types.SimpleNamespace(sample=0.1 * noisy + text.mean())


def compare_denoising(version=literal, **options):
    spy, n = Spy(), 6
    torch.manual_seed(0)
    x, text = torch.randn(n, 4, 2, 3, 3), torch.randn(n, 2, 5)
    torch.manual_seed(1)
    noise = torch.randn(x.shape)
    torch.manual_seed(1)
    got = denoising_loss(spy, training_scheduler(), x, text, **options)
    assert spy.steps.dtype == torch.long and spy.text is text
    steps = spy.steps.tolist()
    noisy = torch.stack([version.diffuse(x[i], noise[i], steps[i]) for i in range(n)])
    errors = [version.diffusion_loss(0.1 * noisy[i] + text.mean(), noise[i]) for i in range(n)]
    weights = [min(1 / literal.alpha_bar(s), options.get("max_weight", 1)) for s in steps]
    loss = sum(w * e for w, e in zip(weights, errors, strict=True)) / n
    return max((spy.noisy - noisy).abs().max(), abs(got["loss"] - loss),
               abs(got["error"] - sum(errors) / n)).item()


@pytest.mark.parametrize("options", [{}, dict(max_weight=5.), dict(shift=3., max_weight=2.)])
def test_denoising_loss(options):
    assert compare_denoising(**options) < 1e-5


@pytest.mark.parametrize("old, new", [
    ("math.sqrt(1 - a) * noise", "(1 - a) * noise"),
    ("for k in range(step + 1)", "for k in range(step)"),
    ("product *= 1 - root ** 2", "product *= 1 - (first + k / (steps - 1) * (last - first))"),
    ("math.sqrt(a) * x +", "a * x +"), ("(e - z) ** 2).sum()", "(e - z).abs()).sum()"),
    ("return total / noise.numel()", "return total")])
def test_denoising_loss_sees_the_mistake(old, new):
    assert compare_denoising(literal.mutant(old, new)) > 1e-4


def test_weights_of_the_steps_are_seen():
    assert abs(compare_denoising() - compare_denoising(max_weight=5.)) < 1e-5
    scheduler, x, text = training_scheduler(), torch.randn(6, 4, 2, 3, 3), torch.randn(6, 2, 5)
    torch.manual_seed(1)
    heavy = denoising_loss(Spy(), scheduler, x, text, max_weight=5.)
    assert (heavy["loss"] - heavy["error"]).abs() > 1e-2


@pytest.mark.parametrize("shift", [1., 3.])
def test_timesteps_in_range_and_shifted(shift):
    torch.manual_seed(0)
    u = torch.rand(20_000).double()
    torch.manual_seed(0)
    steps = draw_timesteps(20_000, training_scheduler(), shift)
    assert steps.dtype == torch.long and steps.min() >= 0 and steps.max() <= 999
    assert (steps - (1000 * shift * u / (1 + (shift - 1) * u))).abs().max() <= 1.001
    low = (steps < 500).double().mean()
    assert abs(low - 1 / (1 + shift)) < 0.02    # u < 1/2 becomes u < 1/(1 + shift)


def test_last_timestep_is_not_passed(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *size, **kinds: torch.ones(*size))
    assert (draw_timesteps(3, training_scheduler(), 3.) == 999).all()


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
