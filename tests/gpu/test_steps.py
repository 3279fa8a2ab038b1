"""A step of the decoder on the device of LONGSPAN_TEST_DEVICE: waits, peak, offload, determinism. Never run on a GPU."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from longspan import MemoryOptions, ParallelMesh, clip_grad_norm_, parallelize, shard_batch
from longspan.models.decoder import Decoder
from longspan.models.decoder_config import DecoderConfig
from longspan.planner.memory import Sizes, footprint
from tests.helpers.device import DEVICE
from tests.helpers.one_process import world_of_one

SMALL = DecoderConfig(vocab=64, layers=2, hidden=64, heads=4, kv_heads=2, head_dim=16, ffn=96)
LARGE = DecoderConfig(vocab=1024, layers=8, hidden=512, heads=8, kv_heads=2, head_dim=64, ffn=1536)
ON_GPU = pytest.mark.skipif(DEVICE.type != "cuda", reason="needs LONGSPAN_TEST_DEVICE=cuda: it reads what a GPU alone has")


class Step:
    """A decoder on one rank and its batch; a call is forward, loss and backward under autocast to bf16, and gives the loss."""

    def __init__(self, config: DecoderConfig, tokens: int, memory: MemoryOptions | None = None) -> None:
        mesh = ParallelMesh(device=DEVICE)
        ids = torch.randint(config.vocab, (1, tokens), generator=torch.Generator().manual_seed(1))
        self.model = parallelize(Decoder(config).to(mesh.device), mesh, memory=memory or MemoryOptions())
        self.part = shard_batch({"input_ids": ids, "labels": ids}, mesh)

    def __call__(self) -> torch.Tensor:
        self.model.zero_grad()
        with torch.autocast(DEVICE.type, torch.bfloat16):
            loss: torch.Tensor = self.model(**self.part).loss
        loss.backward()
        return loss.detach()


@contextmanager
def deterministic() -> Iterator[None]:
    """Context manager: PyTorch's deterministic algorithms."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def test_two_deterministic_steps_are_equal_in_every_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    with world_of_one(), deterministic():
        step = Step(SMALL, 700)
        first = [step(), *(p.grad.clone() for p in step.model.parameters() if p.grad is not None)]
        second = [step(), *(p.grad for p in step.model.parameters() if p.grad is not None)]
    assert len(first) > 10
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@ON_GPU
def test_a_step_does_not_wait_for_the_device() -> None:
    with world_of_one():
        step = Step(SMALL, 4096)
        step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            loss = step()
            norm = clip_grad_norm_(step.model, 1.0)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.stack([loss, norm]).isfinite().all()


def peak(step: Step) -> int:
    """Bytes of the tensors at the peak of a step, the parameters' and their gradients' among them."""
    step()
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated()


@ON_GPU
def test_offload_lowers_the_peak() -> None:
    with world_of_one():
        kept = peak(Step(LARGE, 32_768, MemoryOptions(recompute="full")))
        offloaded = peak(Step(LARGE, 32_768, MemoryOptions(recompute="full", offload_activations=True)))
    inputs = LARGE.layers * 32_768 * LARGE.hidden * 4  # what recomputation keeps: each block's input, in fp32
    assert offloaded < kept - inputs // 2  # two blocks of eight are on their way


@ON_GPU
def test_the_peak_is_that_of_the_estimate() -> None:
    with world_of_one():
        step = Step(LARGE, 32_768)
        found = peak(step)
        parameters = sum(p.numel() for p in step.model.parameters())
    sizes = Sizes(vocab=1024, layers=8, hidden=512, heads=8, kv_heads=2, head_dim=64, ffn=1536)
    expected = footprint(sizes, parameters=parameters, tokens=32_768, itemsize=2, autocast=True).peak - 8 * parameters
    assert 0.8 * expected < found < 1.1 * expected  # of a step without an optimizer, whose two states are 8 bytes a parameter
