"""The reduce-scatter of gradients on CPUs against sums formed on one rank."""

from collections.abc import Callable
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

from longspan import ModelError, parallelize, shard_batch
from longspan.distributed import cpu_reduce_scatter
from longspan.distributed.cpu_reduce_scatter import CPUReduceScatter
from longspan.models.decoder import Decoder
from tests.helpers.hf_models import batches
from tests.helpers.memory_models import SHAPE
from tests.helpers.ranks import Ranks, mesh_of


@pytest.mark.parametrize("shard", [0, 1, 5, 64, 70])
@pytest.mark.parametrize("ranks", [2, 3])
def test_it_is_the_sum_or_the_mean_of_this_ranks_shard(ranks: int, shard: int, pool: Callable[[int], Ranks]) -> None:
    assert pool(ranks).run(reduced, shard) == [0] * ranks


def reduced(shard: int) -> int:
    """Compare in pieces of 16 elements a rank; the bytes that the input has afterwards."""
    group = dist.group.WORLD
    assert group is not None
    ranks, left = group.size(), 0
    every = torch.randn(ranks, ranks, shard, dtype=torch.float64, generator=torch.Generator().manual_seed(shard))
    with patch.object(cpu_reduce_scatter, "PIECE_BYTES", 16 * 8 * ranks):
        for op, scale in ((dist.ReduceOp.SUM, 1), (dist.ReduceOp.AVG, ranks)):
            mine, found = every[group.rank()].clone().view(-1), torch.full((shard,), torch.nan, dtype=torch.float64)
            CPUReduceScatter()(found, mine, group, op)
            torch.testing.assert_close(found, every[:, group.rank()].sum(0) / scale, rtol=1e-14, atol=1e-14)
            left += mine.untyped_storage().nbytes()
    return left


def test_another_divisor_is_refused_on_every_rank(pool: Callable[[int], Ranks]) -> None:
    pool(2).run(divided)


def divided() -> None:
    mesh = mesh_of(2, 1)
    model = parallelize(Decoder(SHAPE), mesh, zero=2)
    assert isinstance(model.blocks[0], FSDPModule)
    model.blocks[0].set_gradient_divide_factor(4)
    loss = model(**shard_batch(batches("odd length", False), mesh)).loss
    with pytest.raises(ModelError, match="leave it out, and multiply the loss"):
        loss.backward()
