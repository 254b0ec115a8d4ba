"""What every diffusers model promises, and what the UNet of VersVideo promises besides."""

import copy

import literal
import pytest
import torch
from accelerate import cpu_offload
from diffusers.models.attention_processor import AttnProcessor
from peft import LoraConfig
from safetensors.torch import load_file
from torch.utils.checkpoint import checkpoint

from versvideo.models.layers import Layer
from versvideo.models.sizes import SIZES, count_parameters
from versvideo.models.unet import VersVideoUNet
from versvideo.modules.moe import ExpertLinear

TINY = dict(in_channels=4, block_out_channels=(16, 32), layers_per_block=1,
            attention_levels=(True, False), head_dim=8, cross_attention_dim=12, experts=(2, 3),
            norm_groups=8, sample_size=(3, 6, 6))


TEMPORAL = ("temporal", "scale", "spatial_temporal", "channel", "motion")


def mixes_frames(name):
    return any(part in name.split(".") for part in TEMPORAL)


def build(temporal=True, apart=True, **changes):
    """A UNet in which nothing is zero and no two experts are the same.

    `temporal=False` leaves what mixes frames as it starts, `apart=False` keeps the experts copies.
    """
    torch.manual_seed(0)
    unet = VersVideoUNet(**(TINY | changes)).eval()
    with torch.no_grad():
        for name, p in unet.named_parameters():
            noise = 0.1 * torch.randn_like(p)
            if temporal or not mixes_frames(name):
                p.add_(noise[:, :1] if ".experts." in name and not apart else noise)
    return unet


def inputs(b=2, t=3, h=6, w=6, dtype=torch.float):
    torch.manual_seed(1)
    return torch.randn(b, 4, t, h, w, dtype=dtype), torch.randn(b, 5, 12, dtype=dtype)


def run(unet, *shape, step=400, **kinds):
    x, text = inputs(*shape, **kinds)
    with torch.no_grad():
        return unet(x, step, text).sample


def spread(unet):
    "Largest distance of an expert from the mean of its set."
    stacks = [p for m in unet.modules() if isinstance(m, ExpertLinear) for p in m.parameters()]
    return max((p - p.mean(1, keepdim=True)).abs().max().item() for p in stacks)


@pytest.mark.parametrize("shape", [(1, 1, 6, 6), (2, 3, 6, 6), (1, 2, 5, 9), (1, 5, 7, 3),
                                   (3, 1, 1, 1)])
def test_shape_is_kept(shape):
    y = run(build(), *shape)
    assert y.shape == (shape[0], 4, *shape[1:]) and y.isfinite().all()


@pytest.mark.parametrize("changes", [
    dict(layers_per_block=2), dict(block_out_channels=(16, 16, 24), attention_levels=(False,) * 3),
    dict(in_channels=8), dict(experts=(1, 1)),
    dict(block_out_channels=(16,), attention_levels=(True,)), dict(head_dim=(4, 8)),
    dict(temporal_levels=(True, True), temporal_attentions=2),
    dict(attention_levels=(False, True), temporal_levels=(True, False))])
def test_other_configs(changes):
    unet = build(**changes)
    x = torch.randn(1, unet.config.in_channels, 2, 5, 7)
    y = unet(x, 1, torch.randn(1, 5, 12)).sample
    assert y.shape == x.shape and y.isfinite().all()


def test_evaluation_is_deterministic_and_training_is_random():
    unet = build()
    first = run(unet)
    assert torch.equal(run(unet), first)
    assert (run(build(), step=401) - first).abs().max() > 1e-4

    def draw(seed):
        x, text = inputs()
        torch.manual_seed(seed)
        return unet.train()(x, 400, text).sample

    assert torch.equal(draw(3), draw(3)) and (draw(3) - draw(4)).abs().max() > 1e-4


def test_clips_of_a_batch_do_not_meet():
    unet, (x, text) = build(), inputs()
    alone = torch.cat([unet(x[b:b + 1], 400, text[b:b + 1]).sample for b in range(2)])
    assert (alone - run(unet)).abs().max() < 1e-4
    assert (unet(x, 400, text.flip(0)).sample - run(unet)).abs().max() > 1e-3


def test_save_and_load(tmp_path):
    unet = build()
    unet.save_pretrained(tmp_path)
    assert {f.name for f in tmp_path.iterdir()} == {"config.json",
                                                    "diffusion_pytorch_model.safetensors"}
    again = VersVideoUNet.from_pretrained(tmp_path)
    assert not again.training and torch.equal(run(again), run(unet))
    for name, value in TINY.items():
        kept = again.config[name]
        assert (tuple(kept) if isinstance(value, tuple) else kept) == value
    half = VersVideoUNet.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16


def test_half_precision_is_close():
    unet = build()
    want = run(unet)
    got = run(copy.deepcopy(unet).to(torch.bfloat16), dtype=torch.bfloat16)
    assert got.dtype == torch.bfloat16
    assert (got.float() - want).norm() < 0.1 * want.norm()
    assert (run(build(temporal=False)) - want).norm() > 0.2 * want.norm()


def test_trains_under_autocast():
    unet, (x, text) = build().train(), inputs()
    with torch.autocast("cpu", torch.bfloat16):
        unet(x, 400, text).sample.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in unet.parameters())


def gradients(unet):
    "Output and gradients of one training step, with shuffled experts."
    x, text = inputs()
    torch.manual_seed(5)
    unet.train().zero_grad()
    y = unet(x.requires_grad_(), 400, text).sample
    y.square().mean().backward()
    return [y.detach(), x.grad, *(p.grad.clone() for p in unet.parameters())]


def far(ours, theirs):
    return max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))


def test_gradient_checkpointing_changes_nothing(monkeypatch):
    calls, forward = [], Layer.forward
    monkeypatch.setattr(Layer, "forward", lambda self, *a: calls.append(1) or forward(self, *a))
    unet = build()
    plain = gradients(unet)
    once, _ = len(calls), calls.clear()
    unet.enable_gradient_checkpointing()
    assert far(gradients(unet), plain) < 1e-6 and len(calls) == 2 * once
    unet.enable_gradient_checkpointing(lambda module, *args: checkpoint(
        module, *args, use_reentrant=False, preserve_rng_state=False))
    assert far(gradients(unet), plain) > 1e-4, "other shuffles in the second pass went unnoticed"
    unet.disable_gradient_checkpointing()
    assert far(gradients(unet), plain) < 1e-6


def test_starts_by_predicting_nothing():
    unet, (x, text) = VersVideoUNet(**TINY), inputs()
    assert not unet(x, 400, text).sample.any()


def test_starts_by_treating_every_frame_as_an_image():
    x, text = inputs(dtype=torch.double)

    def frames_apart(unet):
        clip = unet(x, 400, text).sample
        frames = [unet(x[:, :, t:t + 1], 400, text).sample for t in range(3)]
        return (torch.cat(frames, dim=2) - clip).abs().max()

    assert frames_apart(build(temporal=False).double()) < 1e-12
    assert frames_apart(build().double()) > 1e-3


def test_an_image_needs_no_temporal_part():
    unet = build()
    image, clip = run(unet, 2, 1), run(unet, 2, 3)
    with torch.no_grad():
        for name, p in unet.named_parameters():
            if mixes_frames(name):
                p.fill_(float("nan"))
    assert torch.equal(run(unet, 2, 1), image)
    assert clip.isfinite().all() and run(unet, 2, 3).isnan().all()


def test_timesteps():
    unet, (x, text) = build(), inputs()
    want = run(unet)
    for step in (torch.tensor(400), torch.tensor([400]), torch.tensor([400, 400]), 400.):
        assert torch.equal(run(unet, step=step), want)
    mixed = unet(x, torch.tensor([400, 7]), text).sample
    assert (mixed[0] - want[0]).abs().max() < 1e-4
    assert (mixed[1] - run(unet, step=7)[1]).abs().max() < 1e-4
    assert (mixed[1] - want[1]).abs().max() > 1e-3
    each_frame = torch.tensor([[400] * 3, [7, 400, 7]])
    assert (unet(x, each_frame, text).sample[0] - want[0]).abs().max() < 1e-4


def test_tuple_output():
    x, text = inputs()
    unet = build()
    result = unet(x, 400, text, return_dict=False)
    assert isinstance(result, tuple) and len(result) == 1
    assert torch.equal(result[0], unet(x, 400, text)[0])


@pytest.mark.parametrize("shape", [(1, 4, 6, 6), (1, 3, 2, 6, 6), (4, 2, 6, 6, 1, 1)])
def test_wrong_samples_are_named(shape):
    with pytest.raises(ValueError, match=r"sample has shape.*`b c t h w` with c=4"):
        build()(torch.zeros(shape), 0, torch.zeros(1, 5, 12))


@pytest.mark.parametrize("shape", [(5, 12), (1, 5, 12), (2, 5, 13)])
def test_wrong_texts_are_named(shape):
    with pytest.raises(ValueError, match="encoder_hidden_states.*`b n d` with b=2, d=12"):
        build()(inputs()[0], 0, torch.zeros(shape))


def test_wrong_timesteps_are_named():
    x, text = inputs()
    with pytest.raises(ValueError, match=r"timestep has shape \(3,\) for 2 clips of 3 frames"):
        build()(x, torch.tensor([1, 2, 3]), text)


def test_experts_are_merged_once():
    unet = build().merge_experts()
    with pytest.raises(ValueError, match=r"experts=\(1, 1\): nothing to merge"):
        unet.merge_experts()


@pytest.mark.parametrize("changes, message", [
    (dict(attention_levels=(True,)), "attention_levels"), (dict(head_dim=7), "head_dim=7"),
    (dict(temporal_levels=(True,) * 3), "temporal_levels"), (dict(head_dim=(8,)), "head_dim"),
    (dict(experts=(0, 1)), "experts=0")])
def test_wrong_configs_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        build(**changes)


def test_exchange_pulls_experts_together():
    unet = build()
    want = {n: p.clone() for n, p in unet.named_parameters()}
    for name in [n for n in want if ".experts." in n]:
        want[name] = literal.exchange([want[name].detach().movedim(1, 0)], 0.3)[0].movedim(0, 1)
    before, twin = spread(unet), copy.deepcopy(unet)
    unet.exchange_experts(0.3)
    twin.exchange_experts(0.3)
    assert all((p - want[n]).abs().max() < 1e-6 for n, p in unet.named_parameters())
    assert far(unet.parameters(), twin.parameters()) == 0
    assert 0.3 * before < spread(unet) < 0.7 * before
    for _ in range(60):
        unet.exchange_experts(0.3)
    assert spread(unet) < 1e-6 < before
    settled = copy.deepcopy(unet)
    unet.exchange_experts(0.3)
    assert far(unet.parameters(), settled.parameters()) < 1e-6


def test_exchange_has_the_paper_s_default():
    unet = build()
    stacks = {n: p.detach().clone() for n, p in unet.named_parameters() if ".experts." in n}
    unet.exchange_experts()
    after = dict(unet.named_parameters())
    for name, stack in stacks.items():
        want = literal.exchange([stack.movedim(1, 0)], 0.001)[0]
        assert (after[name].movedim(1, 0) - want).abs().max() < 1e-6
    assert far([after[n] for n in stacks], stacks.values()) > 1e-5


def test_merge_of_equal_experts_is_exact():
    x, text = inputs(dtype=torch.double)
    for apart in (False, True):
        unet = build(apart=apart).double().train()
        shuffled = unet(x, 400, text).sample
        merged = unet.merge_experts()(x, 400, text).sample
        assert ((merged - shuffled).abs().max() > 1e-3) == apart
        assert apart or (merged - shuffled).abs().max() < 1e-12


def test_merge_changes_nothing_in_evaluation_and_is_written_down(tmp_path):
    unet = build()
    before, size = run(unet), unet.num_parameters()
    stacks = {n: p.detach().clone() for n, p in unet.named_parameters() if ".experts." in n}
    assert unet.merge_experts() is unet
    assert torch.equal(run(unet), before) and unet.num_parameters() < size
    assert tuple(unet.config.experts) == (1, 1)
    after = dict(unet.named_parameters())
    for name, stack in stacks.items():
        assert (after[name] - literal.merged(stack.movedim(1, 0))).abs().max() < 1e-6
    unet.save_pretrained(tmp_path)
    again = VersVideoUNet.from_pretrained(tmp_path)
    assert torch.equal(run(again), before) and torch.equal(run(again.train()), before)
    assert set(load_file(tmp_path / "diffusion_pytorch_model.safetensors")) == set(after)


@pytest.mark.parametrize("size, millions, merged", [("L", 517, 294), ("H", 2054, 1162)])
def test_parameters_of_the_large_sizes(size, millions, merged):
    counts = count_parameters(SIZES[size])
    assert counts == pytest.approx((millions * 1e6, merged * 1e6), rel=0.005)


def test_a_clip_trains_every_parameter():
    unet, (x, text) = build().train(), inputs()
    unet(x, 400, text).sample.square().mean().backward()
    assert [n for n, p in unet.named_parameters() if p.grad is None or not p.grad.any()] == []
    unet.zero_grad()
    unet(x[:, :, :1], 400, text).sample.square().mean().backward()
    idle = [n for n, p in unet.named_parameters() if p.grad is None]
    assert idle == [n for n, _ in unet.named_parameters() if mixes_frames(n)]

# What diffusers offers for every model

def test_shards_and_variants(tmp_path):
    unet = build()
    unet.save_pretrained(tmp_path, max_shard_size="20KB", variant="fp16")
    names = {f.name for f in tmp_path.iterdir()}
    assert "diffusion_pytorch_model.safetensors.index.fp16.json" in names and len(names) > 3
    assert all(".fp16" in name for name in names - {"config.json"})
    again = VersVideoUNet.from_pretrained(tmp_path, variant="fp16")
    assert torch.equal(run(again), run(unet))
    with pytest.raises(OSError):
        VersVideoUNet.from_pretrained(tmp_path)


def test_attention_processors():
    unet = build()
    want, names = run(unet), set(unet.attn_processors)
    assert len(names) == sum("to_q.weight" in name for name, _ in unet.named_parameters())
    unet.set_attn_processor(AttnProcessor())
    assert {type(p) for p in unet.attn_processors.values()} == {AttnProcessor}
    assert 0 < (run(unet) - want).abs().max() < 1e-5


def test_attention_backends():
    unet = build()
    want = run(unet)
    try:
        unet.set_attention_backend("_native_math")
        chosen = {p._attention_backend.value for p in unet.attn_processors.values()}
        assert chosen == {"_native_math"}
        assert 0 < (run(unet) - want).abs().max() < 1e-5
    finally:
        unet.set_attention_backend("native")
    unet.reset_attention_backend()
    assert torch.equal(run(unet), want)
    with pytest.raises(ValueError, match="must be one of"):
        unet.set_attention_backend("fastest")


PLAIN = dict(attention_levels=(False, False))      # transformers in the middle alone: tracing takes seconds a layer
FLAT = dict(block_out_channels=(16,), attention_levels=(False,))


def counting(graphs):
    "A backend that keeps the graphs it is given, and runs them as they are."
    return lambda graph, _: graphs.append(graph) or graph.forward


def test_compiles_whole_and_once_for_every_batch():
    unet, graphs = build(**PLAIN), []
    torch.compiler.reset()
    compiled = torch.compile(unet, fullgraph=True, backend=counting(graphs))
    for b in (2, 3, 5):
        x, text = inputs(b=b)
        for given in (x, text):
            torch._dynamo.mark_dynamic(given, 0)
        with torch.no_grad():
            assert (compiled(x, torch.tensor(400), text).sample - run(unet, b)).abs().max() < 1e-5
    assert len(graphs) == 1


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a")
def test_compiled_training_deals_the_tokens_as_uncompiled():
    "A layer alone, as `fit` compiles it, and a whole network that recomputes its layers."
    unet = build(**FLAT)
    plain = gradients(unet)
    torch.compiler.reset()
    unet.middle.compile(fullgraph=True, backend="aot_eager")
    assert far(gradients(unet), plain) < 1e-5
    whole = build(**FLAT)
    whole.enable_gradient_checkpointing()
    whole.compile(fullgraph=True, backend="aot_eager")
    assert far(gradients(whole), plain) < 1e-5


def test_repeated_blocks_compile():
    "Three kinds of layers, more than torch compiles of one function once its limit is two."
    unet, graphs = build(**FLAT), []
    want = run(unet)
    torch.compiler.reset()
    with torch._dynamo.config.patch(cache_size_limit=2, fail_on_recompile_limit_hit=True):
        unet.compile_repeated_blocks(fullgraph=True, backend=counting(graphs))
        assert (run(unet) - want).abs().max() < 1e-5
    assert len(graphs) > 2


def test_lora_on_shared_tokens():
    unet = build()
    unet.add_adapter(LoraConfig(r=2, target_modules=["expand", "contract"]))
    x, text = inputs()
    unet.train()(x, 400, text).sample.sum().backward()
    assert any(p.grad is not None and p.grad.any() for n, p in unet.named_parameters()
               if "expand.lora_B" in n)


@pytest.mark.parametrize("change", [
    lambda unet: unet.add_adapter(LoraConfig(r=2, target_modules=["expand"])),
    lambda unet: unet.enable_layerwise_casting(torch.bfloat16, torch.float32),
    lambda unet: cpu_offload(unet, torch.device("cpu"), offload_buffers=True)])
def test_merging_comes_first(change):
    unet = build()
    change(unet)
    with pytest.raises(ValueError, match="merge first"):
        unet.merge_experts()
    assert max(unet.config.experts) > 1


def test_lora(tmp_path):
    unet = build()
    want = run(unet)
    config = LoraConfig(r=2, target_modules=["to_q", "to_v", "proj_in"], init_lora_weights=False)
    unet.add_adapter(config, "style")
    changed = run(unet)
    assert (changed - want).abs().max() > 1e-3
    learns = {name for name, p in unet.named_parameters() if p.requires_grad}
    assert learns and all("lora" in name for name in learns)
    unet.save_lora_adapter(tmp_path, "style")
    again = build()
    again.load_lora_adapter(tmp_path, prefix=None, adapter_name="style",
                            use_safetensors=True)
    assert (run(again) - changed).abs().max() < 1e-5
    again.fuse_lora()
    assert (run(again) - changed).abs().max() < 1e-5
    again.unfuse_lora()
    again.disable_adapters()
    assert (run(again) - want).abs().max() < 1e-4
