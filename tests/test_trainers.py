"""The training loop: what it computes, how it stops and goes on, and what several processes do."""

import copy
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import time
import types
from functools import partial
from pathlib import Path

import literal
import pytest
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from processes import as_processes, ends, on_the_cpu  # noqa: F401
from safetensors.torch import load_file, save_file
from torch import nn

from versvideo.core.prefetch import prefetch
from versvideo.data.batches import LatentBatches, pack_tensors
from versvideo.data.shards import write_shards
from versvideo.media.pixels import to_signed
from versvideo.models.image_vae import build_vae
from versvideo.models.latents import encode_clips, fit_latent_scale
from versvideo.models.saving import change_config
from versvideo.models.unet import VersVideoUNet
from versvideo.modules.moe import expert_spread
from versvideo.trainers import checkpoints, distributed, loading
from versvideo.trainers.batches import draw_latents, is_image_batch
from versvideo.trainers.checkpoints import TrainState
from versvideo.trainers.config import FitConfig
from versvideo.trainers.distributed import process_group
from versvideo.trainers.loading import base_of, cached_latents, load_frozen
from versvideo.trainers.log import run_folder
from versvideo.trainers.loop import fit
from versvideo.trainers.objectives import (
    autoencoder_loss,
    denoising_loss,
    draw_timesteps,
    training_scheduler,
)

KILLS = 50
UNET = dict(block_out_channels=(8,), attention_levels=(False,), head_dim=4,
            cross_attention_dim=6, experts=(2, 2), norm_groups=4)


def build_unet(seed=0):
    torch.manual_seed(seed)
    return VersVideoUNet(**UNET)


def latent_batch(step, batch_index):
    "Clips, or images when it is their turn."
    g = torch.Generator().manual_seed(batch_index)
    image = is_image_batch(step, batch_index, 1, 0.5)
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
    def batch(now, batch_index):
        if now == step:
            raise Killed
        return batch_fn(now, batch_index)
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
        lambda step, batch_index: dict(x=data[step, 0], y=data[step, 1]))
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

        def batch(step, batch_index):
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
        lambda step, batch_index: dict(x=torch.full((1, 1), values[step])))
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
    for name in ("model", "optimizer", "ema"):
        whole, parts = (load_file(tmp_path / run / "step-000007" / f"{name}.safetensors")
                        for run in ("whole", "parts"))
        assert whole.keys() == parts.keys() and all(torch.equal(whole[n], parts[n]) for n in whole)
    whole = load_file(tmp_path / "whole" / "step-000007" / "model.safetensors")
    assert any((whole[f"model.{n}"] - p).abs().max() > 1e-4 for n, p in want.named_parameters()), \
        "the moving average is the model itself: the comparison says nothing about it"


@pytest.mark.parametrize("forgotten", ["model", "optimizer", "ema", "schedule"])
def test_resume_needs_all_that_is_saved(tmp_path, forgotten, monkeypatch):
    want, _ = train()
    with pytest.raises(Killed):
        train(tmp_path, dies_at(4, latent_batch))
    restore = TrainState.restore

    def forgetful(self, found):
        now = self.collect()
        restore(self, found | {k: v for k, v in now.items() if k == forgotten})

    monkeypatch.setattr(TrainState, "restore", forgetful)
    if forgotten == "schedule":
        monkeypatch.setattr("torch.optim.lr_scheduler.LambdaLR.load_state_dict", lambda *a: None)
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
    monkeypatch.setattr(distributed.PartialState(), "num_processes", 2)
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


@pytest.mark.parametrize("name, part", [("vae", "image_vae"), ("clip", "text_encoder")])
def test_pickled_weights_are_refused(tmp_path, name, part):
    folder = tmp_path / "given" / ("" if name == "vae" else part)
    shutil.copytree(base_of("XS") / part, folder)
    for weights in folder.glob("*.safetensors"):
        weights.unlink()
        torch.save({}, folder / ("pytorch_model.bin" if name == "clip" else f"{weights.stem}.bin"))
    with pytest.raises(FileNotFoundError, match="from .safetensors alone"):
        load_frozen("XS", **{name: str(tmp_path / "given")})


def test_two_newest_checkpoints_are_kept(tmp_path):
    train(tmp_path, save_every=1, steps=5)
    assert names(tmp_path) == ["step-000004", "step-000005"]


def test_nan_loss_stops_and_leaves_the_last_checkpoint(tmp_path):
    want, _ = train()

    def broken(step, batch_index):
        batch = latent_batch(step, batch_index)
        return batch | {"latents": batch["latents"] * float("nan")} if step == 5 else batch

    with pytest.raises(RuntimeError, match=r"loss is nan at step 5: lower lr=0\.01"):
        train(tmp_path, broken, skips=0)
    assert names(tmp_path) == ["bad.json", "step-000003"]
    assert json.loads((tmp_path / "bad.json").read_text()) == [
        dict(step=5, batches_seen=[5, 5], fault="loss is nan", seed=0)]
    assert all(w.isfinite().all()
               for w in load_file(tmp_path / "step-000003/model.safetensors").values())
    got, _ = train(tmp_path)
    assert far(got, want) == 0


def test_nan_gradient_of_a_finite_loss_stops_before_the_weights_are_nan(tmp_path):
    def loss(m, batch):
        return {"loss": 1 + (m(batch["x"]) * batch["x"]).square().sum().sqrt()}

    model = nn.Linear(1, 1)
    with pytest.raises(RuntimeError, match="gradient is nan at step 4"):
        fit(numbers(save_every=1, skips=0), model, loss,
            lambda step, batch_index: dict(x=torch.full((1, 1), float(step != 4))), tmp_path)
    assert model.weight.isfinite().all()
    assert names(tmp_path) == ["bad.json", "step-000003", "step-000004"]


@pytest.mark.filterwarnings("ignore:the loss is")
def test_bad_steps_are_left_out_and_counted_over_a_stop(tmp_path):
    "As if they had not been, but for their place in the schedule; a stop forgets none of them."
    def broken(step, batch_index):
        batch = latent_batch(step, batch_index)
        return batch | {"latents": batch["latents"] * float("nan")} if step in (2, 5) else batch

    want, rows = train(tmp_path / "whole", broken, steps=8)
    with pytest.raises(Killed):
        train(tmp_path / "parts", dies_at(4, broken), steps=8)
    got, again = train(tmp_path / "parts", broken, steps=8)
    assert far(got, want) == 0 and again == rows
    curve = json.loads((tmp_path / "parts/step-000008/curve.json").read_text())
    assert [bad["step"] for bad in curve["bad"]] == [2, 5]
    assert all(row["loss"] < 1e3 for row in rows) and far(want, build_unet()) < 1
    with pytest.raises(RuntimeError, match="2 steps were bad, 1 may be"):
        train(tmp_path / "fewer", broken, steps=8, skips=1)


def test_curve_of_a_resumed_run_forgets_no_step(tmp_path):
    _, rows = train(tmp_path / "whole", save_every=2, log_every=3)
    with pytest.raises(Killed):
        train(tmp_path / "parts", dies_at(5, latent_batch), save_every=2, log_every=3)
    assert train(tmp_path / "parts", save_every=2, log_every=3)[1] == rows


@pytest.mark.parametrize("save_every", [3, 4])
def test_full_disk_costs_one_checkpoint(tmp_path, monkeypatch, save_every):
    "In the middle the run goes on and says so; at the end there is nothing to go on to."
    want, rows = train()
    write = checkpoints.save_file

    def full(tensors, path):
        if "step-000006" in str(path) or "step-000007" in str(path):
            Path(path).write_bytes(b"half")
            raise OSError("no space left on device")
        return write(tensors, path)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="step-00000. is whole"):
        patch.setattr(checkpoints, "save_file", full)
        if save_every == 3:
            with pytest.warns(UserWarning, match="step 6 could not be written.*the run goes on"):
                train(tmp_path, save_every=save_every)
        else:
            train(tmp_path, save_every=save_every)
    assert names(tmp_path) == [f"step-{save_every:06d}"]
    got, again = train(tmp_path, save_every=save_every)
    assert far(got, want) == 0 and again == rows


def test_checkpoints_are_safetensors_and_json(tmp_path):
    train(tmp_path, steps=3)
    assert names(tmp_path / "step-000003") == ["curve.json", "ema.safetensors", "fit.json",
                                               "model.safetensors", "optimizer.safetensors",
                                               "state.json"]
    (tmp_path / "step-000003/optimizer.bin").write_bytes(b"cos\nsystem")
    with pytest.raises(ValueError, match="has optimizer.bin: pickles are not read"):
        train(tmp_path, steps=3)


def test_checkpoint_weights_have_the_names_of_the_model(tmp_path):
    train(tmp_path, steps=3)
    saved = load_file(tmp_path / "step-000003/model.safetensors")
    assert {f"model.{n}" for n, _ in build_unet().named_parameters()} == set(saved)


def test_killed_at_any_moment(tmp_path):
    """A process killed again and again, while it saves, too, ends as one that never was.

    Children are forked, as starting Python every time would take minutes; only they train.
    """
    chance = random.Random(0)

    def child(folder):
        torch.set_num_threads(1)   # those of the parent did not come along
        unet = build_unet()
        fit(numbers(steps=30, save_every=2), unet, unet_loss, latent_batch, folder, exchange)
        save_file(unet.state_dict(), folder / "end.safetensors")

    def start(folder):
        folder.mkdir(exist_ok=True)
        process = multiprocessing.get_context("fork").Process(target=child, args=(folder,))
        process.start()
        return process

    begin = time.monotonic()
    assert ends([start(tmp_path / "whole")]) == [0]
    lasts, kills, saving = time.monotonic() - begin, 0, 0
    while not (tmp_path / "parts" / "end.safetensors").exists():
        process = start(tmp_path / "parts")
        process.join(chance.uniform(0.05, 0.3) * lasts if kills < KILLS else 120)
        assert kills < KILLS or not process.is_alive(), "it hangs"
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.join()
        saving += any((tmp_path / "parts").glob(".*.partial"))
        if kills < KILLS and (tmp_path / "parts" / "end.safetensors").exists():   # again from the start
            shutil.rmtree(tmp_path / "parts")
    assert kills == KILLS and saving > 0, (kills, saving)
    print(f"{kills} kills, {saving} while it saved")
    for name in ("end", "step-000030/model", "step-000030/optimizer", "step-000030/ema"):
        whole, parts = (load_file(tmp_path / run / f"{name}.safetensors")
                        for run in ("whole", "parts"))
        assert whole.keys() == parts.keys() and all(torch.equal(whole[n], parts[n]) for n in whole)
    whole, parts = (json.loads((tmp_path / run / "step-000030/curve.json").read_text())
                    for run in ("whole", "parts"))
    for curve in (whole, parts):
        for row in curve["rows"]:
            del row["seconds"]
        del curve["seconds"]
    assert whole == parts


# Several processes

def shard_here():
    "Let accelerate shard on CPUs, which it does on GPUs alone."
    Accelerator(cpu=True)
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2,
                                            auto_wrap_policy="transformer_based_wrap")
    for state in (PartialState, AcceleratorState):
        state._shared_state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["fsdp_plugin"] = plugin


def rank_of(model, rank, world):
    "A validation: that the averaged weights compute, and the number of the process."
    clip = double_batch(9, 1)
    assert not model.training and model(clip["latents"], 5, clip["text"]).sample.isfinite().all()
    return dict(loss=torch.tensor(1. + rank), expert_spread=expert_spread(model))


def worker(folder, name, kind="ddp", batch_fn=latent_batch, minutes=10, **changes):
    "Train, and leave what this process ended with, or what stopped it."
    rank = int(os.environ["RANK"])
    process_group(minutes)
    if kind == "fsdp":
        shard_here()
    try:
        unet = build_unet(seed=0 if kind == "fsdp" else rank)   # wrapped ones agree by themselves
        log = fit(numbers(**changes), unet.double(), unet_loss, batch_fn, folder / name, exchange, validate=rank_of)
    except Exception as error:
        (folder / f"error-{rank}.txt").write_text(f"{type(error).__name__}: {error}")
        os._exit(3)
    process_group().wait_for_everyone()   # a notebook goes on together
    save_file(unet.state_dict(), folder / f"{name}-{rank}.safetensors")
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in log.rows]
    (folder / f"{name}-{rank}.json").write_text(json.dumps(rows))


def double_batch(step, batch_index):
    return {name: value.double() for name, value in latent_batch(step, batch_index).items()}


def alone(folder, **changes):
    "The same in this process."
    unet = build_unet().double()
    fit(numbers(**changes), unet, unet_loss, double_batch, folder, exchange)
    return unet.state_dict()


def furthest(ours, theirs):
    assert ours.keys() == theirs.keys()
    return max((ours[n].double() - theirs[n].double()).abs().max().item() for n in theirs)


def test_two_processes_equal_one_with_two_batches(tmp_path):
    "Weights, moments, moving average and experts, after 20 steps with images and clips."
    more = dict(steps=20, save_every=10)
    work = partial(worker, tmp_path, "two", "ddp", double_batch, track="tensorboard", **more)
    codes = ends(as_processes(2, work))
    assert codes == [0, 0], [p.read_text() for p in tmp_path.glob("error-*")]
    want = alone(tmp_path / "one", accumulate=2, **more)
    for rank in (0, 1):
        assert furthest(load_file(tmp_path / f"two-{rank}.safetensors"), want) < 1e-6
    for file in ("model", "optimizer", "ema"):
        one, two = (load_file(tmp_path / run / f"step-000020/{file}.safetensors")
                    for run in ("one", "two"))
        assert furthest(two, one) < 1e-6
    start = build_unet().double().state_dict()
    assert [n for n in want if torch.equal(want[n], start[n])] == [], "a part was not trained"
    rows = [json.loads((tmp_path / f"two-{rank}.json").read_text()) for rank in (0, 1)]
    assert list((tmp_path / "two").rglob("events.out.*"))
    trained, validated = ([r for r in rows[0] if key in r] for key in ("loss", "valid_loss"))
    assert rows[0] == rows[1] and all(r["image_loss"] > 0 and r["clip_loss"] > 0 for r in trained)
    assert [r["valid_loss"] for r in validated] == [1.5, 1.5]


def test_one_process_that_is_wrapped_trains_on_images_and_clips(tmp_path):
    "As torchrun starts one on a GPU: DDP wants a gradient of every parameter."
    def work():
        Accelerator(cpu=True)
        worker(tmp_path, "run", "ddp", double_batch, steps=4)

    assert ends(as_processes(1, work)) == [0], [p.read_text() for p in tmp_path.glob("error-*")]


@pytest.mark.parametrize(("kind", "count"), [("ddp", 1), ("ddp", 3), ("fsdp", 3)])
def test_two_processes_go_on_as_one_or_three(tmp_path, kind, count):
    "What two wrote, others read; the batches follow on, none twice and none left out."
    more = dict(steps=9, save_every=3)
    seen = tmp_path / "seen"
    seen.mkdir()

    def noted(step, batch_index):
        (seen / f"{step}-{batch_index}").touch()
        return double_batch(step, batch_index)

    codes = ends(as_processes(2, partial(worker, tmp_path, "run", kind, dies_at(5, noted), **more)))
    assert codes == [3, 3] and (tmp_path / "run/step-000003").is_dir()
    for late in seen.glob("[34]-*"):
        late.unlink()   # these are done again
    codes = ends(as_processes(count, partial(worker, tmp_path, "run", kind, noted, **more)))
    assert codes == [0] * count, [p.read_text() for p in tmp_path.glob("error-*")]
    pairs = sorted(tuple(map(int, p.name.split("-"))) for p in seen.iterdir())
    assert pairs == [(step, 2 * step + k) for step in range(3) for k in (0, 1)] + [
        (step, 6 + count * (step - 3) + k) for step in range(3, 9) for k in range(count)]
    with pytest.raises(Killed):
        unet = build_unet().double()
        fit(numbers(accumulate=2, **more), unet, unet_loss, dies_at(5, double_batch),
            tmp_path / "alone", exchange)
    want = alone(tmp_path / "alone", accumulate=count, **more)
    assert furthest(load_file(tmp_path / "run-0.safetensors"), want) < 1e-6
    rows = json.loads((tmp_path / "run-0.json").read_text())
    validated = [row for row in rows if "valid_loss" in row]
    assert [row["valid_loss"] for row in validated] == [1.5, (1 + count) / 2, (1 + count) / 2]   # the mean of the ranks
    assert all(row["valid_expert_spread"] > 0 for row in validated) and (tmp_path / "run/best").is_dir()
    for file in ("model", "optimizer", "ema"):
        one, several = (load_file(tmp_path / run / f"step-000009/{file}.safetensors") for run in ("alone", "run"))
        assert furthest(several, one) < 1e-6


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_process_ends_the_others(tmp_path, how):
    "Killed, or hanging: the other one says so, within the time it was given."
    def dying(step, batch_index):
        if step == 5 and batch_index % 2:
            os.kill(os.getpid(), how)
        return double_batch(step, batch_index)

    processes = as_processes(2, partial(worker, tmp_path, "run", "ddp", dying, minutes=0.1))
    processes[0].join(60)
    assert processes[0].exitcode == 3
    processes[1].kill()
    message = (tmp_path / "error-0.txt").read_text()
    assert "another of the 2 processes has ended, or does not answer" in message
    assert [p.name for p in (tmp_path / "run").glob("step-*")] == ["step-000003"]


def test_processes_with_folders_of_their_own_are_refused(tmp_path):
    "Two machines that share no disk: one would go on where the other starts."
    def work():
        worker(tmp_path, "run" if os.environ["RANK"] == "0" else "other", "ddp", double_batch)

    alone(tmp_path / "run", steps=7)
    assert ends(as_processes(2, work)) == [3, 3]
    assert "must be one folder" in (tmp_path / "error-1.txt").read_text()


def test_one_process_asked_to_stop_stops_all(tmp_path):
    def asked(step, batch_index):
        if batch_index == 9:
            os.kill(os.getpid(), signal.SIGTERM)
        return double_batch(step, batch_index)

    assert ends(as_processes(2, partial(worker, tmp_path, "run", "ddp", asked))) == [0, 0]
    assert names(tmp_path / "run") == ["best", "step-000003", "step-000005"]
    assert not list(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize("fails", [False, True])
def test_makers_left_in_the_middle_end_with_the_process_they_serve(fails):
    def leaves_them():
        unfinished.append(prefetch(abs, range(9), workers=2))   # as a notebook holds them
        assert next(unfinished[0]) == 0
        if fails:
            raise ValueError

    unfinished = []
    assert ends(as_processes(1, leaves_them), timeout=20) == [int(fails)]


def test_makers_outlive_a_signal_and_change_nothing(tmp_path):
    "A scheduler signals every process of a job; what makes batches ahead serves until all is saved."
    def asked(step, batch_index):
        if batch_index == 9:
            os.kill(os.getppid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
        return double_batch(step, batch_index)

    assert ends(as_processes(2, partial(worker, tmp_path, "run", "ddp", asked, workers=1))) == [0, 0]
    assert (tmp_path / "run/step-000003").is_dir()
    assert not list(tmp_path.glob("*.safetensors"))
    assert ends(as_processes(2, partial(worker, tmp_path, "run", "ddp", double_batch))) == [0, 0]
    assert ends(as_processes(2, partial(worker, tmp_path, "plain", "ddp", double_batch))) == [0, 0]
    ours, theirs = (load_file(tmp_path / f"{name}-0.safetensors") for name in ("run", "plain"))
    assert furthest(ours, theirs) < 1e-12


def test_every_process_validates_its_share(tmp_path):
    "With the averaged weights, and leaves the others as they are."
    def work():
        process_group()
        unet, seen = build_unet(), []

        def validate(model, rank, world):
            assert not model.training
            clip = latent_batch(9, 1)
            assert model(clip["latents"], 5, clip["text"]).sample.isfinite().all()
            seen.append((rank, world))
            return dict(loss=torch.tensor(1. + rank))

        log = fit(numbers(), unet, unet_loss, latent_batch, tmp_path / "run", exchange,
                  validate=validate)
        rank = int(os.environ["RANK"])
        found = dict(seen=seen, rows=[r["valid_loss"] for r in log.rows if "valid_loss" in r])
        (tmp_path / f"{rank}.json").write_text(json.dumps(found))
        save_file(unet.state_dict(), tmp_path / f"{rank}.safetensors")

    assert ends(as_processes(2, work)) == [0, 0]
    for rank in (0, 1):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == dict(
            seen=[[rank, 2]] * 3, rows=[1.5] * 3)
    unet = build_unet()
    fit(numbers(accumulate=2), unet, unet_loss, latent_batch, after_step=exchange)
    assert furthest(load_file(tmp_path / "0.safetensors"), unet.state_dict()) < 1e-4
    assert names(tmp_path / "run") == ["best", "step-000006", "step-000007"]


# Which batch is whose

@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("every", [2, 4])
def test_image_batches_have_their_share(world, every):
    batches_seen = [[is_image_batch(step, step * world + rank, 5, 1 / every) for rank in range(world)]
             for step in range(5, 5 + 12 * every)]
    assert sum(map(sum, batches_seen)) == 12 * world
    assert all(is_image_batch(step, step * world + rank, 5, 1 / every)
               for step in range(5) for rank in range(world))
    if world % every == 0:
        assert all(sum(batch_index) == world // every for batch_index in batches_seen)


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
            frame = clips[b, :, t]
            mean = vae.encode(to_signed(frame[None])).latent_dist.mean[0]
            assert (z[b, :, t] - (mean - 0.5) * 2).abs().max() < 1e-5
    assert (encode_clips(vae, clips) - z).abs().max() < 1e-5
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


def test_shards_teach_what_pixels_teach(vae, tmp_path):
    "Latents and embeddings from shards, or encoded anew from the same clips, batch by batch."
    fit_latent_scale(vae, World().clips)
    world = World()
    embeddings = torch.randn(9, 2, 3, 6)   # of two captions each

    def make(numbers):
        return [pack_tensors(dict(latents=encode_clips(vae, world.clips[i:i + 1])[0],
                                   text=embeddings[i])) for i in numbers]

    write_shards(make, 9, tmp_path / "shards", 4)
    batches = LatentBatches(tmp_path / "shards", 2, fraction=0.5)

    def from_pixels(step, batch_index):
        image = is_image_batch(step, batch_index, 1, 0.5)
        g = torch.Generator().manual_seed(batch_index)
        clips = batches.numbers(batch_index, image)
        said = [int(torch.randint(2, (), generator=g)) for _ in clips]
        z = torch.cat([encode_clips(vae, world.clips[i:i + 1]) for i in clips])
        if image:
            frames = [int(torch.randint(2, (), generator=g)) for _ in clips]
            z = torch.stack([one[:, [t]] for one, t in zip(z, frames, strict=True)])
        text = [embeddings[i, k] for i, k in zip(clips, said, strict=True)]
        return dict(latents=z, text=torch.stack(text))

    ours, rows = train(
        batch_fn=lambda step, batch_index: batches(batch_index, is_image_batch(step, batch_index, 1, 0.5)))
    theirs, others = train(batch_fn=from_pixels)
    assert far(ours, theirs) < 1e-6 and far(ours, build_unet()) > 1e-3
    assert [r["loss"] for r in rows] == pytest.approx([r["loss"] for r in others])


def test_half_made_latents_are_not_kept(vae, tmp_path, monkeypatch):
    def full(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError("no space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
        patch.setattr(loading, "save_file", full)
        cached_latents(tmp_path / "latents.safetensors", vae, World(), 3)
    assert names(tmp_path) == []


def test_autoencoder_loss(vae):
    pixels = torch.rand(2, 3, 16, 16)
    x = 2 * pixels - 1
    torch.manual_seed(3)
    got = autoencoder_loss(vae, {"pixels": pixels}, kl_weight=0.1)
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
