"""The interface of the route to MASTER_ADDR is found, agreed on by the ranks of several hosts, and refused by name."""

import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from benchmarks.hosts import namespaces
from longspan.distributed import network
from longspan.distributed.network import GLOO, NCCL, choose_interface, interface_of, interfaces, source_address
from longspan.errors import RunError
from tests.helpers import processes
from tests.helpers.launched import LAUNCHERS, srun_tasks

HOSTS = {"host-a": "", "host-b": "10.0.0.2", "host-c": "10.0.0.3", "10.0.0.2": "10.0.0.1", "10.0.0.9": "10.0.0.9"}
"""For tests on integers: the address from which a rank reaches a name, as its own host sees it."""


def test_an_address_of_this_host_belongs_to_an_interface_of_it() -> None:
    assert "lo" in interfaces()
    assert source_address("127.0.0.1") == source_address("localhost") == ""
    assert source_address("no-such-host.invalid") == ""
    for name, address in network._own_addresses():
        assert name in interfaces()
        assert interface_of(address) in interfaces()
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("203.0.113.9") == ""
    assert interface_of("") == ""


@pytest.fixture
def _addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    own = [("lo", "127.0.0.1"), ("eth1", "10.0.0.1"), ("eth1", "10.0.0.2"), ("eth2", "10.0.0.3")]
    monkeypatch.setattr(network, "source_address", HOSTS.__getitem__)
    monkeypatch.setattr(network, "_own_addresses", lambda: own)
    monkeypatch.setattr(network, "interfaces", lambda: ["lo", "eth1", "eth2"])


def of_all(*ranks: dict[str, str]) -> list[str | RunError | None]:
    """What ``choose_interface`` returns or raises on each rank, given its environment, to which it may add."""
    store = dist.HashStore()

    def one(rank: int) -> str | RunError | None:
        try:
            return choose_interface(ranks[rank], store, rank, len(ranks))
        except RunError as error:
            return error

    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(one, range(len(ranks))))


@pytest.mark.usefixtures("_addresses")
def test_ranks_of_several_hosts_take_the_interface_of_the_route() -> None:
    # The first host is MASTER_ADDR, and its own name is a loopback address there.
    ranks = [{"MASTER_ADDR": "host-a"}, {"MASTER_ADDR": "host-b"}, {"MASTER_ADDR": "host-c"}]
    assert of_all(*ranks) == ["eth1", "eth1", "eth2"]
    assert [(rank[GLOO], rank[NCCL]) for rank in ranks] == [("eth1", "=eth1"), ("eth1", "=eth1"), ("eth2", "=eth2")]


@pytest.mark.usefixtures("_addresses")
def test_what_the_user_names_stays() -> None:
    ranks = [{"MASTER_ADDR": "host-b", GLOO: "eth2"}, {"MASTER_ADDR": "host-c", NCCL: "^docker"}]
    assert of_all(*ranks) == ["eth2", "eth2"]
    assert [(rank[GLOO], rank[NCCL]) for rank in ranks] == [("eth2", "=eth2"), ("eth2", "^docker")]


@pytest.mark.usefixtures("_addresses")
def test_one_host_is_left_to_gloo() -> None:
    for name in ("host-a", "host-b"):
        ranks = [{"MASTER_ADDR": name}, {"MASTER_ADDR": name}]
        assert of_all(*ranks) == [None, None]
        assert ranks == [{"MASTER_ADDR": name}] * 2
    assert choose_interface({"LOCAL_WORLD_SIZE": "8"}, None, 3, 8) is None
    assert choose_interface({}, None, 0, 1) is None


@pytest.mark.usefixtures("_addresses")
@pytest.mark.parametrize(
    ("second", "text"),
    [
        ({GLOO: "eth7"}, r"GLOO_SOCKET_IFNAME=eth7 of rank 1 is not among those of its host \S+: lo, eth1, eth2; set"),
        ({"MASTER_ADDR": "10.0.0.9"}, r"the interface on the route to MASTER_ADDR=10.0.0.9 of rank 1 is not among .* ip addr"),
    ],
)
def test_an_interface_that_is_not_there_is_refused_on_every_rank(second: dict[str, str], text: str) -> None:
    first, other = of_all({"MASTER_ADDR": "host-b"}, {"MASTER_ADDR": "host-c"} | second)
    assert isinstance(first, RunError)
    assert re.match(text, str(first))
    assert str(other) == str(first)


JOIN = """
import os
from datetime import timedelta
import torch
import torch.distributed as dist
from longspan import ParallelMesh

mesh = ParallelMesh(ulysses=2, timeout=timedelta(seconds=10))
ranks = torch.ones(1)
dist.all_reduce(ranks)
print(int(ranks), os.environ["GLOO_SOCKET_IFNAME"], os.environ["NCCL_SOCKET_IFNAME"])
"""
needs_hosts = pytest.mark.skipif(namespaces.why_not() is not None, reason=str(namespaces.why_not()))


@needs_hosts
@pytest.mark.parametrize(
    ("named", "output"),
    [
        ({}, "2 eth0 =eth0"),
        pytest.param(
            {GLOO: "lo"},
            "RunError: the ranks met at 10.77.0.1, but cannot connect by the interface lo (Gloo connectFullMesh failed",
            marks=pytest.mark.long,
        ),  # gloo tries for most of a minute
        ({GLOO: "eth9"}, "RunError: GLOO_SOCKET_IFNAME=eth9 of rank 0 is not among those of its host"),
    ],
)
def test_two_hosts_connect_by_the_interface_that_reaches_the_other(named: dict[str, str], output: str) -> None:
    """As two nodes of a Slurm job whose node list names the address of the first."""
    base = {name: value for name, value in os.environ.items() if not name.startswith((*LAUNCHERS, GLOO, NCCL))} | named
    with namespaces.hosts(2) as made:
        job = {"MASTER_ADDR": made.address(0), "MASTER_PORT": "29500", "SLURM_NNODES": "2", "SLURM_TASKS_PER_NODE": "1(x2)"}
        tasks = [task | {"SLURM_NODEID": task["SLURM_PROCID"], "SLURM_LOCALID": "0"} for task in srun_tasks(2, **job)]
        running = [
            processes.start(made.command(host, [sys.executable, "-c", JOIN]), env=base | task)
            for host, task in enumerate(tasks)
        ]
        try:
            printed = ["".join(process.communicate(timeout=120)) for process in running]
        finally:
            for process in running:
                processes.end(process)
    assert all(output in text for text in printed), printed
