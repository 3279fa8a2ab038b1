"""Tests that follow LONGSPAN_TEST_DEVICE: what they make without a device, and what goes to ranks and comes back."""

import torch

from tests.helpers.device import MadeOn, moved

META, CPU = torch.device("meta"), torch.device("cpu")


def test_what_is_made_without_a_device_is_made_on_the_one_of_the_tests() -> None:
    with MadeOn(META):
        assert torch.ones(3).device == torch.arange(2).device == torch.nn.Linear(2, 2).weight.device == META
        assert torch.randn(3, generator=torch.Generator().manual_seed(0)).device == META  # a generator of the CPU
        assert torch.ones(3, device="cpu").device == CPU
        assert torch.randn(3, requires_grad=True).is_leaf


def test_random_numbers_are_those_of_the_cpu() -> None:
    torch.manual_seed(3)
    wanted = torch.randn(4)
    torch.manual_seed(3)
    with MadeOn(torch.device("cpu", 0)):
        assert torch.equal(torch.randn(4), wanted)


def test_leaves_stay_leaves_when_they_are_moved() -> None:
    found = moved({"x": [torch.ones(2, requires_grad=True), 3], "y": (torch.zeros(1),)}, META)
    (x, three), (y,) = found["x"], found["y"]
    assert (x.device, y.device, three) == (META, META, 3)
    assert x.is_leaf
    assert x.requires_grad
