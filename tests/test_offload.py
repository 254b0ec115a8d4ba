"""Every network is at home in diffusers: offloading, casting, fusing, quantising, compiling and exporting."""

import copy
from dataclasses import replace

import pytest
import test_pipeline
import torch
from accelerate import cpu_offload
from accelerate.hooks import CpuOffload
from diffusers.hooks import group_offloading
from diffusers.hooks.group_offloading import GroupOffloadingConfig, ModuleGroup, _apply_group_offloading
from diffusers.models.attention_processor import Attention
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin, QuantizationMethod
from peft import LoraConfig
from PIL import Image
from torch import nn

from versvideo.models.controlnet import VersVideoControlNet
from versvideo.models.layers import LayeredModel, has_lora
from versvideo.models.style import StyleAdapter
from versvideo.models.text import ClipSize, build_clip, split_clip
from versvideo.models.unet import VersVideoUNet
from versvideo.models.vae import TCMVAE
from versvideo.modules.moe import ExpertLinear

UNET = dict(block_out_channels=(8, 16), attention_levels=(True, False), head_dim=4, cross_attention_dim=6,
            experts=(2, 3), norm_groups=4, temporal_attentions=2, mec=dict(magnitude=True))
CONTROL = dict(conditions=dict(canny=1, image=4), adapter_channels=(4, 4))
VAE = dict(block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2, refinement_channels=(8, 8),
           down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)


def inputs(b=2):
    g = torch.Generator().manual_seed(1)
    conditions = dict(canny=torch.rand(b, 1, 3, 8, 12, generator=g), image=torch.rand(b, 4, 3, 8, 12, generator=g))
    return torch.randn(b, 4, 3, 4, 6, generator=g), torch.randn(b, 5, 6, generator=g), conditions


def build(name):
    "A network in which nothing is zero and no two experts are the same."
    torch.manual_seed(0)
    kind = name.split()[-1]
    model = dict(unet=lambda: VersVideoUNet(**UNET), control=lambda: VersVideoControlNet(**CONTROL, **UNET),
                 vae=lambda: TCMVAE(**VAE), style=lambda: StyleAdapter(8, 6, 2))[kind]().eval()
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return model.merge_experts() if "merged" in name else model


@torch.no_grad()
def run(model):
    "All that a network gives, as one vector."
    z, text, conditions = inputs()
    if isinstance(model, VersVideoUNet):
        out = [model(z, 7, text).sample]
    elif isinstance(model, VersVideoControlNet):
        scales = dict(canny=[[1.0], [0.0]])
        down, middle = model(z, 7, text, conditions, scales, return_dict=False)
        out = [*down, middle]
    elif isinstance(model, StyleAdapter):
        out = [model(z.flatten()[:16].view(2, 8))]
    else:
        frames = conditions["image"][:, :3, 0]
        out = [model.decode(z).sample, model.encode(frames).latent_dist.mode(), model(frames).sample]
    return torch.cat([y.flatten() for y in out])


NETWORKS = ("unet", "merged unet", "control", "merged control", "vae", "style")


# Offloading: weights are NaN until a hook has loaded them

class StandInStream:
    "A stream of a device: what it copies is there once it is waited for."

    def __init__(self):
        self.copies = []

    def synchronize(self):
        while self.copies:
            self.copies.pop(0)()


def fill(tensors, kept):
    "Take the numbers away from tensors; `kept` has them."
    for tensor in tensors:
        if tensor.is_floating_point():
            kept.setdefault(tensor, tensor.data)
            tensor.data = torch.full_like(kept[tensor], torch.nan)


def give_back(tensors, kept):
    for tensor in tensors:
        if tensor in kept:
            tensor.data = kept[tensor]


@pytest.fixture
def stand_in(monkeypatch):
    "Groups of diffusers' offloading on a device that this machine does not have."
    kept = {}

    def tensors(group):
        modules = [t for m in group.modules for t in (*m.parameters(), *m.buffers())]
        return modules + list(group.parameters) + list(group.buffers)

    def offload(group):
        fill(tensors(group), kept)
        group.offload_device = torch.device("cpu")   # where diffusers looks whether a group is away

    def load(group):
        if group.stream is not None:
            group.stream.synchronize()
            group.stream.copies.append(lambda: give_back(tensors(group), kept))
            if not group.non_blocking:
                group.stream.synchronize()
        else:
            give_back(tensors(group), kept)
        group.offload_device = torch.device("meta")

    monkeypatch.setattr(ModuleGroup, "offload_", offload)
    monkeypatch.setattr(ModuleGroup, "onload_", load)
    monkeypatch.setattr(ModuleGroup, "_to_cpu", staticmethod(lambda tensor, low: tensor.data))


def offload(model, kind, blocks=None, stream=False):
    "Group offloading as `enable_group_offload` of a model applies it; streams it would refuse on this machine."
    cpu = torch.device("cpu")
    config = GroupOffloadingConfig(
        onload_device=cpu, offload_device=cpu, offload_type=group_offloading.GroupOffloadingType(kind),
        non_blocking=False, record_stream=False, low_cpu_mem_usage=True, num_blocks_per_group=blocks,
        block_modules=getattr(model, "_group_offload_block_modules", None))
    _apply_group_offloading(model, replace(config, stream=StandInStream() if stream else None))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind, blocks", [("block_level", 1), ("block_level", 2), ("leaf_level", None)])
@pytest.mark.parametrize("name", NETWORKS)
def test_group_offload(stand_in, name, kind, blocks, stream):
    model = build(name)
    want = run(model)
    offload(model, kind, blocks, stream)
    assert any(p.isnan().any() for p in model.parameters())
    for _ in range(3):                                     # streams load ahead from the second time on
        assert torch.equal(run(model), want)
    assert stream or all(p.isnan().any() for p in model.parameters())          # and all is away again


@pytest.mark.parametrize("name", NETWORKS)
def test_offload_to_disk(tmp_path, name):
    model = build(name)
    want = run(model)
    model.enable_group_offload(torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1,
                               offload_to_disk_path=str(tmp_path))
    for p in model.parameters():
        p.data.fill_(torch.nan)                            # as good as what is there while the file has the weights
    assert torch.equal(run(model), want)


@pytest.mark.parametrize("network, name", [(LayeredModel, "unet"), (LayeredModel, "control")])
def test_a_missed_hook_is_noticed(stand_in, monkeypatch, network, name):
    monkeypatch.setattr(network, "_group_offload_block_modules", None)
    model = build(name)
    offload(model, "block_level", 1)
    assert run(model).isnan().any()


@pytest.mark.parametrize("name, groups", [("unet", 9), ("control", 8), ("vae", 14)])
def test_blocks_take_turns(stand_in, monkeypatch, name, groups):
    "Loaded at a time: what lies beside the blocks, one of them, and where it is a level of the decoder its TCM."
    model, loaded, seen = build(name), set(), set()
    offload(model, "block_level", 1)
    load, leave = ModuleGroup.onload_, ModuleGroup.offload_

    def watched_load(group):
        load(group)
        loaded.add(group)
        seen.add(group)
        assert len(loaded) <= 2 + (name == "vae")

    monkeypatch.setattr(ModuleGroup, "onload_", watched_load)
    monkeypatch.setattr(ModuleGroup, "offload_", lambda group: leave(group) or loaded.discard(group))
    run(model)
    assert len(seen) == groups and not loaded


@pytest.mark.parametrize("name", NETWORKS)
def test_sequential_offload(name):
    "Accelerate keeps the weights on the meta device until a hook loads them."
    model = build(name)
    want = run(model)
    cpu_offload(model, torch.device("cpu"), offload_buffers=len(model._parameters) > 0)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert torch.equal(run(model), want)


def whole_pipeline():
    "A pipeline with all its networks."
    pipe = test_pipeline.build()
    width = pipe.unet.config.cross_attention_dim
    tower = ClipSize(width=128, text_layers=1, vision_layers=1, heads=2, image=16, patch=8, projection=16)
    control = VersVideoControlNet.from_unet(pipe.unet, dict(canny=1, image=4), adapter_channels=(4, 4, 4, 4))
    vae = TCMVAE.from_image_vae(pipe.vae, refinement_channels=(8, 8))
    parts = dict(vae=vae, controlnet=control, style_adapter=StyleAdapter(16, width),
                 image_encoder=split_clip(build_clip(pipe.tokenizer, tower))[1])
    for part in parts.values():
        for p in part.eval().parameters():
            p.data += 0.1 * torch.randn_like(p)
    pipe.register_modules(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe):
    g = torch.Generator().manual_seed(0)
    edges, picture = torch.rand(1, 1, 2, 16, 16, generator=g), Image.new("RGB", (16, 16), "red")
    return pipe("a red circle", num_frames=2, height=16, width=16, num_inference_steps=2, generator=g, image=picture,
                conditions=dict(canny=edges), style_image=picture, hold_image=True).videos


@pytest.fixture(scope="module")
def pipe():
    return whole_pipeline()


@pytest.fixture(scope="module")
def video(pipe):
    return sample(pipe)


def poisoned(pipe, monkeypatch):
    "Accelerate's hooks of whole models on a device that this machine does not have."
    kept = {}
    monkeypatch.setattr(CpuOffload, "init_hook", lambda hook, m: fill(m.parameters(), kept) or m)

    def load(hook, module, *args, **kwargs):
        if hook.prev_module_hook is not None:
            hook.prev_module_hook.offload()
        give_back(module.parameters(), kept)
        return args, kwargs

    monkeypatch.setattr(CpuOffload, "pre_forward", load)
    pipe.enable_model_cpu_offload(device="cpu")


@pytest.mark.parametrize("enable", [
    lambda pipe, _: pipe.enable_group_offload(torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1),
    lambda pipe, _: pipe.enable_group_offload(torch.device("cpu"), offload_type="leaf_level"),
    lambda pipe, _: [cpu_offload(m, torch.device("cpu")) for m in pipe.components.values() if isinstance(m, nn.Module)],
    poisoned], ids=["block", "leaf", "sequential", "model"])
def test_a_pipeline_offloads(stand_in, monkeypatch, pipe, video, enable):
    twin = whole_pipeline()
    enable(twin, monkeypatch)
    networks = [m for m in twin.components.values() if isinstance(m, nn.Module)]
    assert all(any(p.is_meta or p.isnan().any() for p in m.parameters()) for m in networks)
    for _ in range(2):
        assert torch.equal(sample(twin), video)


def test_the_controlnet_is_away_while_decoding(monkeypatch):
    pipe, seen = whole_pipeline(), []
    poisoned(pipe, monkeypatch)
    decode, away = pipe.vae.decode, lambda: all(p.isnan().all() for p in pipe.controlnet.parameters())
    pipe.vae.decode = lambda *args, **options: seen.append(away()) or decode(*args, **options)
    sample(pipe)
    assert seen and all(seen)


def test_merging_comes_before_a_group_offload(stand_in):
    unet = build("unet")
    offload(unet, "block_level", 1)
    with pytest.raises(ValueError, match="merge first"):
        unet.merge_experts()
    assert tuple(unet.config.experts) == UNET["experts"]


# Casting

@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("name", NETWORKS)
def test_layerwise_casting(name, storage):
    model = build(name)
    want = run(model)
    model.enable_layerwise_casting(storage_dtype=storage, compute_dtype=torch.float32)
    layers = [m for m in model.modules() if type(m) in (nn.Linear, ExpertLinear, nn.Conv1d, nn.Conv2d, nn.Conv3d)]
    assert {m.weight.dtype for m in layers} == {storage}
    assert 0 < (run(model) - want).norm() < (0.1 if storage == torch.bfloat16 else 0.5) * want.norm()


def test_casting_and_offloading_together(stand_in):
    model = build("merged unet")
    model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    want = run(model)
    offload(model, "block_level", 1)
    assert torch.equal(run(model), want)


# Fusing

def with_lora(name, *targets):
    model = build(name)
    model.add_adapter(LoraConfig(r=2, target_modules=list(targets), init_lora_weights=False), "style")
    return model


def test_lora_of_several_experts_is_not_fused():
    unet = with_lora("unet", "to_q", "expand")
    before = copy.deepcopy(unet.state_dict())
    with pytest.raises(ValueError, match="merge the experts first"):
        unet.fuse_lora()
    assert all(torch.equal(p, before[name]) for name, p in unet.state_dict().items())
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), "plain")
    unet.set_adapters("plain")
    want = run(unet)
    unet.fuse_lora()                                       # the active one is on no expert
    torch.testing.assert_close(run(unet), want, rtol=0, atol=1e-4)


def test_lora_of_merged_experts_is_fused():
    unet = with_lora("merged unet", "to_q", "expand", "contract")
    want = run(unet)
    assert (want - run(build("merged unet"))).abs().max() > 1e-2
    unet.fuse_lora()
    unet.unload_lora()
    torch.testing.assert_close(run(unet), want, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["unet", "control"])
def test_fused_projections(name):
    model = build(name)
    want, names = run(model), set(model.state_dict())
    model.fuse_qkv_projections()
    for layer in (m for m in model.modules() if isinstance(m, Attention)):
        layer.to_v.weight.data.fill_(torch.nan)            # no longer used
    torch.testing.assert_close(run(model), want, rtol=0, atol=1e-5)
    model.unfuse_qkv_projections()
    assert run(model).isnan().any() and set(model.state_dict()) == names


def test_projections_with_a_lora_are_not_fused():
    unet = with_lora("unet", "to_v")
    want = run(unet)
    with pytest.raises(ValueError, match="unload_lora"):
        unet.fuse_qkv_projections()
    assert torch.equal(run(unet), want)
    unet.fuse_lora()
    unet.unload_lora()
    unet.fuse_qkv_projections()
    torch.testing.assert_close(run(unet), want, rtol=0, atol=1e-4)


def test_fused_projections_take_no_lora(tmp_path):
    unet, config = build("unet"), LoraConfig(r=2, target_modules=["to_v"], init_lora_weights=False)
    with_lora("unet", "to_v").save_lora_adapter(tmp_path, "style")
    load = lambda: unet.load_lora_adapter(tmp_path, prefix=None, weight_name="pytorch_lora_weights.safetensors")
    unet.fuse_qkv_projections()
    want = run(unet)
    for add in (lambda: unet.add_adapter(config), load):
        with pytest.raises(ValueError, match=r"unfuse_qkv_projections\(\) first"):
            add()
    assert torch.equal(run(unet), want) and not has_lora(unet)
    unet.unfuse_qkv_projections()
    load()
    torch.testing.assert_close(run(unet), run(with_lora("unet", "to_v")), rtol=0, atol=1e-5)


def test_network_with_lora_layers_is_not_saved(tmp_path):
    unet = with_lora("unet", "to_v")
    for _ in range(2):
        with pytest.raises(ValueError, match="LoRA layers are loaded"):
            unet.save_pretrained(tmp_path / "unet")
        unet.delete_adapters("style")                      # the layers stay wrapped
    assert not (tmp_path / "unet").exists()
    unet.unload_lora()
    unet.save_pretrained(tmp_path / "unet")
    saved = VersVideoUNet.from_pretrained(tmp_path / "unet").state_dict()
    assert saved.keys() == unet.state_dict().keys() == build("unet").state_dict().keys()


# Quantised loading, by a quantiser that does as those of diffusers do

class EightBits(nn.Linear):
    "A linear layer whose weights are 8-bit numbers and a scale for each output."

    def forward(self, x):
        return nn.functional.linear(x, self.scale * self.weight.to(x), self.bias)


class EightBitConfig(QuantizationConfigMixin):
    to_diff_dict = QuantizationConfigMixin.to_dict


class EightBitQuantizer(DiffusersQuantizer):
    is_serializable = is_trainable = False

    def _process_model_before_weight_loading(self, model, **_):
        for m in model.modules():
            if isinstance(m, nn.Linear):
                m.__class__ = EightBits

    def _process_model_after_weight_loading(self, model, **_):
        return model

    def check_if_quantized_param(self, model, param_value, param_name, state_dict, **_):
        layer, _, name = param_name.rpartition(".")
        return isinstance(model.get_submodule(layer), EightBits) and name == "weight"

    def create_quantized_param(self, model, param_value, param_name, target_device, *_, **__):
        layer, scale = model.get_submodule(param_name.rpartition(".")[0]), param_value.abs().amax(1, keepdim=True) / 127
        layer.register_buffer("scale", scale, persistent=False)
        layer.weight = nn.Parameter((param_value / scale).round().to(torch.int8), requires_grad=False)


@pytest.fixture
def eight_bits(monkeypatch):
    monkeypatch.setitem(auto.AUTO_QUANTIZER_MAPPING, "quanto", EightBitQuantizer)
    return EightBitConfig(QuantizationMethod.QUANTO)


@pytest.mark.parametrize("name", ["unet", "control"])
def test_quantised_loading(tmp_path, eight_bits, name):
    model = build(name)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"experts=\(2, 3\) cannot be quantised: merge the experts first"):
        type(model).from_pretrained(tmp_path, quantization_config=eight_bits)
    assert torch.equal(run(type(model).from_pretrained(tmp_path)), run(model))
    model.merge_experts().save_pretrained(tmp_path)
    quantised = type(model).from_pretrained(tmp_path, quantization_config=eight_bits)
    assert quantised.middle.spatial.experts.expand.weight.dtype == torch.int8
    want = run(model)
    assert 0 < (run(quantised) - want).norm() < 0.1 * want.norm()


# Compiling and exporting the ControlNet

class Skip(nn.Module):
    "In place of a layer: tracing one takes seconds, and tests/test_unet.py compiles them."

    def forward(self, x, *_):
        return x


@pytest.fixture(scope="module")
def flat():
    "A ControlNet of one level."
    torch.manual_seed(0)
    model = VersVideoControlNet(**CONTROL, **UNET | dict(block_out_channels=(8,), attention_levels=(False,))).eval()
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return model


@pytest.fixture(scope="module")
def light(flat):
    model = copy.deepcopy(flat)
    model.down[0][0] = model.middle = model.middle_out = Skip()
    return model


def residuals(model, scales=None, memory=None, conditions=None):
    z, text, clips = inputs()
    with torch.no_grad():
        down, middle = model(z, torch.tensor(7), text, conditions or clips, scales, memory=memory, return_dict=False)
    return torch.cat([y.flatten() for y in (*down, middle)])


# Strengths of canny and of image, one for each clip
SHARES = [[[1.0, 0.0], [1.0, 0.0]], [[1.0, 1.0], [0.0, 0.0]], [[0.0, 0.0], [1.0, 0.5]]]


def as_scales(shares):
    return {name: torch.tensor(share)[:, None] for name, share in zip(("canny", "image"), shares, strict=True)}


def test_controlnet_compiles_whole(light):
    "One graph for all strengths; a condition without a share is left out, whatever is in it."
    graphs = []
    torch.compiler.reset()
    compiled = torch.compile(light, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    for shares in SHARES:
        scales = as_scales(shares)
        torch.testing.assert_close(residuals(compiled, scales), residuals(light, scales), rtol=0, atol=1e-5)
    clips = inputs()[2]
    clips["canny"][1] = torch.nan                          # of a clip without a share of it
    scales = as_scales([[1.0, 0.0], [1.0, 1.0]])
    spoilt = residuals(light, scales, conditions=clips)
    torch.testing.assert_close(residuals(compiled, scales, conditions=clips), spoilt, rtol=0, atol=1e-5)
    assert spoilt.isfinite().all() and len(graphs) == 1


def test_controlnet_compiles_with_a_memory(light):
    torch.compiler.reset()
    compiled = torch.compile(light, fullgraph=True, backend="eager")
    memory, want, clips = {}, residuals(light), inputs()[2]
    for conditions in (clips, {name: torch.zeros_like(clip) for name, clip in clips.items()}):  # not read again
        torch.testing.assert_close(residuals(compiled, None, memory, conditions), want, rtol=0, atol=1e-5)
    assert set(memory) == {"canny", "image"}


def test_controlnet_exports(flat):
    z, text, clips = inputs()
    arguments = (z, torch.tensor(7), text, clips, as_scales(SHARES[0]))
    with torch.no_grad():
        exported = torch.export.export(flat, arguments, dict(return_dict=False))

        def run_exported(z, step, text, clips, scales, **_):
            return exported.module()(z, step, text, clips, scales, return_dict=False)

    for shares in SHARES:
        scales = as_scales(shares)
        torch.testing.assert_close(residuals(lambda *a, memory, return_dict: run_exported(*a), scales),
                                   residuals(flat, scales), rtol=0, atol=1e-5)
