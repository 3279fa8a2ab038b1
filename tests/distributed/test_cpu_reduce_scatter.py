"""The reduce-scatter of gradients on CPUs against gloo's own."""

from collections.abc import Callable
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from longspan.distributed import cpu_reduce_scatter
from longspan.distributed.cpu_reduce_scatter import CPUReduceScatter
from tests.helpers.ranks import Ranks


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


def test_another_reduction_is_refused(pool: Callable[[int], Ranks]) -> None:
    pool(2).run(scaled)


def scaled() -> None:
    group = dist.group.WORLD
    assert group is not None
    with pytest.raises(ValueError, match="by SUM or AVG"):
        CPUReduceScatter()(torch.zeros(2), torch.zeros(4), group, dist.ReduceOp.MAX)
