"""Attention and experts are their equations, written out in `literal`."""

import copy

import literal
import pytest
import torch

from versvideo.modules.attention import SpatialTransformer, TemporalTransformer, attention
from versvideo.modules.moe import ExpertFeedForward, exchange_experts, merge_experts

# The table of frame positions is in single precision, so that blocks with it agree less closely.
TIGHT, POSITIONS = 1e-9, 1e-5


def tokens(*shape, seed=1):
    torch.manual_seed(seed)
    return torch.randn(shape, dtype=torch.double, requires_grad=True)


def in_order(seed, x_len):
    "The permutation that a module draws first after this seed."
    torch.manual_seed(seed)
    order = torch.randperm(x_len).tolist()
    torch.manual_seed(seed)
    return order


def stacks(module):
    "The experts' parameters, each with its axis of experts, also where there is only one."
    return {name: p if module.experts > 1 else p[:, None] for name, p in module.named_parameters()}


def compare_experts(experts, length, version=literal):
    module, x = literal.randomise(ExpertFeedForward(6, experts, mult=2)), tokens(2, length, 6)
    p, order = stacks(module), in_order(5, length)
    want = torch.stack([version.moe(item, p, order) for item in x])
    return literal.gap(module(x), want, [x, *module.parameters()])


def compare_spatial(version=literal, training=True):
    torch.manual_seed(0)
    block = literal.randomise(SpatialTransformer(8, 4, 6, experts=3, norm_groups=2))
    x, text = tokens(2, 8, 2, 2, 3), tokens(2, 3, 6, seed=2)
    p, order = dict(block.named_parameters()), in_order(5, 6)
    ffn = (lambda n, w: version.moe(n, w, order)) if training else version.mean_expert
    want = version.spatial_transformer(x, text, p, 4, 2, ffn)
    return literal.gap(block.train(training)(x, text), want, [x, text, *p.values()])


def compare_temporal(version=literal, training=True, attentions=1):
    torch.manual_seed(0)
    block = literal.randomise(TemporalTransformer(8, 4, 2, norm_groups=2, attentions=attentions))
    x = tokens(2, 8, 5, 1, 2)
    p, order = dict(block.named_parameters()), in_order(5, 5)
    ffn = (lambda n, w: version.moe(n, w, order)) if training else version.mean_expert
    want = version.temporal_transformer(x, p, 4, 2, ffn)
    return literal.gap(block.train(training)(x), want, [x, *p.values()])


def compare_exchange(version=literal, beta=0.3):
    module = literal.randomise(ExpertFeedForward(4, 3))
    want = version.exchange([p.detach().movedim(1, 0).clone() for p in module.parameters()], beta)
    exchange_experts(module, beta)
    return max((p.movedim(1, 0) - w).abs().max().item()
               for p, w in zip(module.parameters(), want, strict=True))


@pytest.mark.parametrize("experts, length", [(3, 6), (4, 5), (2, 7), (4, 2), (1, 3)])
def test_experts(experts, length):
    assert max(compare_experts(experts, length)) < TIGHT


@pytest.mark.parametrize("experts", [1, 3])
def test_experts_act_as_their_mean_in_evaluation(experts):
    module, x = literal.randomise(ExpertFeedForward(6, experts)).eval(), tokens(2, 4, 6)
    want = torch.stack([literal.mean_expert(item, stacks(module)) for item in x])
    assert max(literal.gap(module(x), want, [x, *module.parameters()])) < TIGHT


def routed(module, length):
    "Which expert took each token: expert e answers e whatever it is asked."
    with torch.no_grad():
        module.contract.weight.zero_()
        module.contract.bias.copy_(torch.arange(float(module.experts)))
    return module(torch.randn(2, length, 4))


def test_groups_are_equal_random_and_new_every_time():
    module = ExpertFeedForward(4, 3)
    torch.manual_seed(0)
    draws = torch.stack([routed(module, 8)[:, :, 0] for _ in range(600)])
    assert (draws[:, 0] == draws[:, 1]).all()
    sizes = torch.stack([(draws[:, 0] == e).sum(1) for e in range(3)])
    assert (sizes == torch.tensor([[3], [3], [2]])).all()
    share = torch.stack([(draws[:, 0] == e).float().mean(0) for e in range(3)])
    assert (share - torch.tensor([[3], [3], [2]]) / 8).abs().max() < 0.08
    assert len({tuple(row.tolist()) for row in draws[:, 0]}) > 300


def test_experts_start_as_copies():
    for p in ExpertFeedForward(4, 3).parameters():
        assert torch.equal(p[:, 0], p[:, 1]) and torch.equal(p[:, 0], p[:, 2])


@pytest.mark.parametrize("beta", [0., 0.001, 0.3, 1.])
def test_exchange(beta):
    assert compare_exchange(beta=beta) < 1e-14


def test_exchange_by_hand():
    module = ExpertFeedForward(1, 3, mult=1)
    with torch.no_grad():
        module.contract.bias.copy_(torch.tensor([[0., 10., 20.]]))
    exchange_experts(module)
    assert torch.allclose(module.contract.bias, torch.tensor([[0.015, 10., 19.985]]))
    old = torch.tensor([0., 10., 20.])
    assert torch.allclose(literal.exchange([old], 0.001)[0], module.contract.bias.detach()[0])


def test_exchange_leaves_everything_else_alone():
    block = literal.randomise(SpatialTransformer(8, 4, 6, experts=2, norm_groups=2))
    before = copy.deepcopy(block.state_dict())
    exchange_experts(block, 0.5)
    changed = {name for name, p in block.state_dict().items() if not torch.equal(p, before[name])}
    assert changed == {f"experts.{name}" for name in
                       ("expand.weight", "expand.bias", "contract.weight", "contract.bias")}


def test_merge():
    module, x = literal.randomise(ExpertFeedForward(6, 3)).eval(), tokens(2, 4, 6)
    want = [literal.merged(p.detach().movedim(1, 0)) for p in module.parameters()]
    before = module(x)
    module.expand.bias.requires_grad_(False)
    merge_experts(module)
    assert module.experts == 1 and not module.expand.bias.requires_grad
    assert type(module.expand) is type(module.contract) is torch.nn.Linear
    for p, w in zip(module.parameters(), want, strict=True):
        assert (p - w).abs().max() < 1e-14
    assert torch.equal(module(x), before) and torch.equal(module.train()(x), before)


@pytest.mark.parametrize("context_dim", [None, 6])
def test_attention(context_dim):
    module = literal.randomise(attention(8, 4, context_dim))
    x, context = tokens(1, 5, 8), tokens(1, 3, context_dim or 8, seed=2)
    p = dict(module.named_parameters())
    want = literal.attention(x[0], context[0], p, 4)[None]
    assert max(literal.gap(module(x, context), want, [x, context, *p.values()])) < TIGHT


@pytest.mark.parametrize("training", [True, False])
def test_spatial_transformer(training):
    assert max(compare_spatial(training=training)) < TIGHT


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("attentions", [1, 2])
def test_temporal_transformer(training, attentions):
    assert max(compare_temporal(training=training, attentions=attentions)) < POSITIONS


def test_temporal_transformer_starts_as_the_identity_and_leaves_an_image():
    block, x = TemporalTransformer(8, 4, experts=2, norm_groups=2).double(), tokens(1, 8, 3, 2, 2)
    assert torch.equal(block(x), x)
    image = x[:, :, :1]
    assert torch.equal(literal.randomise(block)(image), image)
    assert (block(x) - x).abs().max() > 1e-3


def test_spatial_transformer_starts_as_the_identity():
    block, x = SpatialTransformer(8, 4, 6, experts=2, norm_groups=2).double(), tokens(1, 8, 3, 2, 2)
    text = tokens(1, 3, 6, seed=2)
    assert torch.equal(block(x, text), x)
    assert (literal.randomise(block)(x, text) - x).abs().max() > 1e-3


def test_spatial_transformer_keeps_frames_and_clips_apart():
    block = literal.randomise(SpatialTransformer(8, 4, 6, experts=2, norm_groups=2)).eval()
    x, text = tokens(2, 8, 3, 2, 2), tokens(2, 3, 6, seed=2)
    alone = [block(x[b:b + 1, :, t:t + 1], text[b:b + 1]) for b in range(2) for t in range(3)]
    together = block(x, text)
    assert (torch.cat(alone).view(2, 3, 8, 2, 2).transpose(1, 2) - together).abs().max() < TIGHT
    assert (block(x, text.flip(0)) - together).abs().max() > 1e-3


def test_impossible_sizes_are_refused():
    with pytest.raises(ValueError, match="experts=0"):
        ExpertFeedForward(4, 0)
    with pytest.raises(ValueError, match="head_dim=3 does not divide the width 8"):
        attention(8, 3)


COMPARE = {
    "experts": lambda version: compare_experts(3, 7, version)[0],
    "spatial": lambda version: compare_spatial(version)[0],
    "temporal": lambda version: compare_temporal(version)[0],
    "mean": lambda version: compare_spatial(version, training=False)[0],
    "exchange": compare_exchange,
}
MUTANTS = {
    "groups not unshuffled": ("experts", "restored[place] = done[k]", "restored[k] = done[k]"),
    "unshuffled the wrong way": ("experts", "restored[place] = done[k]",
                                 "restored[k] = done[place]"),
    "not shuffled": ("experts", "[tokens[i] for i in order]", "[tokens[i] for i in range(L)]"),
    "one expert for all": ("experts", "(w[e] for w in", "(w[0] for w in"),
    "last groups larger": ("experts", "if e < L % N", "if N - e <= L % N"),
    "value and gate swapped": ("experts", "value * gelu(gate)", "gelu(value) * gate"),
    "logistic gate": ("experts", "(1 + torch.erf(x / math.sqrt(2))) / 2", "sigmoid(x)"),
    "outputs summed at inference": ("mean", "range(len(stack))) / len(stack)",
                                    "range(len(stack)))"),
    "exchange from updated values": ("exchange", "sum(old[j] for", "sum(new[j] for"),
    "mean with the expert itself": ("exchange", "if j != i) / (N - 1)", ") / N"),
    "β at the wrong place": ("exchange", "(1 - beta) * old[i] + beta * mean",
                             "beta * old[i] + (1 - beta) * mean"),
    "scaled by the full width": ("spatial", "/ math.sqrt(head_dim)", "/ math.sqrt(len(query))"),
    "heads interleaved": ("spatial", "slice(start, start + head_dim)",
                          "slice(start // head_dim, None, len(query) // head_dim)"),
    "text of the wrong clip": ("spatial", "attention(y, text[b]", "attention(y, text[1 - b]"),
    "no residual": ("spatial", "n = n + attention(y, text[b]", "n = attention(y, text[b]"),
    "places transposed": ("spatial", "linear(n[i * W + j]", "linear(n[j * H + i]"),
    "image not added": ("spatial", "x[b, :, t, i, j] + linear(n[i * W + j]", "linear(n[i * W + j]"),
    "frames normed alone": (
        "temporal", 'group_norm(clip, groups, part(p, "norm")) for clip in x',
        'torch.stack([group_norm(f, groups, part(p, "norm")) for f in clip.unbind(1)], 1) '
        "for clip in x"),
    "attention reads no positions": ("temporal", "+ where[t]", ""),
    "tokens carry no positions": ("temporal", 'p["position_gain"] *', 'p["position_gain"] * 0 *'),
    "positions reversed": ("temporal", "position(t, C)", "position(T - 1 - t, C)"),
    "cosines first": ("temporal", "for f in (math.sin, math.cos)", "for f in (math.cos, math.sin)"),
    "positions of other wavelengths": ("temporal", "10000 ** (i / width)",
                                       "10000 ** (i / (width - 2))"),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_sees_the_mistake(mutant):
    name, old, new = MUTANTS[mutant]
    torch.manual_seed(0)
    assert COMPARE[name](literal.mutant(old, new)) > 1e-3
