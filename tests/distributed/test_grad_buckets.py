from collections import Counter
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from longspan.distributed import grad_buckets
from longspan.distributed.grad_buckets import Buckets, MeanInBuckets
from longspan.distributed.grad_sync import MeanGradients, gradient_reductions
from longspan.distributed.mesh import ParallelMesh
from longspan.errors import ModelError
from tests.helpers.ranks import on_ranks


def test_buckets_hold_the_last_parameters_first_in_one_dtype(monkeypatch):
    monkeypatch.setattr(grad_buckets, "BUCKET_BYTES", 100)
    sizes = [(20, torch.float32), (5, torch.float32), (5, torch.float64), (5, torch.bfloat16), (9, torch.float32)]
    buckets = Buckets.of([nn.Parameter(torch.zeros(size, dtype=dtype)) for size, dtype in sizes])
    assert buckets.members == ((4, 3), (2,), (1, 0))
    assert buckets.bucket_of == (2, 2, 1, 0, 0)


class Counting(TorchDispatchMode):
    """Counts the operators that run, in the backward too."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.calls[operator.overloadpacket.__name__] += 1
        return operator(*args, **kwargs or {})


def test_a_gradient_is_copied_once_and_reduced_in_the_memory_that_becomes_grad(tmp_path):
    """One all-reduce a bucket, of exactly the gradients' bytes, one control all-reduce, and no value read on the host."""
    for operators, summed, control, shares in on_ranks(2, _two_backwards, tmp_path=tmp_path):
        first, second = operators
        assert first["copy_"] == second["copy_"] == 4
        for calls in operators:
            assert not calls["clone"] + calls["zero_"] + calls["zeros_like"] + calls["_local_scalar_dense"] + calls["_to_copy"]
        assert first["add_"] == 0
        assert second["add_"] == 4
        assert summed == [[4 * (6 * 5 + 5), 4 * (4 * 6 + 6)]] * 2
        assert control == 2
        assert shares


def _two_backwards():
    grad_buckets.BUCKET_BYTES = 150
    torch.manual_seed(0)
    mesh, model = ParallelMesh(), nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5))
    MeanGradients(model, mesh)
    operators, summed, control, reduce = [], [], [], dist.all_reduce

    def counted(x, *args, group, **named):
        if group is gradient_reductions(mesh).group:
            summed[-1].append(x.numel() * x.element_size())
        else:
            control.append(x.numel())
        return reduce(x, *args, group=group, **named)

    for _ in range(2):
        loss = (model(torch.randn(3, 4)) * torch.randn(3, 5)).sum()
        summed.append([])
        with patch.object(dist, "all_reduce", counted), Counting() as counting:
            loss.backward()
        operators.append(counting.calls)
    storages = [parameter.grad.untyped_storage().data_ptr() for parameter in model.parameters()]
    return operators, summed, len(control), storages[0] == storages[1] != storages[2] == storages[3]


def test_a_full_bucket_is_reduced_while_the_backward_goes_on(tmp_path):
    assert on_ranks(2, _order_of_events, tmp_path=tmp_path) == [["all-reduce", "first layer", "all-reduce"]] * 2


def _order_of_events():
    grad_buckets.BUCKET_BYTES = 1
    mesh, model = ParallelMesh(), nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    MeanGradients(model, mesh)
    events, reduce = [], dist.all_reduce

    def noted(x, *args, group, **named):
        if group is gradient_reductions(mesh).group:
            events.append("all-reduce")
        return reduce(x, *args, group=group, **named)

    hidden = model[0](torch.randn(3, 4))
    hidden.register_hook(lambda grad: events.append("first layer"))
    with patch.object(dist, "all_reduce", noted):
        model[1](hidden).square().sum().backward()
    return events


def test_what_a_rank_lacks_counts_as_zero_and_what_all_lack_is_not_sent(tmp_path):
    """Bucket 0 is full on rank 0 only, bucket 1 has one gradient, on rank 1, and nobody has one in bucket 2."""
    for found, starts in on_ranks(2, _partial, tmp_path=tmp_path):
        assert found == {5: [1.0], 4: [0.5], 3: [2.0]}
        assert starts == 2


def _partial():
    grad_buckets.BUCKET_BYTES = 8
    mesh = ParallelMesh()
    reductions = gradient_reductions(mesh)
    mean = MeanInBuckets(Buckets.of([nn.Parameter(torch.zeros(1)) for _ in range(6)]), reductions)
    for index, value in ({5: 2.0, 4: 1.0}, {3: 4.0})[mesh.coordinate.data_rank].items():
        mean.add(index, torch.tensor([value]))
    reductions.let_start_early(mean)
    mean.reduce_full_buckets()
    with patch.object(reductions, "start", wraps=reductions.start) as start:
        found = {index: piece.tolist() for index, piece in mean.finished()}
    assert reductions.unfinished == 0
    return found, start.call_count + (mesh.coordinate.data_rank == 0)


def test_backwards_that_failed_at_different_points_are_refused_on_every_rank(tmp_path):
    """Rank 1 has started an all-reduce that rank 0 has not: the next mean would be formed of two backwards."""
    on_ranks(2, _failed_at_different_points, tmp_path=tmp_path)


def _failed_at_different_points():
    mesh = ParallelMesh()
    buckets, reductions = Buckets.of([nn.Parameter(torch.zeros(1))]), gradient_reductions(mesh)
    reductions.unfinished = mesh.coordinate.data_rank
    with pytest.raises(ModelError, match="the ranks have started between 0 and 1 all-reduces of gradients for other backwards"):
        list(MeanInBuckets(buckets, reductions).finished())


def test_a_backward_that_failed_is_counted_until_the_next_is_compared(tmp_path):
    assert on_ranks(2, _fail_after_one_bucket, tmp_path=tmp_path) == [(1, 1)] * 2


def _fail_after_one_bucket():
    grad_buckets.BUCKET_BYTES = 1
    mesh, model = ParallelMesh(), nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    mean = MeanGradients(model, mesh)
    hidden = model[0](torch.randn(3, 4))
    hidden.register_hook(_fail)
    with pytest.raises(MemoryError):
        model[1](hidden).sum().backward()
    failed = mean._reductions.unfinished
    model(torch.randn(3, 4)).sum().backward()
    return failed, mean._reductions.unfinished


def _fail(grad):
    raise MemoryError
