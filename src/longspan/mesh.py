"""The ranks of a run as a grid, on one DeviceMesh. Knows degrees and groups; nothing of tensors, masks or models.

    world  =  data x ring x ulysses        (the rightmost axis varies fastest, so ulysses ranks are neighbours)

                    ulysses 0   ulysses 1
      data 0  ring 0    0           1       \\  one sequence: ring x ulysses ranks hold its tokens together
              ring 1    2           3       /
      data 1  ring 0    4           5       \\  another replica: other rows
              ring 1    6           7       /

Parameters are the same on all of data x ring x ulysses, and their gradients are averaged over all of it.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from longspan.collectives import Scratch, TorchTransport, Transport
from longspan.errors import LayoutError
from longspan.layout import Layout


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

    Joins the process group that exists (torchrun's environment included); in a plain Python process it is a world of one.
    ``layout`` is "contiguous" or "zigzag"; by default zigzag where ring > 1. ``device`` defaults to this rank's CUDA
    device, or the CPU. ``transport`` carries every exchange (default: PyTorch's all-to-all).

    Raises LayoutError, on every rank alike, for degrees that the world cannot be cut into.
    """

    def __init__(
        self,
        ulysses: int = 1,
        ring: int = 1,
        tensor: int = 1,
        pipeline: int = 1,
        layout: str | None = None,
        device: torch.device | str | None = None,
        transport: Transport | None = None,
    ) -> None:
        for name, degree in {"tensor": tensor, "pipeline": pipeline}.items():
            if degree != 1:
                raise LayoutError(f"{name}={degree} is not supported yet; use {name}=1 and more ulysses, ring or data ranks")
        if layout not in (None, "contiguous", "zigzag"):
            raise LayoutError(f"layout={layout!r} is unknown; legal are 'contiguous' and 'zigzag'")
        self.device = _own_device(device)
        _join_world(self.device)
        data = _what_is_left(dist.get_world_size(), ulysses, ring)
        axes = ("data", "ring", "ulysses")
        self.device_mesh: DeviceMesh = init_device_mesh(self.device.type, (data, ring, ulysses), mesh_dim_names=axes)
        self.place = Place(
            data, ring, ulysses, *(self.device_mesh.get_local_rank(axis) for axis in axes), zigzag=_zigzag(layout, ring)
        )
        self.transport: Transport = transport or TorchTransport()
        self.scratch = Scratch()
        self.ulysses_group = self.device_mesh.get_group("ulysses")
        self.ring_group = self.device_mesh.get_group("ring")
        self.sequence_group = self.device_mesh["ring", "ulysses"]._flatten("sequence").get_group()
        self.fsdp_mesh: DeviceMesh = self.device_mesh[axes]._flatten("mean")
        self.mean_group = self.fsdp_mesh.get_group()
        self.agreement_group = dist.new_group(backend="gloo")

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
    if dist.is_torchelastic_launched():
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def _what_is_left(world: int, ulysses: int, ring: int) -> int:
    if ulysses < 1 or ring < 1:
        raise LayoutError(f"ulysses={ulysses} and ring={ring} must be at least 1")
    if world % (ulysses * ring):
        legal = ", ".join(str(d) for d in range(1, world + 1) if world % d == 0)
        raise LayoutError(
            f"ulysses={ulysses} x ring={ring} does not divide the world of {world} rank{'s' * (world > 1)}; "
            f"their product may be {legal}"
        )
    return world // (ulysses * ring)


def _zigzag(layout: str | None, ring: int) -> bool:
    return layout == "zigzag" or (layout is None and ring > 1)
