"""The device mesh pipeline x data x ring x ulysses x tensor, its process groups, and its rank sets.

    world  =  pipeline x data x ring x ulysses x tensor      (the rightmost axis varies fastest: its ranks are neighbours)

                    ulysses 0   ulysses 1
      data 0  ring 0    0           1       \\  one sequence: ring x ulysses ranks hold its tokens together
              ring 1    2           3       /
      data 1  ring 0    4           5       \\  another replica: other rows
              ring 1    6           7       /

Code asks for one of four rank sets by name, never for a product of degrees, so that it stays right when an axis is added:

    sequence   the ranks that pass the same rows to ``shard_batch`` and hold their tokens together
    loss       the ranks over which the loss is summed; its size divides the sum of the gradients
    fsdp       the ranks that hold the same parameters: FSDP2's mesh, and the mean of the gradients at zero=0
    world      all ranks: control traffic (agreement, errors), on gloo
"""

import logging
import os
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from longspan import _compat
from longspan.distributed.collectives import TorchTransport, Transport
from longspan.distributed.consensus import gather
from longspan.distributed.coordinate import MeshCoordinate
from longspan.distributed.device import choose_device, device_of, join_world, refuse_shared_devices
from longspan.distributed.grad_buckets import Reductions
from longspan.distributed.groups import new_group, new_group_of, set_timeout
from longspan.distributed.launchers import join_launcher
from longspan.distributed.layout import Degrees, choose_degrees
from longspan.distributed.rank_map import crossing, rank_map
from longspan.distributed.scratch import Scratch
from longspan.distributed.software import compare_ranks
from longspan.errors import LayoutError


@dataclass(frozen=True)
class Axis:
    """One axis of the mesh, a row of the table ``AXES``.

    Attributes:
        name: the axis: "ulysses".
        sets: the names of the rank sets (sequence, loss, fsdp, world) that contain all ranks along it.
    """

    name: str
    sets: frozenset[str]


AXES = (
    Axis("pipeline", frozenset({"world"})),
    Axis("data", frozenset({"loss", "fsdp", "world"})),
    Axis("ring", frozenset({"sequence", "loss", "fsdp", "world"})),
    Axis("ulysses", frozenset({"sequence", "loss", "fsdp", "world"})),
    Axis("tensor", frozenset({"sequence", "loss", "world"})),
)
"""The axes in the order of the ranks; ranks along the last one are neighbours.

A new axis is a row here, a degree of ``ParallelMesh`` and two fields of ``MeshCoordinate``; rank sets follow from its row.
"""
BASIC = ("data", "ring", "ulysses")
"""The axes that every mesh has a dim for; the others only where their degree is more than 1."""


class ParallelMesh:
    """The ranks on one DeviceMesh, by axis; the data degree is the world size divided by the product of the other degrees.

    Joins the process group that exists, or that the environment of the launcher describes: torchrun, srun (Slurm), mpirun (Open
    MPI), mpiexec (Intel MPI, MPICH). A plain Python process is a world of one.

    Args:
        ulysses: ranks that exchange tokens for heads by all-to-all (DeepSpeed-Ulysses, arXiv:2309.14509). "auto" gives each
            sequence to the whole world, and chooses ulysses x ring from ``heads`` and the ranks of a node (LOCAL_WORLD_SIZE).
        ring: ranks that pass keys and values around a ring (ring attention, arXiv:2310.01889).
        tensor: ranks that split the heads and the feed-forward of every layer, and between them the tokens (tensor parallel
            with sequence-parallel norms: Megatron-SP, arXiv:2205.05198).
        pipeline: stages of consecutive layers, each on ranks of its own (pipeline parallel, arXiv:1811.06965).
        layout: "contiguous" or "zigzag"; by default zigzag where ring > 1, which balances a causal mask.
        device: default: the accelerator with the number of this rank on its machine (LOCAL_RANK), or the CPU. Move the model to
            ``mesh.device``.
        transport: carries every exchange of tensors; default: PyTorch's all-to-all.
        heads: (query heads, key/value heads), needed by ``ulysses="auto"`` only.
        timeout: how long a collective waits for the other ranks before it fails; default: PyTorch's, 30 minutes for gloo (also
            the control messages) and 10 for NCCL.

    Attributes:
        coordinate: the degrees and this rank's position.
        device, transport: this rank's device, and the implementation of the all-to-all that every exchange uses.
        device_mesh: the DeviceMesh below; ``pipeline_group``, ``data_group``, ``ring_group``, ``ulysses_group`` and
            ``tensor_group`` are the groups of its axes, ``tensor_mesh`` its tensor axis (None without one).
        sequence_group, loss_group, fsdp_group, world_group: the rank sets (``world_group`` on gloo); ``fsdp_mesh``: the
            DeviceMesh of the fsdp set; ``loss_control_group``: the loss set on gloo, for errors inside a forward.
        why: the reason for ulysses x ring, one sentence.
        hosts: the host of each rank; ``rank_map`` is the text that ``print(mesh)`` shows.

    Raises:
        LayoutError: on every rank alike, for degrees that do not divide the world, or that differ between ranks.
        RunError: for a launcher's environment that contradicts itself, where the other ranks do not come, and, on every rank
            alike, where ranks run different versions of libraries or other code of longspan.
    """

    timeout: timedelta | None = None
    own_reductions: Reductions | None = None  # grad_sync.py makes it when it is first needed

    def __init__(
        self,
        ulysses: int | str = 1,
        ring: int = 1,
        *,
        tensor: int = 1,
        pipeline: int = 1,
        layout: str | None = None,
        device: torch.device | str | None = None,
        transport: Transport | None = None,
        heads: tuple[int, int] | None = None,
        timeout: timedelta | None = None,
    ) -> None:
        join_launcher(os.environ)
        own_device = choose_device(device)
        join_world(own_device, timeout)
        world_group = new_group(timeout=timeout)
        hosts = compare_ranks(f"ulysses={ulysses} ring={ring} {tensor=} {pipeline=} {layout=}", world_group)
        refuse_shared_devices(own_device, world_group)
        _refuse_unknown_layout(layout)
        degrees = _degrees(ulysses, ring, tensor, pipeline, heads, world_group)
        data = world_group.size() // (pipeline * degrees.ring * degrees.ulysses * tensor)
        sizes = {"data": data, "ring": degrees.ring, "ulysses": degrees.ulysses}
        sizes = ({"pipeline": pipeline} if pipeline > 1 else {}) | sizes | ({"tensor": tensor} if tensor > 1 else {})
        device_mesh = init_device_mesh(own_device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
        self._build(device_mesh, {name: name for name in sizes}, world_group, layout, hosts)
        self.timeout = timeout
        if pipeline > 1 and timeout is not None:  # a receive of gloo waits as long as its group was made for
            stages = dist.get_process_group_ranks(device_mesh["pipeline"].get_group())
            self.pipeline_group = new_group_of(stages, world_group, backend="", timeout=timeout)
        set_timeout(self._groups(), timeout)
        self.device, self.transport, self.why = own_device, transport or TorchTransport(), degrees.why

    @classmethod
    def from_device_mesh(
        cls,
        device_mesh: DeviceMesh,
        *,
        ulysses: str | None = "cp",
        ring: str | None = None,
        data: str | None = "dp",
        tensor: str | None = None,
        pipeline: str | None = None,
        layout: str | None = None,
        transport: Transport | None = None,
    ) -> "ParallelMesh":
        """Make a ParallelMesh from an existing DeviceMesh, whose process groups it uses.

            device_mesh = init_device_mesh("cuda", (4, 2), mesh_dim_names=("dp", "cp"))
            mesh = ParallelMesh.from_device_mesh(device_mesh, ulysses="cp", data="dp")

        Args:
            device_mesh: a DeviceMesh with named dims over all ranks of the process group, in the order of the ranks.
            ulysses, ring, data, tensor, pipeline: the name of the dim that becomes this axis; None for an axis of size 1 that
                the DeviceMesh does not have. They must stand in the order of ``AXES``; one of ring, ulysses and tensor, and one
                of data, ring and ulysses, must be named. Every other dim must have size 1.
            layout: "contiguous" or "zigzag"; None: zigzag where ring > 1.
            transport: carries every exchange of tensors; None: PyTorch's all-to-all.

        Returns:
            A ParallelMesh that equals ``ParallelMesh(ulysses=..., ring=...)`` of the same sizes.

        Raises:
            LayoutError: on every rank alike, where a name is missing or used twice, dims stand in another order, a dim of more
                than one rank is left over, or the DeviceMesh is not all ranks in order.
        """
        mesh = cls.__new__(cls)
        world_group = new_group()
        asked = {"pipeline": pipeline, "data": data, "ring": ring, "ulysses": ulysses, "tensor": tensor}
        names = {axis: name for axis, name in asked.items() if name is not None}
        known = f"{device_mesh.mesh_dim_names} of sizes {tuple(device_mesh.shape)}"
        hosts = compare_ranks(f"{' '.join(f'{axis}={name}' for axis, name in asked.items())} {layout=} of {known}", world_group)
        _refuse_unknown_layout(layout)
        _refuse_unfit_dims(device_mesh, names, known, world_group.size())
        mesh._build(device_mesh, names, world_group, layout, hosts)
        mesh.device = device_of(device_mesh)
        mesh.transport, mesh.why = transport or TorchTransport(), f"the DeviceMesh {known} was given"
        return mesh

    def _build(
        self,
        device_mesh: DeviceMesh,
        names: Mapping[str, str],
        world_group: dist.ProcessGroup,
        layout: str | None,
        hosts: tuple[str, ...],
    ) -> None:
        """Set ``coordinate``, the process groups and the rank sets; both ways to make a mesh call it. Every rank must.

        Args:
            device_mesh: the DeviceMesh.
            names: for each axis of ``AXES``, the dim of ``device_mesh``; an axis without one has size 1.
            world_group: all ranks, on gloo.
            layout: "contiguous", "zigzag" or None, as in ``ParallelMesh``.
            hosts: the host of each rank.
        """
        degrees = {axis: device_mesh[name].size() for axis, name in names.items()}
        ranks = {f"{axis}_rank": device_mesh.get_local_rank(name) for axis, name in names.items()}
        zigzag = layout == "zigzag" or (layout is None and degrees.get("ring", 1) > 1)
        self.coordinate = MeshCoordinate(**degrees, **ranks, zigzag=zigzag)
        self.device_mesh, self.world_group, self.scratch, self.hosts = device_mesh, world_group, Scratch(), hosts
        advice = crossing(hosts, self.degrees)
        if advice is not None and world_group.rank() == 0:
            logging.getLogger(__name__).warning("%s", advice)
        self.plans: dict[Hashable, object] = {}  # kept by attention/plan_cache.py, freed with the mesh
        axes: dict[str, dist.ProcessGroup] = {
            axis.name: device_mesh[names[axis.name]].get_group() for axis in AXES if axis.name in names
        }
        if len(axes) < len(AXES):
            alone = [group for group in axes.values() if group.size() == 1]
            one = alone[0] if alone else new_group_of([dist.get_rank()], world_group)
            axes |= {axis.name: one for axis in AXES if axis.name not in axes}
        self.data_group, self.ring_group, self.ulysses_group = axes["data"], axes["ring"], axes["ulysses"]
        self.tensor_group, self.pipeline_group = axes["tensor"], axes["pipeline"]
        self.tensor_mesh = device_mesh[names["tensor"]] if "tensor" in names else None
        sets = rank_sets(device_mesh, names)
        self.sequence_group, self.loss_group = sets["sequence"].get_group(), sets["loss"].get_group()
        self.loss_control_group = world_group
        if self.coordinate.pipeline > 1:
            self.loss_control_group = new_group_of(sets["loss"].mesh.tolist(), world_group)
        self.fsdp_mesh = sets["fsdp"]
        self.fsdp_group = self.fsdp_mesh.get_group()

    @property
    def degrees(self) -> dict[str, int]:
        """The degree of each axis, in the order of ``AXES``."""
        return {axis.name: getattr(self.coordinate, axis.name) for axis in AXES}

    @property
    def rank_map(self) -> str:
        """Which ranks are on which host, and which places on the axes they have: a line for each host."""
        return rank_map(self.hosts, self.degrees)

    def _groups(self) -> tuple[dist.ProcessGroup, ...]:
        """All process groups of the mesh, some of them twice."""
        axes = (self.pipeline_group, self.data_group, self.ring_group, self.ulysses_group, self.tensor_group)
        return (*axes, self.sequence_group, self.loss_group, self.fsdp_group, self.world_group, self.loss_control_group)

    def __deepcopy__(self, memo: dict[int, object]) -> "ParallelMesh":
        return self  # process groups cannot be copied; a copied model belongs to the same ranks

    def __repr__(self) -> str:
        at = self.coordinate
        shown = [f"{axis.name}={getattr(at, axis.name)}" for axis in AXES if axis.name in BASIC or getattr(at, axis.name) > 1]
        return f"ParallelMesh({', '.join(shown)}, device={str(self.device)!r})"

    def __str__(self) -> str:
        return f"{self!r}\n{self.rank_map}"


def rank_sets(device_mesh: DeviceMesh, names: Mapping[str, str], axes: Sequence[Axis] = AXES) -> dict[str, DeviceMesh]:
    """The rank sets by name, each as a DeviceMesh of one dim: all ranks along its axes. Every rank must call it.

    Args:
        device_mesh: has a dim for every axis in ``names``.
        names: the dim of each axis; an axis without one has size 1. Each set needs an axis that has a dim.
        axes: the table that says to which sets an axis belongs.

    Returns:
        {"sequence": ..., "loss": ..., "fsdp": ...}; sets of the same dims have one name and one group.
    """
    sets = {}
    for name in ("sequence", "loss", "fsdp"):
        dims = tuple(names[axis.name] for axis in axes if name in axis.sets and axis.name in names)
        # Named by its dims, so that two sets of the same ranks have one group: every gloo group keeps a thread.
        sets[name] = _compat.flattened(device_mesh[dims], "_".join(dims))
    return sets


def refuse_no_mesh(mesh: object) -> None:
    """Raise LayoutError for an argument ``mesh`` that is no ParallelMesh, a DeviceMesh or a process group for example."""
    if not isinstance(mesh, ParallelMesh):
        raise LayoutError(
            f"mesh={type(mesh).__name__} is no ParallelMesh; make one with ParallelMesh(ulysses=...), or of a DeviceMesh with "
            f"ParallelMesh.from_device_mesh(...)"
        )


def _refuse_unknown_layout(layout: str | None) -> None:
    if layout not in (None, "contiguous", "zigzag"):
        raise LayoutError(f"layout={layout!r} is unknown; legal are 'contiguous' and 'zigzag'")


def _refuse_unfit_dims(device_mesh: DeviceMesh, names: Mapping[str, str], known: str, world: int) -> None:
    """Raise LayoutError if ``names``, {axis: dim} in the order of ``AXES``, do not make up a DeviceMesh over all ``world``
    ranks, whose dims and sizes are ``known`` as text."""
    dims = device_mesh.mesh_dim_names or ()
    wanted = ", ".join(f"{axis}={name!r}" for axis, name in names.items())
    for axis, name in names.items():
        if name not in dims:
            raise LayoutError(f"{axis}={name!r} is no dim of the DeviceMesh {known}; name one of its dims, or pass {axis}=None")
    order = [dims.index(name) for name in names.values()]
    if order != sorted(set(order)):
        raise LayoutError(
            f"{wanted} are not in the order of the DeviceMesh {known}; they must be different dims in the order "
            f"{', '.join(axis.name for axis in AXES)}, because neighbouring ranks exchange most"
        )
    for kind in ("sequence", "fsdp"):
        could = [axis.name for axis in AXES if kind in axis.sets]
        if not names.keys() & set(could):
            raise LayoutError(
                f"{wanted} of the DeviceMesh {known} name no dim for any of {', '.join(could)}; make it with one more dim, of "
                f"size 1, and pass its name for one of these axes"
            )
    left = [name for name in dims if name not in names.values() and device_mesh[name].size() > 1]
    if left:
        raise LayoutError(
            f"the dims {', '.join(left)} of the DeviceMesh {known} are left over from {wanted}; longspan has no axis for them: "
            f"use a DeviceMesh without them, or of size 1 there"
        )
    if device_mesh.mesh.flatten().tolist() != list(range(world)):
        raise LayoutError(
            f"the DeviceMesh {known} is not the {world} ranks of the process group in their order; make it by "
            f"init_device_mesh over all ranks"
        )


def _degrees(
    ulysses: int | str, ring: int, tensor: int, pipeline: int, heads: tuple[int, int] | None, world_group: dist.ProcessGroup
) -> Degrees:
    """The ulysses and ring degrees that the arguments of ``ParallelMesh`` ask for; with ulysses="auto" they are chosen.

    Args:
        ulysses, ring, tensor, pipeline, heads: the arguments of ``ParallelMesh``.
        world_group: all ranks, each of which must call this.

    Raises:
        LayoutError: a degree is below 1, the product does not divide the world, or "auto" lacks what it needs.
    """
    world = world_group.size()
    given = f"ulysses={ulysses!r} ring={ring} tensor={tensor} pipeline={pipeline}"
    if min(ring, tensor, pipeline, 1 if isinstance(ulysses, str) else ulysses) < 1:
        raise LayoutError(f"{given}: each degree must be at least 1")
    if isinstance(ulysses, str):
        if ulysses != "auto" or ring != 1 or heads is None or world % (tensor * pipeline) or heads[0] % tensor:
            raise LayoutError(
                f"{given} heads={heads} cannot be chosen from on {world} ranks; use ulysses='auto' with heads=(query heads, "
                f"key/value heads), no ring, and tensor x pipeline that divides the ranks, or numbers"
            )
        fewest = min(gather(int(os.environ.get("LOCAL_WORLD_SIZE", world)), world_group))  # nodes may have different numbers
        mine = (heads[0] // tensor, max(1, heads[1] // tensor))
        return choose_degrees(world // (tensor * pipeline), *mine, ranks_per_node=max(1, fewest // tensor))
    if world % (ulysses * ring * tensor * pipeline):
        legal = ", ".join(str(d) for d in range(1, world + 1) if world % d == 0)
        product = " x ".join(given.split()[: 2 if tensor == pipeline == 1 else 4])
        raise LayoutError(
            f"{product} does not divide the world of {world} rank{'s' * (world > 1)}; their product may be {legal}"
        )
    return Degrees(ulysses, ring, f"ulysses={ulysses} ring={ring} were asked for")
