"""Offload of activations to host memory: each tensor once, fetched one block ahead, and no cast of a weight."""

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
    offload.offload_activations([block])
    found = torch.autograd.grad(block(x, y), [x, y])
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert len(made) == 3  # x, y and their product, of which x is saved twice and y three times


def test_the_copies_of_a_block_are_fetched_when_the_backward_of_the_next_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two micro-batches whose forwards are both over before the first backward: neither fetches for the other."""
    monkeypatch.setattr(offload, "OFFLOAD_BYTES", 0)
    torch.manual_seed(0)
    blocks = [torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.GELU()) for _ in range(4)]
    whole, xs = torch.nn.Sequential(*blocks), [torch.randn(2, 4, requires_grad=True) for _ in range(2)]
    expected = [torch.autograd.grad(whole(x).square().sum(), x)[0] for x in xs]

    events: list[str] = []
    fetch = offload._OffloadedBlock._fetch

    def noted(self: offload._OffloadedBlock) -> None:
        if not self._fetched:
            events.append(f"fetch {self.index}")
        fetch(self)

    monkeypatch.setattr(offload._OffloadedBlock, "_fetch", noted)
    offload.offload_activations(blocks[:-1])
    outputs = []
    for x in xs:
        for index, block in enumerate(blocks):
            x = block(x)
            x.register_hook(lambda grad, index=index: events.append(f"backward {index}"))
        outputs.append(x.square().sum())
    for output, x, grad in zip(outputs, xs, expected, strict=True):
        events.clear()
        assert torch.equal(torch.autograd.grad(output, x)[0], grad)
        assert events == [
            "backward 3", "backward 2", "fetch 2", "fetch 1", "backward 1", "fetch 0", "backward 0"
        ]  # fmt: skip


def test_a_tensor_is_copied_back_once_and_freed_after_its_last_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "OFFLOAD_BYTES", 0)
    copies, restore = [], offload._HostCopy.restore

    def noted(self: offload._HostCopy) -> torch.Tensor:
        copies.append((self, back := restore(self)))
        return back

    monkeypatch.setattr(offload._HostCopy, "restore", noted)
    block, x = torch.nn.Tanh(), torch.randn(5, requires_grad=True)
    vars(block)["forward"] = lambda x: (x * x * x).sum()
    offload.offload_activations([block])
    for _ in range(2):
        copies.clear()
        loss = block(x)
        first = torch.autograd.grad(loss, x, retain_graph=True)[0]
        assert torch.equal(torch.autograd.grad(loss, x)[0], first)  # a second backward fetches again
        torch.testing.assert_close(first, 3 * x.detach() ** 2)
        of_x = [back.data_ptr() for copy, back in copies if torch.equal(back, x)]
        assert len(of_x) == 6
        assert len(set(of_x[:3])) == len(set(of_x[3:])) == 1
        assert all(copy._back is None for copy, _ in copies)


def test_casts_of_weights_under_autocast_stay_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "OFFLOAD_BYTES", 0)
    made = []
    copy = offload._HostCopy.__init__
    monkeypatch.setattr(offload._HostCopy, "__init__", lambda self, x: made.append(tuple(x.shape)) or copy(self, x))
    block, x = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.GELU(), torch.nn.Linear(6, 5)), torch.randn(3, 4)
    x.requires_grad_()
    offload.offload_activations([block])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        block(x).float().sum().backward()
    assert sorted(made) == [(3, 4), (3, 6), (3, 6)]  # the inputs of the two products and of GELU; no [4, 6], no [6, 5]


def test_the_host_waits_until_two_blocks_are_on_their_way(monkeypatch: pytest.MonkeyPatch) -> None:
    waited = []

    class Copied:
        def __init__(self, block: int) -> None:
            self.block = block

        def synchronize(self) -> None:
            waited.append(self.block)

    monkeypatch.setattr(offload._OffloadedBlock, "copied", lambda self: Copied(self.index))
    blocks = [torch.nn.Linear(2, 2) for _ in range(4)]
    offload.offload_activations(blocks)
    x, seen = torch.randn(1, 2), []
    for block in blocks:
        x = block(x)
        seen.append(list(waited))
    assert seen == [[], [], [0], [0, 1]]
