"""Offload of activations to host memory: each tensor once."""

import pytest
import torch

from longspan.memory import offload


def test_a_tensor_that_is_saved_twice_is_offloaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "OFFLOAD_BYTES", 0)
    made = []
    copy = offload._HostCopy.__init__
    monkeypatch.setattr(offload._HostCopy, "__init__", lambda self, x: made.append(x.shape) or copy(self, x))

    class Twice(torch.nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return (x * y).sum() + (x * y * y).sum()

    block, x, y = Twice(), torch.randn(7, requires_grad=True), torch.randn(7, requires_grad=True)
    expected = torch.autograd.grad(block(x, y), [x, y])
    offload.offload_activations(block)
    found = torch.autograd.grad(block(x, y), [x, y])
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert len(made) == 3  # x, y and their product, of which x is saved twice and y three times
