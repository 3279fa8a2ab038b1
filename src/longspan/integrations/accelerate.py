"""What Transformers' Trainer and accelerate are told: one device, whose batch holds the rows of all data replicas.

    sampler        5 0 7 2 | 6 1 4       the batches that one device would see: per_device_train_batch_size x data rows
    collate        5 0 | 7 2             of each, every data replica collates its own run of rows; the ranks of a sequence
                 replica 0  replica 1    the same run; a replica for which no row is left, none of the first

Then nothing remains that accelerate or the Trainer could gather, scale, wrap or deal out by themselves: what concerns
several ranks is done in the forward and the backward. Knows nothing of models, losses or checkpoints.
"""

import os
from collections.abc import Callable, Iterable
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import TrainingArguments

from longspan.distributed.grad_sync import clip_grad_norm_
from longspan.distributed.mesh import MeshCoordinate, ParallelMesh
from longspan.errors import BatchError, RunError

WAY_OUT = {
    "deepspeed": "leave it out; zero=3 of this trainer shards parameters, gradients and optimizer states",
    "fsdp": "leave it out; zero=3 of this trainer shards parameters, gradients and optimizer states",
    "parallelism_config": "leave it out; the trainer's mesh=ParallelMesh(ulysses=..., ring=...) says it",
    "label_smoothing_factor": "set it to 0; the loss over all ranks is the plain cross-entropy",
    "auto_find_batch_size": "set it to False; one rank that runs out of memory would leave the others waiting",
    "fp16": "use bf16=True, which needs no scaling of the loss",
    "fp16_full_eval": "leave it out, and evaluate as you train",
    "bf16_full_eval": "leave it out, and evaluate as you train",
    "torch_compile": "set it to False; compiling the whole model over a mesh is not proven",
    "neftune_noise_alpha": "leave it out; its noise is scaled by the length of the row, and a rank has a part of it",
    "use_liger_kernel": "leave it out; its loss would be that of one rank's tokens",
    "enable_jit_checkpoint": "leave it out; the ranks would begin to save at different steps",
    "eval_use_gather_object": "leave it out; only tensors are gathered",
    "predict_with_generate": "leave it out; to generate, unparallelize(trainer.model) first",
}
"""TrainingArguments that mean one device, or another library's ranks, and what to do instead."""
IN_THE_BACKWARD = ("lomo", "adalomo", "layerwise")
"""How optimizers are named that step while the backward still runs, before gradients are averaged."""


def refuse(args: TrainingArguments, mesh: ParallelMesh) -> None:
    """Raise RunError, naming the field, for settings that cannot be honoured over ``mesh``."""
    for name, way_out in WAY_OUT.items():
        if getattr(args, name, None):
            raise RunError(f"TrainingArguments({name}={getattr(args, name)!r}) does not go with a mesh: {way_out}")
    optimizer = str(getattr(args.optim, "value", args.optim))
    if any(kind in optimizer for kind in IN_THE_BACKWARD):
        raise RunError(
            f"TrainingArguments(optim={optimizer!r}) steps inside the backward, before gradients are averaged over the ranks; "
            f"use another one, like 'adamw_torch'"
        )
    for name in ("split_batches", "dispatch_batches"):
        if getattr(args.accelerator_config, name, None):
            raise RunError(
                f"TrainingArguments(accelerator_config={{'{name}': True}}) deals out batches by accelerate's ranks; leave it "
                f"out: each data replica of the mesh gets per_device_train_batch_size rows"
            )
    if "inputs" in args.include_for_metrics:
        raise RunError("TrainingArguments(include_for_metrics=['inputs']) is not supported: inputs are not gathered")
    if args.n_gpu > 1:
        raise RunError(
            f"this process sees {args.n_gpu} GPUs and would split its batch among them; start one process a GPU: "
            f"torchrun --nproc-per-node {args.n_gpu} ..."
        )
    if args.device.type != mesh.device.type or (args.device.index or 0) != (mesh.device.index or 0):
        raise RunError(
            f"TrainingArguments say device {args.device}, but the mesh is on {mesh.device}; pass "
            f"ParallelMesh(device={str(args.device)!r}), or TrainingArguments(use_cpu=True)"
        )


def as_one_device(args: TrainingArguments, mesh: ParallelMesh) -> TrainingArguments:
    """A copy of ``args`` for one device with the batch of all data replicas; each rank keeps its number, so that one writes."""
    told: Any = copy(args)
    told.accelerator_config = copy(args.accelerator_config)
    told.accelerator_config.dispatch_batches = False
    told.per_device_train_batch_size = args.per_device_train_batch_size * mesh.coordinate.data
    told.per_device_eval_batch_size = args.per_device_eval_batch_size * mesh.coordinate.data
    told.distributed_state = OneProcess(mesh.world_group.rank(), _local_rank(), args.device)
    return told  # type: ignore[no-any-return]


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", dist.get_rank()))


class Numbered:
    """Who writes, by the numbers of the process: in the world and on its machine."""

    @property
    def is_main_process(self: Any) -> bool:
        return bool(self.process_index == 0)

    @property
    def is_local_main_process(self: Any) -> bool:
        return bool(self.local_process_index == 0)


@dataclass(frozen=True)
class OneProcess(Numbered):
    """In the place of accelerate's state, which is the process's own and stays as it is: one process, and who writes."""

    process_index: int
    local_process_index: int
    device: torch.device
    num_processes: int = 1
    distributed_type: DistributedType = DistributedType.NO

    def __reduce__(self) -> Any:
        return type(None), ()  # training_args.bin is read again where there is neither this mesh nor this library


class OneDevice(Numbered, Accelerator):  # type: ignore[misc]
    """An Accelerator that wraps and gathers nothing among ranks, whatever started the process; it clips by the true norm.

    A DataLoader that it prepares has batches of the rows of all data replicas, and gives each its own.
    """

    coordinate: MeshCoordinate

    @classmethod
    def over(cls, accelerator: Accelerator, mesh: ParallelMesh) -> "OneDevice":
        """``accelerator`` itself, from now on one of these; before it prepares anything."""
        accelerator.__class__ = cls
        accelerator.coordinate = mesh.coordinate
        accelerator.step_scheduler_with_optimizer = False  # else a prepared scheduler steps once for every process
        return accelerator  # type: ignore[no-any-return]

    @property
    def distributed_type(self) -> DistributedType:
        return DistributedType.NO

    @property
    def num_processes(self) -> int:
        return 1

    @property
    def use_distributed(self) -> bool:
        return False

    @property
    def process_index(self) -> int:
        return dist.get_rank()

    @property
    def local_process_index(self) -> int:
        return _local_rank()

    def gather(self, tensor: Any) -> Any:
        return tensor

    def reduce(self, tensor: Any, reduction: str = "sum", scale: float = 1.0) -> Any:
        return tensor

    def pad_across_processes(self, tensor: Any, *_: Any, **__: Any) -> Any:
        return tensor

    def clip_grad_norm_(self, parameters: Iterable[Tensor], max_norm: float, norm_type: float = 2) -> Tensor:
        if norm_type != 2:
            raise RunError(f"norm_type={norm_type} is not supported over a mesh; the norm of sharded gradients is the 2-norm")
        return clip_grad_norm_(parameters, max_norm)

    def prepare_data_loader(self, data_loader: DataLoader[Any], *args: Any, **keywords: Any) -> Any:
        if self.coordinate.data > 1 and data_loader.batch_size is None and data_loader.batch_sampler is None:
            raise BatchError(
                "the dataset yields whole batches (batch_size=None), which cannot be dealt out to data replicas; let it yield "
                "rows, or use a mesh without data parallel"
            )
        if not isinstance(data_loader.collate_fn, Rows):
            data_loader.collate_fn = Rows(data_loader.collate_fn, self.coordinate.data, self.coordinate.data_rank)
        return super().prepare_data_loader(data_loader, *args, **keywords)


@dataclass(frozen=True)
class Rows:
    """A collator that is given the rows of all ``replicas`` and collates those of ``replica``; without any, a batch of none."""

    collate: Callable[[Any], Any]
    replicas: int
    replica: int

    def __call__(self, examples: Any) -> Any:
        if self.replicas == 1:
            return self.collate(examples)
        mine = share(len(examples), self.replicas, self.replica)
        if len(mine):
            return self.collate(examples[mine.start : mine.stop])
        like = self.collate(examples[:1])
        return {name: value[:0] if isinstance(value, Tensor) and value.ndim else value for name, value in like.items()}


def share(rows: int, replicas: int, replica: int) -> range:
    """The rows of a batch of ``rows`` that ``replica`` takes: runs whose sizes differ by at most one, the larger ones first."""
    size, larger = divmod(rows, replicas)
    start = replica * size + min(replica, larger)
    return range(start, start + size + (replica < larger))


def refuse_undealt(loader: Any, coordinate: MeshCoordinate) -> None:
    """Raise BatchError for a DataLoader that every data replica would read alike."""
    if coordinate.data > 1 and not isinstance(getattr(loader, "collate_fn", None), Rows):
        raise BatchError(
            "the DataLoader gives every data replica the same rows; return self.accelerator.prepare(DataLoader(...)) from "
            "get_train_dataloader and get_eval_dataloader, with batches of all replicas' rows"
        )
