"""Process groups of some ranks are made however many groups a rank has been in before, and their threads end before Python."""

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from longspan import ParallelMesh, parallelize
from longspan.models.decoder import Decoder
from longspan.models.decoder_config import DecoderConfig
from tests.helpers.launched import free_port, started
from tests.helpers.ranks import on_ranks

LOSES_ITS_PEER = """
import os, sys
import torch.distributed as dist
from longspan import LongspanError, ParallelMesh
from longspan.distributed.consensus import exchange_integers
mesh, rank = ParallelMesh(), int(os.environ["RANK"])
for thread in map(int, os.listdir("/proc/self/task") if rank == 0 else []):
    os.sched_setaffinity(thread, {max(os.sched_getaffinity(0))})  # where gloo's threads get time if Python's own sleeps
    if thread != os.getpid():
        os.setpriority(os.PRIO_PROCESS, thread, 19)
try:
    for _ in range(3 - rank):
        exchange_integers(range(20), mesh.world_group)
except LongspanError as error:
    if sys.argv[1:] == ["destroy"]:
        dist.destroy_process_group()
    sys.exit(f"lost: {error}")
"""


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


@pytest.mark.skipif(sys.platform != "linux", reason="threads of a process get their CPU and priority by /proc of Linux")
@pytest.mark.parametrize("before", [[], ["destroy"]])
def test_a_rank_that_ends_right_after_a_collective_ends_with_its_own_code(before: list[str], tmp_path: Path) -> None:
    base = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    command = [sys.executable, "-c", LOSES_ITS_PEER, *before]
    (code, text), other = started([base | {"RANK": rank} for rank in "01"], command, tmp_path)
    assert (code, other) == (1, (0, "")), text
    assert text.startswith("lost: rank 0 waited for the other ranks")
