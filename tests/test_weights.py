"""Other people's weights: where they are read from, and that a misfit changes nothing."""

import copy
import hashlib
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, MotionAdapter, UNet2DConditionModel
from safetensors.torch import load_file

from versvideo.core.files import WEIGHTS
from versvideo.models.pretrained import (
    adapter_config,
    check_predicts_noise,
    load_image_unet,
    load_init,
    load_motion_adapter,
    video_config,
)
from versvideo.models.selection import select_weights
from versvideo.models.unet import VersVideoUNet

SMALL = dict(block_out_channels=(8, 16), norm_num_groups=4, cross_attention_dim=6,
             layers_per_block=1, attention_head_dim=2,
             down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
             up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))


def image_unet(**changes):
    torch.manual_seed(0)
    return UNet2DConditionModel(**SMALL | changes).eval()


def motion_adapter(**changes):
    torch.manual_seed(1)
    return MotionAdapter(**dict(block_out_channels=(8, 16), motion_layers_per_block=1,
                                motion_num_attention_heads=2, motion_norm_num_groups=4) | changes)


def video_unet(image, **changes):
    torch.manual_seed(2)
    config = adapter_config(image.config, motion_adapter().config)
    return VersVideoUNet(**config | dict(experts=(2, 2)) | changes).eval()


def state(unet):
    return copy.deepcopy(unet.state_dict())


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("wide, widths, heads", [
    (dict(block_out_channels=(16, 32), attention_head_dim=(2, 4)), (8, 16), (1, 2)),  # every second head, whole
    (dict(block_out_channels=(16, 32), attention_head_dim=(2, 4)), (8, 16), (2, 4)),  # half of every head
    (dict(block_out_channels=(18, 36), attention_head_dim=(2, 3), norm_num_groups=6), (12, 24), (2, 3)),  # two thirds
])
def test_a_narrower_video_unet_takes_channels_and_heads_of_a_pipeline(wide, widths, heads, tmp_path):
    "Each of its frames is then treated as the selected image model treats it."
    wide = image_unet(**wide)
    wide.save_pretrained(tmp_path / "unet")
    DDIMScheduler().save_pretrained(tmp_path / "scheduler")
    config = video_config(wide.config) | dict(
        block_out_channels=widths, head_dim=tuple(c // n for c, n in zip(widths, heads, strict=True)))
    unet = VersVideoUNet(**config, experts=(2, 3)).eval()
    before = state(unet)
    report, = load_init(unet, str(tmp_path)).values()
    assert report.selected and 0.3 < report.share < 0.9
    loaded = sum(before[name].numel() for name in report.mapped.values())
    assert report.share == pytest.approx(loaded / unet.num_parameters())
    image = select_weights(wide, widths, heads)
    z, text, step = torch.randn(2, 4, 3, 6, 5), torch.randn(2, 7, 6), torch.tensor([3, 700])
    with torch.no_grad():
        got = unet(z, step, text).sample
        want = torch.stack([image(z[:, :, t], step, text).sample for t in range(3)], dim=2)
    assert got.isfinite().all() and (got - want).abs().max() < 1e-5
    assert all(torch.equal(state(unet)[name], before[name]) for name in report.kept)


def test_a_model_of_the_velocity_is_refused(tmp_path):
    image = image_unet()
    image.save_pretrained(tmp_path / "unet")
    DDIMScheduler(prediction_type="v_prediction").save_pretrained(tmp_path / "scheduler")
    unet = video_unet(image)
    before = state(unet)
    for folder in (tmp_path, tmp_path / "unet"):
        with pytest.raises(ValueError, match="prediction_type='v_prediction'.* take .*sd21"):
            load_init(unet, str(folder))
    assert same(state(unet), before)
    DDIMScheduler().save_pretrained(tmp_path / "scheduler")
    check_predicts_noise(tmp_path)
    load_init(unet, str(tmp_path))


@pytest.mark.parametrize("linear", [False, True])
def test_every_frame_is_the_image_model_s(linear):
    image = image_unet(use_linear_projection=linear)
    unet = VersVideoUNet(**video_config(image.config), experts=(3, 2))
    load_image_unet(unet, image)
    z, text, step = torch.randn(2, 4, 3, 6, 5), torch.randn(2, 7, 6), torch.tensor([3, 700])
    with torch.no_grad():
        want = torch.stack([image(z[:, :, t], step, text).sample for t in range(3)], dim=2)
        for train in (False, True):
            assert (unet.train(train)(z, step, text).sample - want).abs().max() < 1e-5


def test_folders_of_models_and_of_a_pipeline(tmp_path):
    image, adapter = image_unet(), motion_adapter()
    image.save_pretrained(tmp_path / "pipe" / "unet")
    adapter.save_pretrained(tmp_path / "adapter")
    want = video_unet(image)
    load_image_unet(want, image), load_motion_adapter(want, adapter)
    for folder in ("pipe", "pipe/unet"):
        unet = video_unet(image)
        load_init(unet, f"{tmp_path / folder}+{tmp_path / 'adapter'}")
        assert same(state(unet), state(want))
    unet = video_unet(image)
    assert len(load_init(unet, str(tmp_path / "pipe"))) == 1 and not same(state(unet), state(want))


def test_pickled_weights_are_not_read(tmp_path):
    image = image_unet()
    image.save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(OSError, match="safetensors"):
        load_image_unet(video_unet(image), tmp_path)


def test_a_misfit_is_named_and_changes_nothing():
    image, adapter = image_unet(), motion_adapter()
    unet = video_unet(image)
    before = state(unet)
    for load, message in [
            (lambda: load_image_unet(unet, image_unet(block_out_channels=(8, 24))), "block_out_c"),
            (lambda: load_image_unet(unet, image_unet(cross_attention_dim=8)), "cross_attention"),
            (lambda: load_image_unet(unet, image_unet(block_out_channels=(4, 8))), "8 channels of conv_in"),
            (lambda: load_image_unet(unet, image_unet(block_out_channels=(16, 32), attention_head_dim=1)),
             "2 attention heads cannot be selected from 1"),
            (lambda: load_image_unet(unet, image_unet(attention_head_dim=4)), "head_dim"),
            (lambda: load_motion_adapter(unet, motion_adapter(block_out_channels=(8, 24))),
             "do not fit"),
            (lambda: load_motion_adapter(unet, motion_adapter(motion_layers_per_block=2)),
             "has no place")]:
        with pytest.raises(ValueError, match=message):
            load()
        assert same(state(unet), before)
    with pytest.raises(ValueError, match="has no place"):
        load_motion_adapter(video_unet(image, temporal_attentions=1), adapter)


def test_reports_name_every_key():
    image, adapter = image_unet(), motion_adapter()
    unet = video_unet(image)
    mine = set(unet.state_dict())
    for report, other in ((load_image_unet(unet, image), image),
                          (load_motion_adapter(unet, adapter), adapter)):
        assert set(report.mapped) | set(report.computed) == set(other.state_dict())
        assert set(report.mapped.values()) | set(report.kept) == mine
        assert len(report.mapped) + len(report.kept) == len(mine)


@pytest.mark.parametrize("load", [load_image_unet, load_motion_adapter])
def test_source_that_is_nowhere(load, tmp_path):
    with pytest.raises(FileNotFoundError, match="(?s)nope holds no .* as safetensors.*give its folder"):
        load(video_unet(image_unet()), tmp_path / "nope")


# Of the values that the records were measured with, whatever the parameters are called.
VALUES = {
    "classifier": "c346e9fc509f94e2dbd0cdce8d0b96d8be95c88a3d803a9ea71d1ec6765161c9",
    "controlnet": "ad20bc7b6c28315849b46d0e1171af66ab101fcf5502c18124096d5cf8abbd70",
    "image_encoder": "cdf8c63cc4035b340ff099efb53d09f20544653ebf5864fc9452f71b2aa44a1e",
    "image_vae": "e1705d18f20b126c919684dcabd98dfd8256fd32541d0fac89a23c6804369efd",
    "student": "be98a58259124ddc02fc9d95423c66c74bdb3dd0ff806ed6da751a06ba356743",
    "style_adapter": "be03c0a4c371626486605d5e60127679cab562445a0c43693927b4e83db629b6",
    "text_encoder": "50eaf044b51f8d49f87021770a75640696943d70f4108b7a23c848c61775f651",
    "unet": "17ab65b825286cdd2ed3d3ae57dd6cf03cea57158792f6f14f3d19189b740ef6",
    "vae": "8cfca7f8051c64dac2e01e9043ff9f2591e6dbf1db59c80addbbd6f8d13cd989",
}


def digest_of_values(path: Path) -> str:
    "Checksum of the tensors of a file that does not depend on their names or order."
    each = [hashlib.sha256(f"{v.dtype} {tuple(v.shape)}".encode()
                           + v.contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
            for v in load_file(path).values()]
    return hashlib.sha256("".join(sorted(each)).encode()).hexdigest()


@pytest.mark.parametrize("part", VALUES)
def test_embedded_values(part):
    "The embedded weights are those of the records; a training that replaces them has to change this table."
    path, = (WEIGHTS / "XS" / part).glob("*.safetensors")
    assert digest_of_values(path) == VALUES[part]
    assert not {"where", "which", "when"} & {word for key in load_file(path) for word in key.split(".")}
