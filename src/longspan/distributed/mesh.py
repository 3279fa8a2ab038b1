"""The ranks of a run as a grid, on one DeviceMesh. Knows degrees and groups; nothing of tensors, masks or models.

    world  =  data x ring x ulysses        (the rightmost axis varies fastest, so ulysses ranks are neighbours)

                    ulysses 0   ulysses 1
      data 0  ring 0    0           1       \\  one sequence: ring x ulysses ranks hold its tokens together
              ring 1    2           3       /
      data 1  ring 0    4           5       \\  another replica: other rows
              ring 1    6           7       /

Parameters are the same on all of data x ring x ulysses, and their gradients are averaged over all of it.
"""

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from longspan.distributed.collectives import Scratch, TorchTransport, Transport
from longspan.distributed.layout import Degrees, Layout, choose_degrees
from longspan.errors import LayoutError


@dataclass(frozen=True)
class Place:
    """The degrees of a mesh and where one rank stands in it: integers that a DataLoader worker can be given."""

    data: int = 1
    ring: int = 1
    ulysses: int = 1
    data_rank: int = 0
    ring_rank: int = 0
    ulysses_rank: int = 0
    zigzag: bool = False

    def layout(self, tokens: int) -> Layout:
        """How a sequence of ``tokens`` tokens lies on this mesh."""
        return Layout(tokens, self.ring, self.ulysses, self.zigzag)


class ParallelMesh:
    """``data x ring x ulysses`` ranks; what the degrees leave of the world is data parallel.

    Joins the process group that exists, or that torchrun's environment names (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT,
    whoever sets it); in a plain Python process it is a world of one.
    ``ulysses="auto"`` shares each sequence among the whole world, and chooses ulysses x ring from ``heads`` = (query heads,
    key/value heads) and the ranks of a node; ``why`` is then the reason in a sentence. ``layout`` is "contiguous" or
    "zigzag", by default zigzag where ring > 1. ``device`` defaults to this rank's CUDA device, or the CPU. ``transport``
    carries every exchange (default: PyTorch's all-to-all).

    Raises LayoutError, on every rank alike, for degrees that the world cannot be cut into, or that differ between ranks.
    """

    def __init__(
        self,
        ulysses: int | str = 1,
        ring: int = 1,
        tensor: int = 1,
        pipeline: int = 1,
        layout: str | None = None,
        device: torch.device | str | None = None,
        transport: Transport | None = None,
        heads: tuple[int, int] | None = None,
    ) -> None:
        self.device = _own_device(device)
        _join_world(self.device)
        self.agreement_group = dist.new_group(backend="gloo")
        _refuse_different_asks(f"ulysses={ulysses} ring={ring} layout={layout}", self.agreement_group)
        _refuse_unsupported(tensor, pipeline, layout)
        world = dist.get_world_size()
        degrees = _degrees(ulysses, ring, heads, world)
        self.why = degrees.why
        axes = ("data", "ring", "ulysses")
        shape = (world // (degrees.ring * degrees.ulysses), degrees.ring, degrees.ulysses)
        self.device_mesh: DeviceMesh = init_device_mesh(self.device.type, shape, mesh_dim_names=axes)
        zigzag = layout == "zigzag" or (layout is None and degrees.ring > 1)
        mine = tuple(self.device_mesh.get_local_rank(axis) for axis in axes)
        self.place = Place(*shape, mine[0], mine[1], mine[2], zigzag)
        self.transport: Transport = transport or TorchTransport()
        self.scratch = Scratch()
        self.ulysses_group = self.device_mesh.get_group("ulysses")
        self.ring_group = self.device_mesh.get_group("ring")
        self.sequence_group = self.device_mesh["ring", "ulysses"]._flatten("sequence").get_group()
        self.fsdp_mesh: DeviceMesh = self.device_mesh[axes]._flatten("mean")
        self.mean_group = self.fsdp_mesh.get_group()

    def __deepcopy__(self, memo: dict[int, object]) -> "ParallelMesh":
        return self  # process groups are what they are; a copied model stands in the same world

    @property
    def degree(self) -> int:
        """How many ranks hold the same parameters: the number that a mean over ranks divides by."""
        return self.place.data * self.place.ring * self.place.ulysses

    def __repr__(self) -> str:
        place = self.place
        return f"ParallelMesh(data={place.data}, ring={place.ring}, ulysses={place.ulysses}, device={str(self.device)!r})"


def _own_device(device: torch.device | str | None) -> torch.device:
    if device is not None:
        return torch.device(device)
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _join_world(device: torch.device) -> None:
    if dist.is_initialized():
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if dist.is_torchelastic_launched() or os.environ.keys() >= {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)


def _refuse_different_asks(mine: str, group: dist.ProcessGroup) -> None:
    asks: list[str] = [mine] * group.size()
    if group.size() > 1:
        dist.all_gather_object(asks, mine, group=group)
    for rank, ask in enumerate(asks):
        if ask != asks[0]:
            raise LayoutError(f"rank 0 asks for {asks[0]} but rank {rank} for {ask}; every rank must ask for the same mesh")


def _refuse_unsupported(tensor: int, pipeline: int, layout: str | None) -> None:
    for name, degree in {"tensor": tensor, "pipeline": pipeline}.items():
        if degree != 1:
            raise LayoutError(f"{name}={degree} is not supported yet; use {name}=1 and more ulysses, ring or data ranks")
    if layout not in (None, "contiguous", "zigzag"):
        raise LayoutError(f"layout={layout!r} is unknown; legal are 'contiguous' and 'zigzag'")


def _degrees(ulysses: int | str, ring: int, heads: tuple[int, int] | None, world: int) -> Degrees:
    if isinstance(ulysses, str):
        if ulysses != "auto" or ring != 1 or heads is None:
            raise LayoutError(
                f"ulysses={ulysses!r} ring={ring} heads={heads} cannot be chosen from; use ulysses='auto' with "
                f"heads=(query heads, key/value heads) and no ring, or two numbers"
            )
        return choose_degrees(world, *heads, ranks_per_node=int(os.environ.get("LOCAL_WORLD_SIZE", world)))
    if ulysses < 1 or ring < 1:
        raise LayoutError(f"ulysses={ulysses} and ring={ring} must be at least 1")
    if world % (ulysses * ring):
        legal = ", ".join(str(d) for d in range(1, world + 1) if world % d == 0)
        raise LayoutError(
            f"ulysses={ulysses} x ring={ring} does not divide the world of {world} rank{'s' * (world > 1)}; "
            f"their product may be {legal}"
        )
    return Degrees(ulysses, ring, f"ulysses={ulysses} ring={ring} were asked for")
