"""What a run takes is counted, and refused where it is too much, without allocating it."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from versvideo.core import machine as core
from versvideo.lab.plan import (
    PARTS,
    activation_bytes,
    count_flops,
    largest_batch,
    launch_command,
    meta_unet,
    parameters_by_part,
    require_training_memory,
    show_plan,
    training_bytes,
)
from versvideo.models.sizes import SIZES, count_parameters


def numbers(**changes):
    return SimpleNamespace(**(dict(steps=7, batch_size=2, mixed_precision="no") | changes))


class NoAllocation(TorchDispatchMode):
    "Refuses to make a tensor of more than a megabyte."
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.device.type != "meta":
            assert result.numel() * result.element_size() < 2**20, f"{func} allocates"
        return result


def test_size_that_does_not_fit_is_refused_before_allocation(monkeypatch):
    with pytest.raises(AssertionError, match="allocates"), NoAllocation():
        torch.zeros(2**20)
    monkeypatch.setattr(core, "free_memory", lambda device=None: 30 * 10**9)
    with NoAllocation():
        require_training_memory("smoke", SIZES["smoke"], numbers(), device=torch.device("cpu"))
        with pytest.raises(MemoryError) as error:
            require_training_memory("H", SIZES["H"], numbers(batch_size=1), True, torch.device("cpu"))
        with pytest.raises(MemoryError, match="for a batch of 64 clips"):
            require_training_memory("S", SIZES["S"], numbers(batch_size=64), False, torch.device("cpu"))
        require_training_memory("S", SIZES["S"], numbers(batch_size=64), True, torch.device("cpu"))
    for text in ("training size H (205", "for a batch of 1 clips", "needs 46.", "GiB on cpu",
                 "27.9 GiB are free", "smaller size", "accelerate launch", "size=H"):
        assert text in str(error.value)


@pytest.mark.parametrize("size", SIZES)
def test_every_parameter_has_one_part(size):
    for merged, total in zip((False, True), count_parameters(SIZES[size]), strict=True):
        counts = parameters_by_part(meta_unet(SIZES[size], merged))
        assert list(counts) == list(PARTS) and all(counts.values())
        assert sum(counts.values()) == total


def test_flops_of_the_large_sizes():
    "Counted by another program for the same shapes: 17.62 TFLOP for H."
    assert count_flops(meta_unet(SIZES["H"]), (24, 40, 72)) == pytest.approx(17.62e12, rel=0.01)
    trained, merged = (count_flops(meta_unet(SIZES["XS"], m), (4, 8, 8)) for m in (False, True))
    assert trained == merged


def test_activations_are_counted_for_a_clip_and_for_what_checkpointing_leaves():
    whole, checkpointed = activation_bytes(SIZES["smoke"])
    assert 0 < checkpointed < whole
    assert training_bytes(SIZES["smoke"], "no")["a clip"] == whole
    assert training_bytes(SIZES["smoke"], "bf16")["a clip, checkpointed"] < checkpointed
    twice, four_times = (activation_bytes(replace(SIZES["smoke"], frames=n))[0] for n in (8, 16))
    # no n×n matrices; the joined weights of the attention do not grow
    assert four_times - twice == pytest.approx(2 * (twice - whole), rel=0.01)


def test_batch_that_fits():
    need = {"weights": 60, "a clip": 20, "a clip, checkpointed": 4}
    assert largest_batch(need, 100, False) == 1 and largest_batch(need, 100, True) == 7
    assert largest_batch(need, 60, True) == 0


def test_plan_is_printed(capsys):
    show_plan("L", SIZES["L"], numbers(batch_size=16, mixed_precision="bf16"), checkpointing=True)
    shown = capsys.readouterr().out
    for text in (*PARTS, "517.", "293.", "AdamW", "141 GB", launch_command("L"),
                 "accelerate launch --num_processes 8"):
        assert text in shown
