"""A new condition is one registration: 'pose', with a network of its own, through everything that uses conditions."""

import functools
from datetime import datetime
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn

from versvideo.core.notebooks import run_cells
from versvideo.data.conditions import (
    CONDITIONS,
    Condition,
    extract_condition,
    frame_by_frame,
    parse_models,
    with_models,
)
from versvideo.media.video import write_video
from versvideo.models.controlnet import VersVideoControlNet
from versvideo.pipelines.edit import edit_clip
from versvideo.pipelines.explorer import Explorer
from versvideo.trainers.loading import load_trained

REPO = Path(__file__).resolve().parents[1]


class PoseNet(nn.Module):
    "Stands for a pose network: frames `n 3 h w` to three channels in [0, 1]."

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        return self.layer(frames).sigmoid()


@functools.lru_cache(1)
def pose_network(folder: str) -> PoseNet:
    network = PoseNet()
    network.load_state_dict(torch.load(Path(folder) / "pose.pt", weights_only=True))
    return network.eval()


def pose(clip: torch.Tensor, model: str) -> torch.Tensor:
    return frame_by_frame(pose_network(model), clip)


@pytest.fixture
def models(tmp_path, monkeypatch) -> list[str]:
    "Folders of two pose networks; the first is the registered default."
    for seed, name in enumerate(("default", "other")):
        torch.manual_seed(seed)
        (tmp_path / name).mkdir()
        torch.save(PoseNet().state_dict(), tmp_path / name / "pose.pt")
    folders = [str(tmp_path / name) for name in ("default", "other")]
    monkeypatch.setitem(CONDITIONS, "pose", Condition(pose, channels=3, model=folders[0]))
    return folders


@pytest.fixture
def clip() -> torch.Tensor:
    return torch.randint(256, (1, 3, 4, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def pipe(models):
    "An untrained pipeline whose ControlNet gets the new condition; its weights are random, so that it changes clips."
    torch.manual_seed(0)
    pipe = load_trained("smoke")
    control = VersVideoControlNet.from_unet(pipe.unet, dict(canny=1), adapter_channels=(4, 8, 8, 8))
    control.add_condition("pose", CONDITIONS["pose"].channels)
    for parameter in (*pipe.unet.parameters(), *control.parameters()):
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    pipe.register_modules(controlnet=control.eval())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def expected(model: str, clip: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return pose(clip / 255, model)


def test_extraction_uses_the_registered_network_or_the_given_one(models, clip):
    assert extract_condition("pose", clip).shape == (1, 3, 4, 32, 32)
    assert torch.equal(extract_condition("pose", clip), expected(models[0], clip))
    assert torch.equal(extract_condition("pose", clip, model=models[1]), expected(models[1], clip))
    assert not torch.equal(expected(models[0], clip), expected(models[1], clip))


def test_its_network_is_named_like_every_other(models):
    assert with_models() == ["hed", "depth", "pose"]
    assert parse_models(f"depth=a/b, pose={models[1]}") == {"depth": dict(model="a/b"), "pose": dict(model=models[1])}
    with pytest.raises(ValueError, match="conditions with one are hed, depth, pose"):
        parse_models("canny=a/b")


def test_a_controlnet_learns_it_beside_another(pipe, clip):
    maps = {name: extract_condition(name, clip) for name in ("canny", "pose")}
    control, latents, text = pipe.controlnet, torch.randn(1, 4, 4, 4, 4), torch.randn(1, 7, 128)
    assert control.config.conditions == dict(canny=1, pose=3)
    with torch.no_grad():
        alone, both = (control(latents, 500, text, given).mid_block_res_sample
                       for given in ({"canny": maps["canny"]}, maps))
    assert both.isfinite().all() and not torch.allclose(alone, both)


def test_a_clip_is_edited_by_it(pipe, models, clip):
    def edit(options):
        noise = torch.Generator().manual_seed(0)
        return edit_clip(pipe, clip, "a red circle", "pose", options, generator=noise, num_inference_steps=1)

    edits = [edit(None), edit(parse_models(f"pose={models[1]}"))]
    for found, model in zip(edits, models, strict=True):
        assert torch.equal(found.maps["pose"], expected(model, clip))
        assert found.result.shape == clip.shape and found.result.isfinite().all()
    assert not torch.equal(edits[0].result, edits[1].result)


def test_the_explorer_offers_it_with_a_field_for_its_network(pipe, models, clip, tmp_path):
    pytest.importorskip("ipywidgets")
    explorer, path = Explorer(pipe), write_video(clip[0], tmp_path / "clip.mp4")
    assert list(explorer.conditions.scales) == ["canny", "pose"] and list(explorer.conditions.models) == ["pose"]
    explorer.conditions.video.value = (dict(name=path.name, content=path.read_bytes(), type="video/mp4",
                                            size=path.stat().st_size, last_modified=datetime.now()),)
    explorer.conditions.scales["pose"].value, explorer.prompt.steps.value = 1, 1
    explorer.generate()
    assert explorer.message.value == "" and explorer.result.isfinite().all()
    explorer.conditions.models["pose"].value = models[1]
    default = explorer.result
    explorer.generate()
    assert not torch.equal(default, explorer.result)


@pytest.mark.parametrize("default", [True, False])
def test_a_run_trains_it(models, tmp_path, monkeypatch, default):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    AcceleratorState._reset_state(reset_partial_state=True)
    named = [] if default else [f"condition_models=pose={models[1]}"]
    run = run_cells(REPO / "nbs/22_train_controlnet.ipynb",
                    ["conditions=canny,pose", "steps=1", "track=", f"out={tmp_path / 'run'}", *named])
    AcceleratorState._reset_state(reset_partial_state=True)
    assert run.control.config.conditions == dict(canny=1, pose=3)
    clips = run.held.batch.clips
    assert torch.equal(run.maps["pose"], expected(models[0 if default else 1], clips))
    assert all(parameter.isfinite().all() for parameter in run.control.adapters["pose"].parameters())
    trained = VersVideoControlNet.from_pretrained(tmp_path / "run/weights/controlnet")
    assert trained.config.conditions == dict(canny=1, pose=3)


@pytest.mark.parametrize("name", ["depth", "hed"])
def test_a_hub_that_does_not_answer_is_noticed_at_once(monkeypatch, clip, name):
    "Hugging Face's libraries would try again for up to 50 s, and are not asked."
    monkeypatch.setattr("versvideo.core.hub.hub_answers", lambda: False)
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: pytest.fail("the network was asked"))
    with pytest.raises(FileNotFoundError, match="does not answer, and owner/none has not been .* give model="):
        extract_condition(name, clip, model="owner/none")
