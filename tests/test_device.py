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


def test_random_numbers_are_drawn_on_the_cpu() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    with MadeOn(META):
        torch.randn(4)
    after = torch.get_rng_state()
    torch.manual_seed(3)
    torch.randn(4)
    assert torch.equal(after, torch.get_rng_state())
    assert not torch.equal(after, before)


def test_leaves_stay_leaves_when_they_are_moved() -> None:
    found = moved({"x": [torch.ones(2, requires_grad=True), 3], "y": (torch.zeros(1),)}, META)
    (x, three), (y,) = found["x"], found["y"]
    assert (x.device, y.device, three) == (META, META, 3)
    assert x.is_leaf
    assert x.requires_grad
