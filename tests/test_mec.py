"""The multi-excitation convolution is its equations, written out in `literal`."""

import literal
import pytest
import torch
import torch.nn.functional as F

from versvideo.modules.mec import (
    STARTS,
    ChannelExcitation,
    MotionExcitation,
    MultiExcitationConv,
    SpatialTemporalExcitation,
    temporal_shift,
)

PARTS = {
    "spatial_temporal": (lambda c: SpatialTemporalExcitation(), "spatial_temporal_mask"),
    "channel": (lambda c: ChannelExcitation(c, reduction=4), "channel_mask"),
    "motion": (lambda c: MotionExcitation(c, reduction=4), "motion_mask"),
    "mec": (lambda c: MultiExcitationConv(c, reduction=4, share=1 / 4),
            "multi_excitation"),
}
FORMS = [dict(start=start, magnitude=magnitude) for start in STARTS for magnitude in (False, True)]


def clip(*shape):
    torch.manual_seed(1)
    return torch.randn(shape, dtype=torch.double, requires_grad=True)


def compare(name, x, version=literal):
    "Differences of values and of gradients between a module and its equations."
    torch.manual_seed(0)
    make, equation = PARTS[name]
    module = literal.randomise(make(x.shape[1]))
    p = dict(module.named_parameters())
    share = {"share": 1 / 4} if name == "mec" else {}
    return literal.gap(module(x), getattr(version, equation)(x, p, **share), [x, *p.values()])


@pytest.mark.parametrize("shape", [(2, 8, 4, 2, 3), (1, 16, 2, 1, 1), (1, 20, 3, 2, 2)])
def test_temporal_shift(shape):
    x = clip(*shape)
    assert max(literal.gap(temporal_shift(x), literal.temporal_shift(x), [x])) == 0


def test_temporal_shift_by_hand():
    x = torch.arange(1., 5).expand(1, 8, 4)[..., None, None]
    for shift in (temporal_shift, literal.temporal_shift):
        y = shift(x)[0, :, :, 0, 0].tolist()
        assert y[:3] == [[0, 1, 2, 3], [2, 3, 4, 0], [1, 2, 3, 4]]


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("shape", [(2, 8, 3, 3, 4), (1, 8, 2, 1, 1), (1, 4, 5, 2, 3)])
def test_equals_its_equation(name, shape):
    assert max(compare(name, clip(*shape))) < 1e-9


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_the_gate(form):
    torch.manual_seed(0)
    module, x = literal.randomise(MultiExcitationConv(8, **form)), clip(2, 8, 4, 3, 3)
    p = dict(module.named_parameters())
    assert max(literal.gap(module(x), literal.multi_excitation(x, p, **form), [x, *p.values()])) < 1e-9


@pytest.mark.parametrize("left", [("channel",), ("spatial_temporal", "motion")])
def test_some_excitations(left):
    torch.manual_seed(0)
    module, x = literal.randomise(MultiExcitationConv(8, excitations=left, start="paper")), clip(1, 8, 3, 3, 3)
    p = dict(module.named_parameters())
    assert {name.split(".")[0] for name in p} == {"spatial", "temporal", *left}
    masks = dict(spatial_temporal=literal.spatial_temporal_mask, channel=literal.channel_mask,
                 motion=literal.motion_mask)
    z = literal.temporal_shift(x)
    factorized = literal.temporal(literal.spatial(x, literal.part(p, "spatial")), literal.part(p, "temporal"))
    want = factorized + sum(literal.excite(z, masks[name](z, literal.part(p, name))) for name in left)
    assert max(literal.gap(module(x), want, [x, *p.values()])) < 1e-9


def test_an_image_through_the_excited_branches():
    torch.manual_seed(0)
    module, x = literal.randomise(MultiExcitationConv(8, start="paper", images=True)), clip(2, 8, 1, 3, 3)
    p, z = dict(module.named_parameters()), literal.temporal_shift(x)
    masks = (literal.spatial_temporal_mask(z, literal.part(p, "spatial_temporal")),
             literal.channel_mask(z, literal.part(p, "channel")), literal.motion_mask(z, literal.part(p, "motion")))
    want = literal.spatial(x, literal.part(p, "spatial")) + sum(literal.excite(z, mask) for mask in masks)
    assert max(literal.gap(module(x), want, [x, *p.values()])) < 1e-9


@pytest.mark.parametrize("name", ["spatial_temporal", "channel", "motion"])
def test_masks_of_one_frame(name):
    assert max(compare(name, clip(2, 8, 1, 3, 3))) < 1e-9


@pytest.mark.parametrize("make, equation", [
    (ChannelExcitation, literal.channel_mask), (MotionExcitation, literal.motion_mask)])
def test_squeeze_to_a_sixteenth(make, equation):
    module, x = literal.randomise(make(32)), clip(1, 32, 3, 2, 2)
    p = dict(module.named_parameters())
    assert len(p["squeeze.weight"]) == 2
    assert max(literal.gap(module(x), equation(x, p), [x, *p.values()])) < 1e-9


def test_single_precision():
    module, x = literal.randomise(MultiExcitationConv(8)), clip(2, 8, 4, 3, 3)
    want = literal.multi_excitation(x, dict(module.named_parameters()))
    got = module.float()(x.float())
    assert (got - want).abs().max() < 1e-5 * want.abs().max()


def test_starts_as_the_image_convolution_of_every_frame():
    module, x = MultiExcitationConv(8).double(), clip(2, 8, 4, 5, 3)
    frames = [F.conv2d(x[:, :, t], module.spatial.weight, module.spatial.bias, padding=1)
              for t in range(4)]
    assert (module(x) - torch.stack(frames, dim=2)).abs().max() < 1e-12


def test_one_frame_takes_the_image_convolution_alone():
    module, x = literal.randomise(MultiExcitationConv(8)), clip(2, 8, 1, 3, 4)
    want = literal.spatial(x, literal.part(dict(module.named_parameters()), "spatial"))
    assert max(literal.gap(module(x), want, [x, *module.parameters()])) < 1e-9
    assert (literal.temporal(want, literal.part(dict(module.named_parameters()), "temporal"))
            - want).abs().max() > 1e-2


def test_shift_refuses_more_than_all_channels():
    with pytest.raises(ValueError, match=r"share=0\.7.*\[0, 1/2\]"):
        temporal_shift(clip(1, 8, 2, 1, 1), 0.7)


MUTANTS = {
    "shift the other way": ("mec", "t + step", "t - step"),
    "shift one way only": ("mec", "step = -1 if c < n else 1", "step = -1 if c < n else -1"),
    "shift wraps around": ("mec", "if 0 <= t < len(frames)", "if t < len(frames)"),
    "convolution flipped": ("mec", "padded[i:i + h, j:j + w]", "padded[2 - i:2 - i + h, j:j + w]"),
    "temporal kernel flipped": ("mec", "at(x[b, c], t + k - 1)", "at(x[b, c], t - k + 1)"),
    "temporal kernel causal": ("mec", "at(x[b, c], t + k - 1)", "at(x[b, c], t + k - 2)"),
    "gates without the identity": ("mec", "return z + z * mask", "return z * mask"),
    "masks from the unshifted clip": (
        "mec", 'motion_mask(z, part(p, "motion"), ', 'motion_mask(x, part(p, "motion"), '),
    "excites the unshifted clip": ("mec", "sum(excite(z, mask)", "sum(excite(x, mask)"),
    "factorized path shifted": ("mec", "spatial(x, part", "spatial(z, part"),
    "a branch left out": (
        "mec", 'channel_mask(z, part(p, "channel")),', ""),
    "no scale": ("mec", " + scale[c, 0, 0, 0] * excited", " + excited"),
    "M_S pools time": ("spatial_temporal", "sum(z[b, c, t] for c in range(C))",
                       "sum(z[b, c].mean(0) for c in range(C))"),
    "M_S sums": ("spatial_temporal", "sum(z[b, c, t] for c in range(C)) / C",
                 "sum(z[b, c, t] for c in range(C))"),
    "M_S without past": ("spatial_temporal", "for k in range(3)]\n        return sigmoid",
                         "for k in range(1, 3)]\n        return sigmoid"),
    "M_C pools time": ("channel", "z[b, c, t].sum() / z[b, c, t].numel()", "z[b, c].mean()"),
    "M_C pools channels": ("channel", "z[b, c, t].sum() / z[b, c, t].numel()", "z[b, :, t].mean()"),
    "M_C time reversed": ("channel", "at(c2[b, i], t + k - 1)", "at(c2[b, i], t - k + 1)"),
    "sum instead of difference": ("motion", "k_2d) - q[t - 1]", "k_2d) + q[t - 1]"),
    "difference reversed": ("motion", "filter3x3(q[t], k_2d) - q[t - 1]",
                            "q[t - 1] - filter3x3(q[t], k_2d)"),
    "K filters the earlier frame": ("motion", "filter3x3(q[t], k_2d) - q[t - 1]",
                                    "q[t] - filter3x3(q[t - 1], k_2d)"),
    "first difference zero, not last": ("motion", "[*pooled, z.new_zeros(())]",
                                        "[z.new_zeros(()), *pooled]"),
    "pooled by sum": ("motion", "difference.sum() / (H * W)", "difference.sum()"),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_sees_the_mistake(mutant):
    name, old, new = MUTANTS[mutant]
    values, gradients = compare(name, clip(2, 4, 3, 2, 3), literal.mutant(old, new))
    assert values > 1e-3 and gradients > 1e-3
