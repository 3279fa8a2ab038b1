"""Process groups of some ranks are made however many groups a rank has been in before."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from longspan import ParallelMesh, parallelize
from longspan.models.decoder import Decoder
from longspan.models.decoder_config import DecoderConfig
from tests.helpers.ranks import on_ranks


@pytest.mark.parametrize("maker", ["the program", "a tied pipeline of four stages"])
def test_a_mesh_is_made_after_groups_that_some_ranks_are_not_in(maker: str, tmp_path: Path) -> None:
    assert on_ranks(4, _sums_of_stages, maker, tmp_path=tmp_path, seconds=60) == [1, 1, 5, 5]


def _sums_of_stages(maker: str) -> int:
    if maker == "the program":
        dist.new_group([0, 2])
    else:
        shape = DecoderConfig(vocab=8, layers=4, hidden=8, heads=2, kv_heads=2, head_dim=4, ffn=8, tied=True)
        parallelize(Decoder(shape), ParallelMesh(pipeline=4))
    total = torch.tensor(dist.get_rank())
    dist.all_reduce(total, group=ParallelMesh(pipeline=2, ring=2).loss_control_group)
    return int(total)
