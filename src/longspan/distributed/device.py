"""The device of a rank, and the process group on it: the accelerator with the rank's number on its machine, or the CPU.

    LOCAL_RANK 3, 8 accelerators visible  ->  cuda:3       a device of its own    ->  "cpu:gloo,cuda:nccl"
    LOCAL_RANK 3, 1 accelerator visible   ->  cuda:0       shared by two ranks    ->  "cpu:gloo,cuda:gloo", and a warning
    no accelerator                        ->  cpu                                 ->  "gloo"

The device is set before anything else initialises the accelerator, which would put every rank on the first one. The code names
no kind of accelerator: ``torch.accelerator`` knows the one of this PyTorch. Only the CPU has ever been run.
"""

import logging
import os
import platform
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from longspan import _compat
from longspan.distributed.consensus import gather
from longspan.distributed.fake_world import is_fake
from longspan.distributed.launchers import joins_world, started_by
from longspan.distributed.network import REMEDY, choose_interface
from longspan.errors import RunError

JOIN_SECONDS = 300.0
"""How many seconds a rank waits for the other ranks of its launcher to start."""

logger = logging.getLogger(__name__)


def accelerator() -> torch.device | None:
    """The kind of accelerator that this process sees, such as ``cuda``, without an index; None where there is none.

    One for which PyTorch has no collective backend besides gloo (Apple's mps) counts as none.
    """
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return None if found is None or dist.get_default_backend_for_device(found.type) == "gloo" else found


def visible_devices() -> int:
    """The number of accelerators that this process sees; 0 where there is none."""
    return torch.accelerator.device_count() if accelerator() is not None else 0


def choose_device(device: torch.device | str | None = None) -> torch.device:
    """The device on which this rank keeps its model and tensors.

    Args:
        device: with an index (``cuda:1``) or the CPU, it is returned as it is; without an index (``cuda``), the kind of
            accelerator; None: the accelerator that this process sees, or the CPU where there is none.

    Returns:
        The accelerator that the program has made current by ``torch.cuda.set_device`` if that is not the first one, else the
        one with this rank's number on its machine (LOCAL_RANK). Where a process sees fewer accelerators than its machine has
        ranks (one for each task under Slurm and Ray), the numbers begin again at 0.
    """
    chosen = torch.device(device) if device is not None else accelerator() or torch.device("cpu")
    if chosen.type == "cpu" or chosen.index is not None:
        return chosen
    module = torch.get_device_module(chosen)
    current = module.current_device() if module.is_initialized() else 0
    local_rank = int(os.environ.get("LOCAL_RANK", dist.get_rank() if dist.is_initialized() else 0))
    return torch.device(chosen.type, current or local_rank % max(1, torch.accelerator.device_count()))


def device_of(device_mesh: DeviceMesh) -> torch.device:
    """The device of this rank on an existing DeviceMesh: the current accelerator, which init_device_mesh has set, or the
    CPU."""
    if device_mesh.device_type == "cpu":
        return torch.device("cpu")
    return torch.device(device_mesh.device_type, torch.accelerator.current_device_index())


def join_world(device: torch.device, timeout: timedelta | None = None) -> None:
    """Make ``device`` the current one and join the process group that the launcher's environment describes.

    If this process is in a process group already, it stays in that one. Without a launcher the world is this rank alone.

    Args:
        device: this rank's. It is made current before anything initialises the accelerator, and decides the backend: gloo for
            the CPU; gloo and the accelerator's own (NCCL) for an accelerator, or gloo for both where two ranks share one.
        timeout: how long a collective waits for other ranks before it fails; None: PyTorch's default.

    Raises:
        RunError: the other ranks of an environment with RANK and WORLD_SIZE do not come within five minutes, or those of
            several hosts cannot connect by their network interfaces.
    """
    if device.type != "cpu":
        torch.accelerator.set_device_index(device)
    if dist.is_initialized():
        return
    store, rank, ranks = _meeting_point()
    interface = choose_interface(os.environ, store, rank, ranks)
    try:
        _make_group(device, store, rank, ranks, timeout)
    except RuntimeError as error:
        if interface is None:
            raise
        raise RunError(
            f"the ranks met at {os.environ['MASTER_ADDR']}, but cannot connect by the interface {interface} "
            f"({str(error).splitlines()[0].partition(' with ')[0]}); {REMEDY}"
        ) from error
    # A rank that ends at once would close connections that another rank still opens.
    store.set(f"longspan/connected/{rank}", "")
    store.wait([f"longspan/connected/{each}" for each in range(ranks)])


def _make_group(device: torch.device, store: Any, rank: int, ranks: int, timeout: timedelta | None) -> None:
    if device.type == "cpu":
        dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timeout)
        return
    # Before the process group, whose backend cannot be changed, and with device_id connects at once: NCCL would then fail.
    shared = shared_devices(_hardware(device), store, rank, ranks)
    if shared is not None:
        if rank == 0:
            logger.warning(
                "ranks %d and %d are both on %s, where NCCL cannot connect them: all ranks exchange by gloo through host "
                "memory, which is slow; start one rank for each device", *shared,
            )  # fmt: skip
        backend, bound = f"cpu:gloo,{device.type}:gloo", None
    else:
        backend, bound = f"cpu:gloo,{device.type}:{dist.get_default_backend_for_device(device.type)}", device
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=timeout, device_id=bound)


def shared_devices(mine: str, store: Any, rank: int, ranks: int) -> tuple[int, int, str] | None:
    """Find two ranks that have the same device, on which NCCL cannot connect them. Every rank must call it.

    Args:
        mine: text that identifies this rank's device among those of all machines.
        store: the key-value store (``torch.distributed.Store``) through which the ranks exchange these texts.
        rank, ranks: this rank's number, and the number of ranks.

    Returns:
        (a rank, a later rank on the same device, the text of that device); None if each rank has a device of its own.
    """
    store.set(f"longspan/device/{rank}", mine)
    devices = [store.get(f"longspan/device/{other}").decode() for other in range(ranks)]
    for other, device in enumerate(devices):
        if (first := devices.index(device)) != other:
            return first, other, device
    return None


def refuse_shared_devices(device: torch.device, world_group: dist.ProcessGroup) -> None:
    """Raise RunError on every rank if two ranks have the same device, in a process group that connects devices by NCCL.

    ``join_world`` never makes such a group; a program may have made it before the mesh.
    """
    if device.type != "cpu" and not is_fake(world_group) and f"{device.type}:gloo" not in str(dist.get_backend_config()):
        _refuse_equal(_hardware(device), world_group)


def _refuse_equal(mine: str, world_group: dist.ProcessGroup) -> None:
    """Raise RunError on every rank if ``mine``, the text that identifies this rank's device, is another rank's too."""
    devices = gather(mine, world_group)
    for rank, other in enumerate(devices):
        first = devices.index(other)
        if first != rank:
            raise RunError(
                f"ranks {first} and {rank} are both on {other}, and NCCL needs a device for each rank; start one rank for "
                f"each device, or share devices by init_process_group('cpu:gloo,cuda:gloo') before the mesh"
            )


def _hardware(device: torch.device) -> str:
    """Text that identifies an accelerator among those of all machines: the machine and the device's uuid, or its index."""
    properties = torch.get_device_module(device).get_device_properties(device)
    return f"{device.type} {getattr(properties, 'uuid', device.index)} of {platform.node()}"


def _meeting_point() -> tuple[Any, int, int]:
    """(the key-value store in which the ranks meet, this rank's number, the number of ranks), from the launcher's environment.

    Without a launcher: a store in this process, 0, 1.
    """
    if dist.is_torchelastic_launched():
        return _compat.torchrun_store()
    if joins_world(os.environ):
        rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        return _meet(rank, ranks), rank, ranks
    return _compat.hash_store(), 0, 1


def _meet(rank: int, ranks: int) -> Any:
    """The TCPStore of all ``ranks`` ranks at MASTER_ADDR and MASTER_PORT, once every rank has connected to it.

    Rank 0 opens the port, the others connect to it.

    Raises:
        RunError: they do not all connect within ``JOIN_SECONDS``, or the address is not usable.
    """
    host, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    try:
        return _compat.meet_in_store(host, int(port), ranks, is_host=rank == 0, seconds=JOIN_SECONDS)
    except (RuntimeError, ValueError) as error:  # a time-out, a port in use or no number, or a name that is no host
        raise RunError(
            f"{started_by(os.environ)} started this process as rank {rank} of {ranks}, but the ranks did not meet at "
            f"{host}:{port} within {JOIN_SECONDS:g} s ({str(error).splitlines()[0]}); start all of them at once (srun, mpirun "
            f"or torchrun), set MASTER_ADDR and MASTER_PORT to a free port of rank 0's machine, or, for a run of one rank, "
            f"unset the launcher's variables"
        ) from None
