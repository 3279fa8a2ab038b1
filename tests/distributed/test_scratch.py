"""Memory of the exchanges is used again when nothing refers to it, and never before."""

import pytest
import torch

from longspan.distributed import scratch as module
from longspan.distributed.scratch import Scratch


@pytest.fixture
def small_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SMALLEST_KEPT_BYTES", 16)
    monkeypatch.setattr(module, "SCRATCH_BYTES", 64)


def test_a_send_buffer_is_kept_up_to_its_bound_and_freed_beyond(small_bounds: None) -> None:
    scratch, like = Scratch(), torch.empty(0)
    with scratch.lend(16, like) as lent:
        kept = lent.data_ptr()
        assert lent.shape == (16,)
    with scratch.lend(9, like) as lent:
        assert lent.data_ptr() == kept
    with scratch.lend(17, like):
        pass
    assert not scratch._free


def test_a_taken_tensor_is_used_again_only_when_nothing_refers_to_it(small_bounds: None) -> None:
    scratch, like = Scratch(), torch.empty(0, dtype=torch.float64)
    first = scratch.take(4, like)
    assert (first.shape, first.dtype) == ((4,), torch.float64)
    place, view = first.data_ptr(), first.view(2, 2)[1]
    assert scratch.take(4, like).data_ptr() != place
    del first
    assert scratch.take(4, like).data_ptr() != place  # the view still lies there
    del view
    assert place in {tensor.data_ptr() for tensor in [scratch.take(4, like), scratch.take(4, like)]}


def test_the_memory_of_a_storage_that_the_user_holds_is_not_used_again(small_bounds: None) -> None:
    scratch, like = Scratch(), torch.empty(0)
    taken = scratch.take(4, like)
    place, storage = taken.data_ptr(), taken.untyped_storage()
    del taken
    assert scratch.take(4, like).data_ptr() != place
    del storage
    assert place in {tensor.data_ptr() for tensor in [scratch.take(4, like), scratch.take(4, like)]}


def test_memory_that_another_process_may_have_mapped_is_not_used_again(small_bounds: None) -> None:
    scratch, like = Scratch(), torch.empty(0)
    taken = scratch.take(4, like).share_memory_()
    shared = taken.data_ptr()
    del taken
    assert scratch.take(4, like).data_ptr() != shared


def test_a_tensor_that_autograd_saved_is_not_overwritten(small_bounds: None) -> None:
    scratch, like = Scratch(), torch.empty(0)
    taken = scratch.take(16, like).fill_(3)
    x = torch.ones(16, requires_grad=True)
    product = (x * taken).sum()
    del taken
    scratch.take(16, like).fill_(7)
    product.backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.full((16,), 3.0))


def test_a_much_smaller_tensor_does_not_take_a_large_one_s_memory(small_bounds: None) -> None:
    scratch, like = Scratch(), torch.empty(0)
    place = scratch.take(16, like).data_ptr()
    small = scratch.take(7, like)
    assert small.data_ptr() != place
    assert scratch.take(9, like).data_ptr() == place


def test_what_is_free_is_bounded_and_tensors_beyond_the_bounds_are_not_kept(small_bounds: None) -> None:
    scratch, like = Scratch(), torch.empty(0)
    taken = [scratch.take(12, like) for _ in range(4)]  # 48 bytes each
    taken.clear()
    scratch.take(12, like)
    assert len(scratch._taken) == 1
    scratch = Scratch()
    scratch.take(17, like)
    scratch.take(3, like)
    assert scratch._taken == []
    assert scratch.take(3, like.to("meta")).is_meta


def test_tensors_taken_together_have_storages_of_their_own_in_memory_that_is_used_again_as_one(
    small_bounds: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SCRATCH_BYTES", 1024)
    scratch, like = Scratch(), torch.empty(0)
    place = scratch.take(24, like).data_ptr()
    first, second = scratch.take_several([4, 8], like)
    assert [first.shape, second.shape] == [(4,), (8,)]
    assert [first.data_ptr(), second.data_ptr()] == [place, place + module.ALIGNMENT]
    assert first.untyped_storage().nbytes() == 16
    del first
    assert scratch.take(24, like).data_ptr() != place  # the second still lies there
    del second
    assert place in {tensor.data_ptr() for tensor in [scratch.take(24, like), scratch.take(24, like)]}
    assert scratch.take_several([], like) == []


def test_new_memory_replaces_what_is_free_and_too_small_for_what_now_needs_it(
    small_bounds: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch, like = Scratch(), torch.empty(0)
    monkeypatch.setattr(module, "SCRATCH_BYTES", 1024)
    scratch.take(8, like)
    held = scratch.take(9, like)
    scratch.take(12, like)
    assert scratch.held_bytes == (9 + 12) * 4
    del held
    assert scratch.take(9, like).numel() == 9
    assert scratch.held_bytes == (9 + 12) * 4


def test_of_two_buffers_that_are_lent_at_once_the_larger_is_kept(small_bounds: None) -> None:
    scratch, like = Scratch(), torch.empty(0)
    with scratch.lend(12, like), scratch.lend(16, like):
        pass
    assert scratch.send_bytes == 64
