"""The paper's equations, slowly: loops over clips, channels, frames and places, and arithmetic.

Nothing here comes from versvideo. Weights arrive as a dict `p` with the names that the module
gives to its parameters. `mutant` makes a copy with one mistake and `gap` measures how far apart
two results are: a test that cannot tell the module from a mutant proves nothing.
"""

import math
import types
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F


def each(shape, entry):
    "The tensor whose part at `i, j, ...` is `entry(i, j, ...)`."
    if not shape:
        return entry()
    return torch.stack([each(shape[1:], partial(entry, i)) for i in range(shape[0])])


def part(p, prefix):
    "The weights of one submodule."
    start = prefix + "."
    return {name[len(start):]: w for name, w in p.items() if name.startswith(start)}


def sigmoid(x):
    return 1 / (1 + torch.exp(-x))


def at(frames, t):
    "Frame t, zeros outside the clip."
    return frames[t] if 0 <= t < len(frames) else torch.zeros_like(frames[0])


def filter3x3(image, kernel):
    "One map `h w` filtered with a 3x3 kernel, zeros outside."
    h, w = image.shape
    padded = F.pad(image, (1, 1, 1, 1))
    return sum(kernel[i, j] * padded[i:i + h, j:j + w] for i in range(3) for j in range(3))


# Multi-excitation convolution (2.2, Figure 1 bottom left, Figure 2)

def temporal_shift(z, share=1 / 8):
    "ẑ: the first channels hold the frame before, as many hold the frame after (TSM)."
    n = int(z.shape[1] * share)

    def entry(b, c, t):
        step = -1 if c < n else 1 if c < 2 * n else 0
        return at(z[b, c], t + step)

    return each(z.shape[:3], entry)


def spatial(x, p):
    "2D convolution of every frame."
    def entry(b, o, t):
        maps = [filter3x3(x[b, c, t], p["weight"][o, c]) for c in range(x.shape[1])]
        return p["bias"][o] + sum(maps)

    return each((len(x), len(p["weight"]), x.shape[2]), entry)


def temporal(x, p):
    "1D convolution over time, kernel (3, 1, 1)."
    def entry(b, o, t):
        taps = [p["weight"][o, c, k, 0, 0] * at(x[b, c], t + k - 1)
                for c in range(x.shape[1]) for k in range(3)]
        return p["bias"][o] + sum(taps)

    return each((len(x), len(p["weight"]), x.shape[2]), entry)


def spatial_temporal_mask(z, p):
    "M_S of equation (3), `b 1 t h w`."
    B, C, T = z.shape[:3]
    pooled = each((B, T), lambda b, t: sum(z[b, c, t] for c in range(C)) / C)

    def entry(b, _, t):
        taps = [filter3x3(at(pooled[b], t + k - 1), p["conv.weight"][0, 0, k]) for k in range(3)]
        return sigmoid(p["conv.bias"][0] + sum(taps))

    return each((B, 1, T), entry)


def channel_mask(z, p):
    "M_C of equation (4), `b c t 1 1`."
    B, C, T = z.shape[:3]
    S = len(p["squeeze.weight"])
    c1 = each((B, C, T), lambda b, c, t: z[b, c, t].sum() / z[b, c, t].numel())
    c2 = each((B, S, T), lambda b, s, t: p["squeeze.bias"][s] + sum(
        p["squeeze.weight"][s, c, 0] * c1[b, c, t] for c in range(C)))
    c2 = each((B, S, T), lambda b, s, t: p["temporal.bias"][s] + sum(
        p["temporal.weight"][s, i, k] * at(c2[b, i], t + k - 1)
        for i in range(S) for k in range(3)))
    c3 = each((B, C, T), lambda b, c, t: p["extend.bias"][c] + sum(
        p["extend.weight"][c, s, 0] * c2[b, s, t] for s in range(S)))
    return sigmoid(c3)[..., None, None]


def motion_mask(z, p, magnitude=False):
    "M_M, `b c t 1 1`, from the differences of equation (5), or |m|; nothing follows the last frame."
    B, C, T, H, W = z.shape
    S = len(p["squeeze.weight"])
    squeezed = each((B, S, T), lambda b, s, t: sum(
        p["squeeze.weight"][s, c, 0] * z[b, c, t] for c in range(C)))

    def motion(b, s):
        q, k_2d = squeezed[b, s], p["filter.weight"][s, 0]
        m = [filter3x3(q[t], k_2d) - q[t - 1] for t in range(1, T)]
        m = [difference.abs() for difference in m] if magnitude else m
        pooled = [difference.sum() / (H * W) for difference in m]
        return torch.stack([*pooled, z.new_zeros(())])

    m = each((B, S), motion)
    return sigmoid(each((B, C, T), lambda b, c, t: p["extend.bias"][c] + sum(
        p["extend.weight"][c, s, 0] * m[b, s, t] for s in range(S))))[..., None, None]


def excite(z, mask):
    "Equations (3) and (4), right-hand side."
    return z + z * mask


def multi_excitation(x, p, share=1 / 8, start="scaled", magnitude=False):
    """The sum of the four branches: as the paper has it, or the three excited ones times a learned
    scale for each channel, or in the centred form, a + the masks less one half each.
    """
    z = temporal_shift(x, share)
    masks = [spatial_temporal_mask(z, part(p, "spatial_temporal")),
             channel_mask(z, part(p, "channel")),
             motion_mask(z, part(p, "motion"), magnitude)]
    factorized = temporal(spatial(x, part(p, "spatial")), part(p, "temporal"))
    if start == "centred":
        excited = z * (p["scale"] + sum(mask - 1 / 2 for mask in masks))
    else:
        excited = sum(excite(z, mask) for mask in masks)
    scale = p["scale"] if start == "scaled" else torch.ones(x.shape[1], 1, 1, 1)
    return each(x.shape[:2], lambda b, c: factorized[b, c] + scale[c, 0, 0, 0] * excited[b, c])


# Mixture-of-experts spatial-temporal attention (2.2, Figure 1 bottom right)

def linear(token, p, name):
    "W x + b of one token, b where there is one."
    y = (p[f"{name}.weight"] * token).sum(1)
    return y + p[f"{name}.bias"] if f"{name}.bias" in p else y


def gelu(x):
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def feed_forward(token, weight_in, bias_in, weight_out, bias_out):
    "A gated feed-forward network (GEGLU) on one token."
    hidden = (weight_in * token).sum(1) + bias_in
    half = len(hidden) // 2
    value, gate = hidden[:half], hidden[half:]
    return (weight_out * (value * gelu(gate))).sum(1) + bias_out


def expert_weights(p):
    "`e ...`, from the stacks `out e ...` of the module."
    return [p[f"{layer}.{kind}"].movedim(1, 0) for layer in ("expand", "contract") for kind in ("weight", "bias")]


def moe(tokens, p, order):
    "Equation (6) on the tokens `l d` of one item: shuffle, split, feed forward, unshuffle."
    L, N = len(tokens), p["expand.weight"].shape[1]
    shuffled = [tokens[i] for i in order]
    done = []
    for e in range(N):
        size = L // N + (1 if e < L % N else 0)
        group = shuffled[len(done):len(done) + size]
        done += [feed_forward(x, *(w[e] for w in expert_weights(p))) for x in group]
    restored = [None] * L
    for k, place in enumerate(order):
        restored[place] = done[k]
    return torch.stack(restored)


def merged(stack):
    "The mean of the experts."
    return sum(stack[e] for e in range(len(stack))) / len(stack)


def mean_expert(tokens, p):
    "What the experts do at inference: one feed-forward network with the mean weights."
    return torch.stack([feed_forward(x, *map(merged, expert_weights(p))) for x in tokens])


def exchange(stacks, beta):
    "Equations (7) and (8) for stacks of experts `e ...`, all from the old values."
    results = []
    for stack in stacks:
        N = len(stack)
        old, new = list(stack), list(stack)
        for i in range(N):
            mean = sum(old[j] for j in range(N) if j != i) / (N - 1)
            new[i] = (1 - beta) * old[i] + beta * mean
        results.append(torch.stack(new))
    return results


def normalised(x, eps):
    mean = x.sum() / x.numel()
    return (x - mean) / torch.sqrt(((x - mean) ** 2).sum() / x.numel() + eps)


def group_norm(x, groups, p, eps=1e-6):
    "One item `c ...`: every group of channels to mean 0 and deviation 1, then the affine map."
    size = len(x) // groups
    y = torch.cat([normalised(x[g * size:(g + 1) * size], eps) for g in range(groups)])
    return each((len(x),), lambda c: y[c] * p["weight"][c] + p["bias"][c])


def layer_norm(tokens, p, eps=1e-5):
    return torch.stack([normalised(x, eps) * p["weight"] + p["bias"] for x in tokens])


def attention(tokens, context, p, head_dim):
    "softmax(q k / √d) v for every head and every query; tokens `l c`, context `n c'`."
    q = [linear(x, p, "to_q") for x in tokens]
    k, v = [linear(x, p, "to_k") for x in context], [linear(x, p, "to_v") for x in context]
    results = []
    for query in q:
        heads = []
        for start in range(0, len(query), head_dim):
            head = slice(start, start + head_dim)
            weights = [((query[head] * key[head]).sum() / math.sqrt(head_dim)).exp() for key in k]
            heads.append(sum(w / sum(weights) * x[head]
                             for w, x in zip(weights, v, strict=True)))
        results.append(linear(torch.cat(heads), p, "to_out.0"))
    return torch.stack(results)


def spatial_transformer(x, text, p, head_dim, groups, ffn):
    "Attention in every frame, cross-attention to its clip's text, `ffn(tokens, weights)`."
    B, _, T, H, W = x.shape

    def frame(b, t):
        normed = group_norm(x[b, :, t], groups, part(p, "norm"))
        n = torch.stack([linear(normed[:, i, j], p, "proj_in") for i in range(H) for j in range(W)])
        y = layer_norm(n, part(p, "norm1"))
        n = n + attention(y, y, part(p, "self_attention"), head_dim)
        y = layer_norm(n, part(p, "norm2"))
        n = n + attention(y, text[b], part(p, "cross_attention"), head_dim)
        n = n + ffn(layer_norm(n, part(p, "norm3")), part(p, "experts"))
        return each((H, W), lambda i, j: x[b, :, t, i, j] + linear(n[i * W + j], p, "proj_out"))

    return each((B, T), frame).permute(0, 4, 1, 2, 3)


def position(t, width):
    "Sines and cosines in turn, of wavelengths from 2π to almost 20000π."
    angles = [t / 10000 ** (i / width) for i in range(0, width, 2)]
    return torch.tensor([f(a) for a in angles for f in (math.sin, math.cos)]).double()


def temporal_transformer(x, p, head_dim, groups, ffn):
    "Attention among the frames of every place, `ffn(tokens, weights)`."
    B, C, T, H, W = x.shape
    normed = torch.stack([group_norm(clip, groups, part(p, "norm")) for clip in x])

    def place(b, i, j):
        n = torch.stack([linear(normed[b, :, t, i, j], p, "proj_in") for t in range(T)])
        where = [position(t, C) for t in range(T)]
        n = n + p["position_gain"] * torch.stack(where)
        for k in range(sum(name.endswith("to_q.weight") for name in p)):
            y = layer_norm(n, part(p, f"norms.{k}"))
            y = torch.stack([y[t] + where[t] for t in range(T)])
            n = n + attention(y, y, part(p, f"attentions.{k}"), head_dim)
        n = n + ffn(layer_norm(n, part(p, "norm_experts")), part(p, "experts"))
        return torch.stack([x[b, :, t, i, j] + linear(n[t], p, "proj_out") for t in range(T)])

    return each((B, H, W), place).permute(0, 4, 3, 1, 2)


# Diffusion (2.1)

def alpha_bar(step, steps=1000, first=0.00085, last=0.012):
    "ᾱ_t, the product of α_k = 1 - β_k up to t; √β goes evenly from the first to the last."
    product = 1.
    for k in range(step + 1):
        root = math.sqrt(first) + k / (steps - 1) * (math.sqrt(last) - math.sqrt(first))
        product *= 1 - root ** 2
    return product


def diffuse(x, noise, step):
    "z_t of equation (1) for one clip."
    a = alpha_bar(step)
    return math.sqrt(a) * x + math.sqrt(1 - a) * noise


def diffusion_loss(predicted, noise):
    "Equation (2), as a mean over the elements."
    total = sum(((e - z) ** 2).sum() for e, z in zip(noise, predicted, strict=True))
    return total / noise.numel()


# Mistakes, and how far apart two results are

def mutant(old, new):
    "This module with `old` replaced by `new`."
    source = Path(__file__).read_text(encoding="utf-8").partition("# Mistakes, and")[0]
    assert source.count(old) == 1, f"{old!r} is in literal.py {source.count(old)} times"
    module = types.ModuleType("mutant")
    exec(compile(source.replace(old, new), "mutant", "exec"), vars(module))
    return module


def gap(got, want, leaves):
    "Largest difference of two results, and of the gradients that each sends to `leaves`."
    assert got.shape == want.shape, f"{tuple(got.shape)} is not {tuple(want.shape)}"
    direction = torch.arange(got.numel(), dtype=got.dtype).sin().view_as(got)
    gradients = [torch.autograd.grad((y * direction).sum(), leaves, materialize_grads=True)
                 for y in (got, want)]
    steepest = max((g - w).abs().max().item() for g, w in zip(*gradients, strict=True))
    return (got - want).abs().max().item(), steepest


def randomise(module, scale=0.5):
    "Every parameter drawn at random: nothing is hidden by a zero or an identity."
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(0, scale)
    return module.double()
