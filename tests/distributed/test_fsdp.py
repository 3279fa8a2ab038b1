"""ZeRO by FSDP2: failed and missing backwards, dtypes, unused parameters, models without memory, optimizers built before."""

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from longspan import ModelError, ParallelMesh, parallelize, shard_batch
from longspan.batch.labels import IGNORE
from longspan.models.decoder import Decoder
from tests.helpers.hf_models import assert_gradients, batches
from tests.helpers.memory_models import SHAPE, loss_alone, model_of
from tests.helpers.ranks import Ranks, mesh_of


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_a_checkpoint_around_the_whole_model_is_no_failed_backward(zero: int, pool: Callable[[int], Ranks]) -> None:
    pool(2).run(checkpointed_whole, zero)


def checkpointed_whole(zero: int) -> None:
    mesh, reference, whole = mesh_of(2, 1), model_of("decoder"), batches("odd length", False)
    model = parallelize(deepcopy(reference), mesh, zero=zero)
    loss_alone(reference, "decoder", whole).backward()
    part = shard_batch(whole, mesh)
    checkpoint(lambda: model(**part).loss, use_reentrant=False).backward()
    assert_gradients(model, reference, 1e-10)


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_gradients_are_cleared_between_forward_and_backward_too(zero: int, pool: Callable[[int], Ranks]) -> None:
    pool(2).run(cleared_late, zero)


def cleared_late(zero: int) -> None:
    mesh, reference, whole = mesh_of(2, 1), model_of("decoder"), batches("odd length", False)
    model = parallelize(deepcopy(reference), mesh, zero=zero)
    loss_alone(reference, "decoder", whole).backward()
    part = shard_batch(whole, mesh)
    model(**part).loss.backward()
    for set_to_none in (True, False):
        loss = model(**part).loss
        model.zero_grad(set_to_none)
        loss.backward()
        assert_gradients(model, reference, 1e-10)


@pytest.mark.parametrize("zero", [2, 3])
def test_after_a_failed_backward_a_sharded_model_is_refused(zero: int, pool: Callable[[int], Ranks]) -> None:
    for text in pool(2).run(fails_once, zero):
        assert "an earlier backward of this model failed" in text


def fails_once(zero: int) -> str:
    mesh, ids = mesh_of(2, 1), batches("odd length", False)["input_ids"]
    model = parallelize(Decoder(SHAPE), mesh, zero=zero)
    for _ in range(2):
        output = model(**shard_batch({"input_ids": ids, "labels": ids}, mesh))
        output.loss.backward()
    output = model(**shard_batch({"input_ids": ids, "labels": ids}, mesh))
    output.hidden.register_hook(lambda grad: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        output.loss.backward()
    with pytest.raises(ModelError) as error:
        model(**shard_batch({"input_ids": ids, "labels": ids}, mesh))
    return str(error.value)


def test_blocks_compute_in_the_dtype_they_are_given_and_keep_fp32_gradients(pool: Callable[[int], Ranks]) -> None:
    for loss, dtypes, computed in pool(2).run(in_half):
        assert dtypes == {torch.float32}
        assert computed == torch.bfloat16
        assert loss == pytest.approx(4.6, abs=0.3)


def in_half() -> tuple[float, set[torch.dtype], torch.dtype]:
    mesh, seen = mesh_of(2, 1), []
    model = parallelize(Decoder(SHAPE), mesh, zero=2, dtype=torch.bfloat16)
    model.blocks[0].feed.register_forward_hook(lambda *call: seen.append(call[2].dtype))
    ids = batches("odd length", False)["input_ids"]
    loss = model(**shard_batch({"input_ids": ids, "labels": ids}, mesh)).loss
    loss.backward()
    return loss.item(), {parameter.grad.dtype for parameter in model.parameters()}, seen[0]


def test_a_parameter_that_one_rank_does_not_use_counts_as_zero_there(pool: Callable[[int], Ranks]) -> None:
    for error in pool(2).run(unused_on_one_rank):
        assert error <= 1e-12


class Odd(Decoder):
    """Its second block's feed-forward works on rank 0 alone."""

    def __init__(self, everywhere: bool) -> None:
        super().__init__(SHAPE)
        self.everywhere = everywhere
        feed = self.blocks[1].feed
        feed.forward = lambda n: type(feed).forward(feed, n) * (1 if everywhere else 2) if self.uses() else n * 0

    def uses(self) -> bool:
        return self.everywhere or torch.distributed.get_rank() == 0


def unused_on_one_rank() -> float:
    """Two replicas of one row: where the second does not use the feed-forward its gradient there is zero."""
    mesh, model = mesh_of(1, 1), Odd(False).double()
    parallelize(model, mesh, zero=3)
    ids = batches("even", False)["input_ids"]
    one = ids[mesh.coordinate.data_rank : mesh.coordinate.data_rank + 1]
    model(**shard_batch({"input_ids": one, "labels": one}, mesh)).loss.backward()
    grad = model.blocks[1].feed.up.weight.grad.full_tensor()
    if torch.distributed.get_rank() != 0:
        return 0.0
    reference = Odd(False).double()
    logits = reference(ids[:1]).logits[:, :-1].flatten(0, 1)
    (F.cross_entropy(logits, ids[0, 1:], reduction="sum") / (2 * (ids.shape[1] - 1))).backward()
    wanted = reference.blocks[1].feed.up.weight.grad
    return ((grad - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize(("ranks", "tensor"), [(2, 1), (4, 2)])
def test_a_decoder_without_memory_is_made_share_by_share(ranks: int, tensor: int, pool: Callable[[int], Ranks]) -> None:
    for equal in pool(ranks).run(from_meta, tensor):
        assert equal


def from_meta(tensor: int) -> bool:
    mesh, whole = ParallelMesh(2, tensor=tensor), Decoder(SHAPE, seed=3)
    with torch.device("meta"):
        model = Decoder(SHAPE, seed=3)
    parallelize(model, mesh, zero=3)
    assert isinstance(model, FSDPModule)
    pairs = zip(model.parameters(), whole.parameters(), strict=True)
    return all(torch.equal(mine.full_tensor(), theirs) for mine, theirs in pairs)


def test_an_optimizer_that_would_train_nothing_is_refused() -> None:
    model, mesh = Decoder(SHAPE), ParallelMesh()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ModelError, match="SGD was built before the parameters are sharded"):
        parallelize(model, mesh, zero=3)
    parallelize(model, mesh)  # without shares it keeps its parameters
    ids = torch.full((1, 9), 5)
    model(**shard_batch({"input_ids": ids, "labels": ids.where(ids > 0, IGNORE)}, mesh)).loss.backward()
    before = model.head.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(before, model.head.weight)


def test_zero_1_says_what_it_is(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "longspan")
    parallelize(Decoder(SHAPE), ParallelMesh(), zero=1)
    assert "zero=1 is what FSDP2 does with zero=2" in caplog.text


@pytest.mark.parametrize("zero", [2, 3])
def test_after_a_forward_without_a_backward_an_optimizer_takes_the_shares(zero: int, pool: Callable[[int], Ranks]) -> None:
    assert all(pool(2).run(shares_after_an_evaluation, zero))


def shares_after_an_evaluation(zero: int) -> bool:
    mesh, ids = mesh_of(2, 1), batches("odd length", False)["input_ids"]
    model = parallelize(Decoder(SHAPE), mesh, zero=zero)
    with torch.no_grad():
        model(**shard_batch({"input_ids": ids, "labels": ids}, mesh))
    return all(isinstance(parameter, DTensor) for parameter in model.parameters())
