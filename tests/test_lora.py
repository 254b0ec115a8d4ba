"""LoRA: through the pipeline as diffusers has it, and trained by the loop and the run notebook."""

import json
import os
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import transformers
from cells import run_cells
from diffusers import DDIMScheduler
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict
from processes import as_processes, ends, on_the_cpu  # noqa: F401
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_trainers import shard_here
from torch import nn

from versvideo.lab.plan import require_training_memory, state_bytes, training_bytes
from versvideo.models.image_vae import build_vae
from versvideo.models.layers import has_lora
from versvideo.models.saving import save_pipeline
from versvideo.models.sizes import SIZES
from versvideo.models.text import ClipSize, build_clip, encode_text, split_clip
from versvideo.models.tokenizer import build_tokenizer
from versvideo.models.unet import VersVideoUNet
from versvideo.pipelines.loading import load_pipeline
from versvideo.pipelines.lora import LORA_LAYERS, add_lora, save_lora
from versvideo.pipelines.text_to_video import VersVideoPipeline
from versvideo.trainers.config import FitConfig
from versvideo.trainers.distributed import process_group
from versvideo.trainers.loading import load_frozen
from versvideo.trainers.loop import fit
from versvideo.trainers.objectives import denoising_loss, training_scheduler
from versvideo.trainers.recipe_unet import assemble, build_unet, resolve_unet

FILE = "pytorch_lora_weights.safetensors"
TO_Q = "middle.spatial.self_attention.to_q"


def awake(module, only=""):
    "Random weights in place of zeros."
    for name, p in module.named_parameters():
        if only in name and not p.any():
            nn.init.normal_(p, std=0.1)
    return module


def build_unet_of(seed=0, **changes):
    torch.manual_seed(seed)
    return awake(VersVideoUNet(**SIZES["smoke"].unet | dict(sample_size=(4, 2, 2), experts=(1, 1)) | changes)).eval()


def build(**changes) -> VersVideoPipeline:
    unet = build_unet_of(**changes)
    tokenizer = build_tokenizer("a red blue circle star".split(), max_length=12)
    tower = ClipSize(width=128, text_layers=1, vision_layers=1, heads=2, image=16, patch=8, projection=16)
    text_encoder = split_clip(build_clip(tokenizer, tower))[0].eval()
    pipe = VersVideoPipeline(build_vae("smoke").eval(), tokenizer, text_encoder, unet, DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe():
    return build()


@torch.no_grad()
def run(pipe):
    "What the denoiser of a pipeline predicts."
    g = torch.Generator().manual_seed(0)
    x, text = torch.randn(1, 4, 3, 4, 4, generator=g), torch.randn(1, 5, 128, generator=g)
    return pipe.unet(x.to(pipe.dtype), 10, text.to(pipe.dtype)).sample


def random_lora(model, seed, rank=2, alpha=2, layers=LORA_LAYERS, name="default"):
    "Add random LoRA layers; gives what `save_lora_weights` takes."
    torch.manual_seed(seed)
    model.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(layers)), name)
    awake(model, "lora_B")
    return get_peft_model_state_dict(model, adapter_name=name), model.peft_config[name].to_dict()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "A folder with a LoRA, and what its pipeline gives."
    pipe, folder = build(), tmp_path_factory.mktemp("lora")
    weights, config = random_lora(pipe.unet, seed=1, alpha=6)
    VersVideoPipeline.save_lora_weights(folder, unet_lora_layers=weights, unet_lora_adapter_metadata=config)
    return folder, run(pipe)


def close(one, other, eps=1e-5):
    torch.testing.assert_close(one, other, rtol=0, atol=eps)


def differ(one, other):
    return (one - other).abs().max() > 1e-3


# The pipeline

def test_file_has_the_layout_of_diffusers(trained):
    with safe_open(trained[0] / FILE, "pt") as file:
        assert f"unet.{TO_Q}.lora_A.weight" in file.keys()
        config = json.loads(file.metadata()["lora_adapter_metadata"])
    assert (config["unet.r"], config["unet.lora_alpha"]) == (2, 6)


@pytest.mark.parametrize("source", [lambda folder: folder, lambda folder: str(folder / FILE)])
def test_load_scale_fuse_and_unload(pipe, trained, source):
    folder, want = trained
    plain = run(pipe)
    pipe.load_lora_weights(source(folder), adapter_name="mine")
    close(run(pipe), want)
    assert differ(want, plain) and pipe.get_active_adapters() == ["mine"]
    assert pipe.get_list_adapters() == {"unet": ["mine"]}
    pipe.set_adapters("mine", 0.0)
    close(run(pipe), plain)
    layer, x = pipe.unet.get_submodule(TO_Q), torch.randn(5, 32)
    assert torch.equal(layer(x), layer.base_layer(x))  # the sums of a whole network depend on where its tensors lie
    pipe.set_adapters(["mine"], [1.0])
    pipe.fuse_lora()
    assert pipe.num_fused_loras == 1
    close(run(pipe), want)
    pipe.unfuse_lora()
    close(run(pipe), want)
    pipe.unload_lora_weights()
    close(run(pipe), plain)
    assert pipe.get_active_adapters() == [] and not any("lora" in name for name in pipe.unet.state_dict())


def test_weights_may_come_as_a_dict(pipe, trained):
    "A dict has no α; it is then the rank."
    pipe.load_lora_weights(load_file(trained[0] / FILE), adapter_name="mine")
    pipe.set_adapters("mine", 3.0)
    close(run(pipe), trained[1])


def test_two_loras_weighed(pipe):
    "On a single layer the weights of two adapters add."
    names = [f"unet.{TO_Q}.lora_{which}.weight" for which in "AB"]
    one, other = ([torch.randn(2, 32), torch.randn(32, 2)] for _ in range(2))
    layer, x = pipe.unet.get_submodule(TO_Q), torch.randn(5, 32)
    want = layer(x) + 0.5 * x @ one[0].T @ one[1].T + 2.0 * x @ other[0].T @ other[1].T
    pipe.load_lora_weights(dict(zip(names, one, strict=True)), adapter_name="one")
    pipe.load_lora_weights(dict(zip(names, other, strict=True)), adapter_name="other")
    pipe.set_adapters(["one", "other"], [0.5, 2.0])
    assert pipe.get_active_adapters() == ["one", "other"]
    close(pipe.unet.get_submodule(TO_Q)(x), want, eps=1e-4)
    pipe.delete_adapters("other")
    pipe.set_adapters("one")
    assert pipe.get_list_adapters() == {"unet": ["one"]}
    with pytest.raises(ValueError, match="one"):
        pipe.load_lora_weights(dict(zip(names, other, strict=True)), adapter_name="one")


def test_fused_pipeline_is_saved_as_any_other(pipe, trained, tmp_path):
    pipe.load_lora_weights(trained[0])
    pipe.fuse_lora()
    with pytest.raises(ValueError, match="call unload_lora_weights"):
        save_pipeline(pipe, tmp_path / "fused")
    assert not (tmp_path / "fused").exists()
    pipe.unload_lora_weights()
    close(run(load_pipeline(save_pipeline(pipe, tmp_path / "fused", dtype=torch.float32), device="cpu")), trained[1])


def test_deleted_lora_leaves_wrapped_layers(pipe, trained, tmp_path):
    plain = run(pipe)
    pipe.load_lora_weights(trained[0], adapter_name="mine")
    pipe.delete_adapters("mine")
    assert pipe.get_list_adapters() == {}
    with pytest.raises(ValueError, match="LoRA layers are in unet: call unload_lora_weights"):
        save_pipeline(pipe, tmp_path / "plain")
    pipe.unload_lora_weights()
    close(run(load_pipeline(save_pipeline(pipe, tmp_path / "plain", dtype=torch.float32), device="cpu")), plain)


def test_fused_projections_take_no_lora(pipe, trained):
    pipe.unet.fuse_qkv_projections()
    with pytest.raises(ValueError, match="unfuse_qkv_projections"):
        pipe.load_lora_weights(trained[0])
    pipe.unet.unfuse_qkv_projections()
    pipe.load_lora_weights(trained[0])
    close(run(pipe), trained[1])


def test_half_precision(trained):
    pipe = build().to(torch.bfloat16)
    plain = run(pipe)
    pipe.load_lora_weights(trained[0])
    assert {p.dtype for p in pipe.unet.parameters()} == {torch.bfloat16} and differ(run(pipe), plain)


def embed(pipe):
    return encode_text(pipe.text_encoder, pipe.tokenizer, ["a red circle"])


def test_text_encoder_too(pipe, tmp_path):
    other, plain = build(), embed(pipe)
    weights, config = random_lora(other.text_encoder, 1, layers=["q_proj", "v_proj"])
    VersVideoPipeline.save_lora_weights(tmp_path, text_encoder_lora_layers=convert_state_dict_to_diffusers(weights),
                                        text_encoder_lora_adapter_metadata=config)
    assert differ(embed(other), plain)
    pipe.load_lora_weights(tmp_path, adapter_name="words")
    close(embed(pipe), embed(other))
    pipe.fuse_lora()
    close(embed(pipe), embed(other))
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    close(embed(pipe), plain)


def test_fusing_is_left_to_the_model(pipe, trained, monkeypatch):
    def refuse(self, *arguments, **options):
        raise ValueError("by the model")
    pipe.load_lora_weights(trained[0])
    monkeypatch.setattr(VersVideoUNet, "fuse_lora", refuse)
    with pytest.raises(ValueError, match="by the model"):
        pipe.fuse_lora()


def pair(layer, out=32, width=32, rank=2):
    return {f"{layer}.lora_A.weight": torch.zeros(rank, width), f"{layer}.lora_B.weight": torch.zeros(out, rank)}


FITS = pair(f"unet.{TO_Q}")
WORDS = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(("weights", "message"), [
    (pair("unet.down_blocks.0.attentions.0.to_q"), r"down_blocks.0.attentions.0.to_q: the model has no such layer"),
    (pair(TO_Q), r"to_q: the model .* save them with pipe.save_lora_weights, or prefix the names with unet\."),
    ({f"unet.{TO_Q}.lora_magnitude_vector": torch.ones(32)}, "DoRA and biases are not supported"),
    ({f"unet.{TO_Q}.lora_B.bias": torch.ones(32)}, "DoRA and biases are not supported"),
    (pair(f"unet.{TO_Q}", width=64), r"its shape is \(32, 64\), that of the layer \(32, 32\)"),
    (pair("text_encoder.encoder.layers.9.self_attn.q_proj"), "layers.9.self_attn.q_proj: the model has no such layer"),
    (pair("text_encoder.text_model.encoder.layers.0.self_attn.q_proj"), r"the layer \(128, 128\)"),
    (dict(list(pair("unet.middle.spatial.proj_in").items())[:1]), "lora_A or lora_B is missing"),
    (pair("unet.middle.spatial.experts.expand", 256), "merge the experts first"),
    ({"unet.middle.lora_alpha": torch.ones(1)}, "lora_alpha: the model has no such layer"),
])
def test_all_fit_or_none_is_loaded(weights, message):
    pipe = build(experts=(2, 2))
    before = set(pipe.unet.state_dict())
    with pytest.raises(ValueError, match=message):
        pipe.load_lora_weights(FITS | weights)
    assert set(pipe.unet.state_dict()) == before and pipe.get_list_adapters() == {}
    pipe.load_lora_weights(FITS)
    assert pipe.get_list_adapters() == {"unet": ["default_0"]}


def test_all_or_nothing_is_fused():
    pipe = build(experts=(2, 2))
    words = {name: torch.randn_like(value) for name, value in pair(WORDS, 128, 128).items()}
    pipe.load_lora_weights(words, adapter_name="mine")
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["expand"]), "mine")
    before = {name: value.clone() for name, value in pipe.text_encoder.state_dict().items()}
    for components, message in ((["text_encoder", "unet"], "merge the experts first"),
                                (["text_encoder", "vae"], r"\{'vae'\} cannot have a LoRA")):
        with pytest.raises(ValueError, match=message):
            pipe.fuse_lora(components=components)
        assert all(torch.equal(value, before[name]) for name, value in pipe.text_encoder.state_dict().items())
    pipe.fuse_lora(components=["text_encoder"])
    assert pipe.num_fused_loras == 1


def test_compiled_networks(pipe, trained):
    words = {name: torch.randn_like(value) for name, value in pair(WORDS, 128, 128).items()}
    said, eager, plain = embed(pipe), pipe.unet, run(pipe)
    pipe.unet, pipe.text_encoder = (torch.compile(model, backend="eager") for model in (eager, pipe.text_encoder))
    seen = lambda: SimpleNamespace(unet=pipe.unet._orig_mod, dtype=torch.float32)
    pipe.load_lora_weights(load_file(trained[0] / FILE) | words, adapter_name="mine")
    with pytest.raises(ValueError, match="LoRA layers are in text_encoder and unet"):
        pipe.save_pretrained("never")
    assert pipe.get_list_adapters() == {"unet": ["mine"], "text_encoder": ["mine"]}
    pipe.set_adapters("mine", 3.0)
    close(run(seen()), trained[1])
    pipe.fuse_lora()
    assert pipe.num_fused_loras == 1
    pipe.unfuse_lora()
    pipe.disable_lora()
    close(run(seen()), plain)
    pipe.unload_lora_weights()
    assert not has_lora(eager) and pipe.unet._orig_mod is eager
    pipe.text_encoder = pipe.text_encoder._orig_mod
    close(embed(pipe), said)


def test_second_lora_of_the_text_encoder_loads_quietly(pipe, caplog):
    words = {name: torch.randn_like(value) for name, value in pair(WORDS, 128, 128).items()}
    level = transformers.logging.get_verbosity()
    pipe.load_lora_weights(words, adapter_name="one")
    want = embed(pipe)
    transformers.logging.add_handler(caplog.handler)
    pipe.load_lora_weights(words, adapter_name="two")
    transformers.logging.remove_handler(caplog.handler)
    assert "MISSING" not in caplog.text and transformers.logging.get_verbosity() == level
    pipe.set_adapters("one")
    close(embed(pipe), want)


def test_lora_of_merged_experts(pipe):
    pipe.load_lora_weights(pair("unet.middle.spatial.experts.expand", 256))


@pytest.mark.parametrize("name", ["pytorch_lora_weights.bin", "lora.pt", FILE])
@pytest.mark.parametrize("given", ["file", "folder", "weight_name"])
def test_pickles_are_not_read(pipe, tmp_path, name, given, monkeypatch):
    torch.save(FITS, tmp_path / name)
    monkeypatch.setattr(torch, "load", None)
    source = tmp_path / name if given == "file" else tmp_path
    with pytest.raises(ValueError, match="pickled files are not read"):
        pipe.load_lora_weights(source, **(dict(weight_name=name) if given == "weight_name" else {}))
    assert pipe.get_list_adapters() == {}


@pytest.mark.parametrize("source", ["/nonexistent", "./lora", "~/lora", "results/my/lora", "lora.safetensors"])
def test_nowhere(pipe, source):
    with pytest.raises(ValueError, match=f"there is no file or folder {source}"):
        pipe.load_lora_weights(source)


def test_not_on_the_hub(pipe):
    with pytest.raises(ValueError, match="nobody/lora has no LoRA weights in safetensors"):
        pipe.load_lora_weights("nobody/lora", local_files_only=True)


def test_empty(pipe):
    with pytest.raises(ValueError, match="there are no LoRA weights: the dict or the file is empty"):
        pipe.load_lora_weights({})


# The loop

TINY = dict(block_out_channels=(8, 8), attention_levels=(True, False), head_dim=4, cross_attention_dim=6, norm_groups=4,
            experts=(2, 2), sample_size=(3, 4, 4))


def start(**changes):
    "A UNet with frozen weights and LoRA layers, always the same."
    torch.manual_seed(0)
    return add_lora(awake(VersVideoUNet(**TINY | changes)), rank=2)


def latent_batch(step, batch_index, kind=torch.float32):
    g = torch.Generator().manual_seed(batch_index)
    frames = 1 if batch_index % 3 == 2 else 3
    return dict(latents=torch.randn(2, 4, frames, 4, 4, generator=g).to(kind),
                text=torch.randn(2, 3, 6, generator=g).to(kind))


def unet_loss(unet, batch):
    return denoising_loss(unet, training_scheduler(), batch["latents"], batch["text"])


def train(folder=None, batch_fn=latent_batch, unet=None, **changes):
    numbers = dict(steps=7, batch_size=2, lr=1e-2, warmup=2, ema_decay=0.9, log_every=3, save_every=3)
    unet = unet or start()
    fit(FitConfig(**numbers | changes), unet, unet_loss, batch_fn, folder, VersVideoUNet.exchange_experts)
    return unet.state_dict()


def test_only_lora_layers_learn_and_only_they_are_kept(tmp_path):
    before, after = start().state_dict(), train(tmp_path)
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed == {name for name in after if ".lora_" in name} and any(".temporal." in name for name in changed)
    for file in ("model", "ema", "optimizer"):
        kept = {name.split("/")[0] for name in load_file(tmp_path / "step-000007" / f"{file}.safetensors")}
        assert kept - {""} == {f"model.{name}" for name in changed}


def test_resumed_run_equals_an_uninterrupted_one(tmp_path):
    class Killed(Exception):
        "The process ended without a word."

    def dies(step, batch_index):
        if step == 5:
            raise Killed
        return latent_batch(step, batch_index)

    want = train(tmp_path / "whole")
    with pytest.raises(Killed):
        train(tmp_path / "parts", dies)
    got = train(tmp_path / "parts", lambda step, k: latent_batch(step, k) if step >= 3 else dies(5, k))
    assert all(torch.equal(got[name], want[name]) for name in want)
    files = (load_file(tmp_path / run / "step-000007/model.safetensors") for run in ("whole", "parts"))
    whole, parts = files
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_gradient_checkpointing_changes_nothing():
    want, unet = train(steps=3), start()
    unet.enable_gradient_checkpointing()
    got = train(unet=unet, steps=3)
    assert max((got[name] - want[name]).abs().max() for name in want) < 1e-6


def test_compilation_changes_nothing(monkeypatch):
    compiled, compile_blocks = [], VersVideoUNet.compile_repeated_blocks

    def eager(unet):
        compiled.append(unet)
        compile_blocks(unet, backend="eager")

    monkeypatch.setattr(VersVideoUNet, "compile_repeated_blocks", eager)
    torch.compiler.reset()
    flat = dict(block_out_channels=(8,), attention_levels=(True,), temporal_levels=(False,))
    got, want = (train(compile=choice, unet=start(**flat), steps=1) for choice in (True, False))
    assert compiled and max((got[name] - want[name]).abs().max() for name in want) < 1e-5


def test_bf16():
    after, before = train(mixed_precision="bf16", ema_decay=None), start().state_dict()
    assert all(torch.equal(after[name], before[name]) != (".lora_" in name) for name in after)


def worker(folder, kind):
    "Train, and leave what this process ended with."
    process_group()
    if kind == "fsdp":
        shard_here()
    state = train(folder / kind, partial(latent_batch, kind=torch.float64), start().double())
    process_group().wait_for_everyone()
    save_file(state, folder / f"{kind}-{os.environ['RANK']}.safetensors")


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_equal_one_with_two_batches(tmp_path, kind):
    assert ends(as_processes(2, worker, tmp_path, kind)) == [0, 0]
    want = train(tmp_path / "one", partial(latent_batch, kind=torch.float64), start().double(), accumulate=2)
    for rank in (0, 1):
        got = load_file(tmp_path / f"{kind}-{rank}.safetensors")
        assert got.keys() == want.keys() and max((got[name] - want[name]).abs().max() for name in want) < 1e-6


# The run

def smoke(folder):
    "A pipeline of size smoke that `init` can name, with unmerged experts."
    torch.manual_seed(0)
    unet = awake(VersVideoUNet(**SIZES["smoke"].unet, sample_size=SIZES["smoke"].latent())).eval()
    return str(save_pipeline(assemble(unet, *load_frozen("smoke")), folder))


def test_notebook_trains_a_lora(tmp_path, capsys):
    init, out = smoke(tmp_path / "init"), tmp_path / "out"
    names = run_cells("20_train_unet.ipynb", init=init, out=str(out), lora_rank=2, lr=0.05, steps=4, save_every=2)
    assert sorted(path.name for path in (out / "lora").iterdir()) == [FILE] and not (out / "weights").exists()
    assert list((out / "samples").glob("*.jpg"))
    said = capsys.readouterr().out
    count = sum(value.numel() for value in load_file(out / "lora" / FILE).values())
    assert f"{count:,} of them are trained" in said
    assert f'load_pipeline("{init}")' in said and f'load_lora_weights("{out / "lora"}")' in said

    pipe = load_pipeline(init, device="cpu")
    draw = lambda pipe: pipe(names["prompts"], generator=torch.Generator().manual_seed(0)).videos
    pipe.set_progress_bar_config(disable=True)
    plain = draw(pipe)
    pipe.load_lora_weights(out / "lora")
    close(draw(pipe), names["clips"])
    assert differ(names["clips"], plain)

    trained = build_unet(names["row"], names["plan"], init, 2)[0]  # and the network as it was at the end
    ema = load_file(out / "checkpoints/step-000004/ema.safetensors")
    trained.load_state_dict({name.removeprefix("model."): ema[name] for name in ema if name != "/steps"}, strict=False)
    x, text = torch.randn(1, 4, 4, 4, 4), torch.randn(1, 5, 128)
    with torch.no_grad():
        close(pipe.unet(x, 10, text).sample, trained.eval()(x, 10, text).sample)
    assert json.loads((out / "config.json").read_text())["lora_rank"] == 2


@pytest.mark.parametrize(("parameters", "message"), [
    (dict(lora_rank=4), "lora_rank=4, init='': LoRA layers are added to a trained model"),
    (dict(lora_rank=-1), "lora_rank=-1: give a whole number"),
    (dict(lora_rank=2, init="sd15", size="XS"), "a trained model with the widths of this size"),
    (dict(lora_rank=4, init="XS", pretrained_share=0.5), "leave pretrained_share out"),
])
def test_notebook_error(parameters, message):
    with pytest.raises(ValueError, match=message):
        run_cells("20_train_unet.ipynb", **parameters)


def test_rank_is_a_whole_number():
    with pytest.raises(ValueError, match="lora_rank=2.5: give a whole number"):
        resolve_unet("XS", init="XS", lora_rank=2.5)


def test_embedded_model_takes_a_lora(tmp_path):
    "Size XS has several experts, its weights come with merged ones; the LoRA is added to exactly these."
    row, _, plan = resolve_unet("XS", init="XS", lora_rank=4)
    unet, _ = build_unet(row, plan, "XS", 4)
    base = load_pipeline("XS", device="cpu").unet
    assert tuple(unet.config.experts) == tuple(base.config.experts) == (1, 1)
    frozen, want = {n.replace(".base_layer", ""): p for n, p in unet.state_dict().items()}, base.state_dict()
    assert {name for name in frozen if ".lora_" not in name} == want.keys()
    assert all(torch.equal(frozen[name], want[name]) for name in want)
    learns = unet.num_parameters(only_trainable=True)
    assert 0 < learns < 0.05 * unet.num_parameters()
    assert save_lora(unet, tmp_path / "lora").joinpath(FILE).stat().st_size < 5 * learns


def test_frozen_weights_need_no_states():
    need, frozen = (training_bytes(SIZES["XS"], "bf16", frozen) for frozen in (False, True))
    assert state_bytes(frozen) < state_bytes(need) / 3
    cfg = FitConfig(steps=1, batch_size=1, lr=1e-4, mixed_precision="bf16")
    require_training_memory("smoke", SIZES["smoke"], cfg, frozen=True)
