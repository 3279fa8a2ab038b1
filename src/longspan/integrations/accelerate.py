"""Adapters that make Trainer and accelerate run as a single process whose batch is the global batch.

    sampler        5 0 7 2 | 6 1 4       two batches as on one device, of per_device_train_batch_size x data replicas rows
    collate        5 0 | 7 2             each data replica collates its own run of rows; the ranks of a sequence collate the
                 replica 0  replica 1    same run, and a replica for which no row is left an empty batch

accelerate and Trainer then have nothing to gather, scale, wrap or distribute: the communication is in the forward and the
backward of the parallel model. Independent of the model, its loss and the format of checkpoints.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.scheduler import AcceleratedScheduler
from accelerate.utils import DistributedType
from accelerate.utils.operations import recursively_apply
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, IterableDataset
from transformers import TrainingArguments

from longspan.distributed.consensus import largest_integers
from longspan.distributed.coordinate import MeshCoordinate
from longspan.distributed.grad_norm import clip_grad_norm_
from longspan.distributed.layout import consecutive, split
from longspan.distributed.mesh import ParallelMesh
from longspan.errors import BatchError, RunError


def single_process_arguments(args: TrainingArguments, mesh: ParallelMesh) -> TrainingArguments:
    """A copy of ``args`` that describes one process whose batch is that of all data replicas, for Trainer's loop on each rank.

    ``args`` is not changed. In the copy the batch sizes are multiplied by the number of data replicas, the world size is 1,
    batches are not dispatched, and the process index is still this rank's, so that only rank 0 writes files.
    """
    single: Any = copy(args)
    single.accelerator_config = copy(args.accelerator_config)
    single.accelerator_config.dispatch_batches = False
    single.per_device_train_batch_size = args.per_device_train_batch_size * mesh.coordinate.data
    single.per_device_eval_batch_size = args.per_device_eval_batch_size * mesh.coordinate.data
    single.distributed_state = SingleProcessState(mesh.world_group.rank(), _local_rank(), args.device)
    return single  # type: ignore[no-any-return]


def _local_rank() -> int:
    """This rank's number on its machine, from LOCAL_RANK; without it the rank itself."""
    return int(os.environ.get("LOCAL_RANK", dist.get_rank()))


class _MainProcess:
    """Mixin for classes with ``process_index`` and ``local_process_index``: rank 0 is the main process, local rank 0 the
    local one."""

    @property
    def is_main_process(self: Any) -> bool:
        return bool(self.process_index == 0)

    @property
    def is_local_main_process(self: Any) -> bool:
        return bool(self.local_process_index == 0)


@dataclass(frozen=True)
class SingleProcessState(_MainProcess):
    """Replaces accelerate's state in a copy of TrainingArguments, so that Trainer runs as a single process.

    accelerate's own state is a singleton of the process and stays as it is. Pickled, this one becomes None.

    Attributes:
        process_index, local_process_index: this rank, and its number on its node; they decide which process writes files.
        device: the rank's device.
        num_processes, distributed_type: those of a run of one process.
    """

    process_index: int
    local_process_index: int
    device: torch.device
    num_processes: int = 1
    distributed_type: DistributedType = DistributedType.NO

    def __reduce__(self) -> Any:
        return type(None), ()  # training_args.bin can be read where neither this mesh nor this library exists


class OneDevice(_MainProcess, Accelerator):  # type: ignore[misc]
    """An Accelerator that acts as a single process: it neither wraps models nor gathers or reduces over ranks.

    ``clip_grad_norm_`` uses the norm over all ranks, and ``check_trigger`` is true on all ranks where one has set the trigger.
    In a DataLoader that it prepares, the batch sampler or the IterableDataset gives the rows of all data replicas, and each
    replica collates its own; every rank reads the data set itself. A scheduler that it prepares steps as on one device. Make
    one by ``OneDevice.over(Accelerator(), mesh)``.

    Attributes:
        coordinate: the degrees of the mesh, and this rank's position on it.
        control_group: all ranks of the mesh, on gloo.
    """

    coordinate: MeshCoordinate
    control_group: dist.ProcessGroup
    flag_tensor: Tensor | None  # set by set_trigger

    @classmethod
    def over(cls, accelerator: Accelerator, mesh: ParallelMesh) -> "OneDevice":
        """Turn ``accelerator`` into a OneDevice, in place, and return it.

        Args:
            accelerator: an Accelerator that has not prepared anything yet.
            mesh: the mesh of the models that it will prepare.

        Raises:
            RunError: ``accelerator`` dispatches batches (``dispatch_batches=True``).
        """
        if accelerator.dispatch_batches:
            raise RunError(
                "DataLoaderConfiguration(dispatch_batches=True) reads the data set on one rank and sends each rank other rows, "
                "and the ranks of a sequence need the same; leave it out: every rank reads the data set itself"
            )
        accelerator.__class__ = cls
        accelerator.coordinate, accelerator.control_group = mesh.coordinate, mesh.world_group
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
    def dispatch_batches(self) -> bool:
        """False, for an IterableDataset too, whose rows accelerate would divide among its own processes."""
        return False

    @property
    def process_index(self) -> int:
        return dist.get_rank()

    @property
    def local_process_index(self) -> int:
        return _local_rank()

    def gather(self, tensor: Any) -> Any:
        """``tensor`` itself: what a single process gathers is its own."""
        return tensor

    def reduce(self, tensor: Any, reduction: str = "sum", scale: float = 1.0) -> Any:
        """``tensor`` itself: what a single process reduces is its own."""
        return tensor

    def pad_across_processes(self, tensor: Any, *_: Any, **__: Any) -> Any:
        return tensor

    def gather_for_metrics(self, input_data: Any, use_gather_object: bool = False) -> Any:
        """``input_data`` itself, tensors or objects, cut to ``remainder`` rows at the last batch: accelerate's on one device.

        Args:
            input_data: tensors, objects, or a nested structure of them.
            use_gather_object: whether tensors are treated as objects.
        """
        if not use_gather_object and _holds_tensors_alone(input_data):
            return super().gather_for_metrics(input_data)
        state = self.gradient_state
        cut = state.end_of_dataloader and state.remainder > 0 and isinstance(input_data, Sequence | Tensor)
        return input_data[: state.remainder] if cut else input_data

    def check_trigger(self) -> bool:
        """Whether ``set_trigger`` was called on any rank since the last check that was true. Every rank must call it.

        Returns:
            The same on every rank, by one control all-reduce.
        """
        mine = 0 if self.flag_tensor is None else int(self.flag_tensor.item())
        self.flag_tensor = None
        (largest,) = largest_integers([mine], self.control_group, "Every rank must call check_trigger() as often.")
        return largest > 0

    def prepare_scheduler(self, scheduler: Any) -> Any:
        """Prepare ``scheduler`` as accelerate does on one device: it steps once for each step of the optimizer.

        Returns:
            accelerate's scheduler around ``scheduler``.
        """
        prepared = super().prepare_scheduler(scheduler)
        if isinstance(prepared, AcceleratedScheduler):
            prepared.__class__, prepared.split_batches = OneDeviceScheduler, True
        return prepared

    def clip_grad_norm_(self, parameters: Iterable[Tensor], max_norm: float, norm_type: float = 2) -> Tensor:
        """Scale the gradients so that their norm over all ranks is at most ``max_norm``.

        Args:
            parameters: the parameters of the model.
            max_norm: the largest norm.
            norm_type: must be 2.

        Returns:
            The norm before scaling, equal on every rank.

        Raises:
            RunError: ``norm_type`` is not 2.
        """
        if norm_type != 2:
            raise RunError(f"norm_type={norm_type} is not supported over a mesh; the norm of sharded gradients is the 2-norm")
        return clip_grad_norm_(parameters, max_norm)

    def prepare_data_loader(self, data_loader: DataLoader[Any], *args: Any, **keywords: Any) -> Any:
        """Prepare ``data_loader`` as accelerate does, with batches of this data replica's rows only.

        Replaces its ``collate_fn`` by a ReplicaCollator around it, in place; a second call does not wrap it again.

        Returns:
            accelerate's DataLoader around ``data_loader``.

        Raises:
            BatchError: for a dataset that yields whole batches (``batch_size=None``) and more than one data replica.
        """
        if self.coordinate.data > 1 and data_loader.batch_size is None and data_loader.batch_sampler is None:
            raise BatchError(
                "the dataset yields whole batches (batch_size=None), which cannot be divided among data replicas; let it yield "
                "rows, or use a mesh without data parallel"
            )
        if not isinstance(data_loader.collate_fn, ReplicaCollator):
            data_loader.collate_fn = ReplicaCollator(data_loader.collate_fn, self.coordinate.data, self.coordinate.data_rank)
        return super().prepare_data_loader(data_loader, *args, **keywords)

    def weigh_last_batch(self, count_rows: Callable[[], float]) -> None:
        """Set the active DataLoader's ``remainder`` at the last batch of an IterableDataset; else do nothing.

        ``gather_for_metrics`` shortens the last batch to ``remainder`` rows. accelerate sets it for one device, but not here.

        Args:
            count_rows: returns the rows of the current batch over all data replicas. It may be a collective: the condition
                under which it is called is equal on all ranks.
        """
        loader = self.gradient_state.active_dataloader
        if self.gradient_state.end_of_dataloader and isinstance(getattr(loader, "dataset", None), IterableDataset):
            loader.remainder = int(count_rows())

    def save_state(self, *args: Any, **keywords: Any) -> Any:
        """Write the state as accelerate's ``save_state`` does, on this rank alone; arguments and result are its.

        Raises:
            RunError: a prepared model has sharded parameters.
        """
        self._refuse_sharded("save_state")
        return super().save_state(*args, **keywords)

    def load_state(self, *args: Any, **keywords: Any) -> Any:
        """Read what ``save_state`` wrote, as accelerate's ``load_state`` does; arguments are its.

        Raises:
            RunError: a prepared model has sharded parameters.
        """
        self._refuse_sharded("load_state")
        return super().load_state(*args, **keywords)

    def get_state_dict(self, model: Any, *args: Any, **keywords: Any) -> Any:
        """The state dict of ``model`` as accelerate's ``get_state_dict`` gives it; other arguments are its.

        Raises:
            RunError: ``model`` has sharded parameters.
        """
        self._refuse_sharded("get_state_dict", [model])
        return super().get_state_dict(model, *args, **keywords)

    def _refuse_sharded(self, method: str, models: Iterable[Any] | None = None) -> None:
        """Raise RunError if one of ``models`` (None: of the prepared ones) has sharded parameters, which ``method`` cannot
        handle."""
        for model in self._models if models is None else models:
            if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
                raise RunError(
                    f"accelerator.{method} would handle this rank's shards of parameters only (zero=2, zero=3, tensor > 1); "
                    f"call longspan.hf.save(model, folder, mesh) on every rank for a Hugging Face folder, "
                    f"torch.distributed.checkpoint for model and optimizer, or use zero=0 and tensor=1"
                )


class OneDeviceScheduler(AcceleratedScheduler):  # type: ignore[misc]
    """accelerate's scheduler on one device: it steps where the optimizer does, once, and not on micro-batches in between.

    With its ``split_batches`` set, accelerate's own takes one step rather than one for each process. A scheduler with a number
    of steps (OneCycleLR) stays at its last one, as on one device.
    """

    def step(self, *args: Any, **keywords: Any) -> None:
        """Step the scheduler, if the optimizer has stepped; arguments are the scheduler's."""
        total = getattr(self.scheduler, "total_steps", None)
        ended = total is not None and self.scheduler.last_epoch >= total
        if not (ended and self.step_with_optimizer and self.gradient_state.sync_gradients):
            super().step(*args, **keywords)


def _holds_tensors_alone(data: Any) -> bool:
    """Whether ``data`` is a tensor, or a nested structure of tensors, by the rule of accelerate's ``gather_for_metrics``."""
    try:
        recursively_apply(lambda tensor: tensor, data, error_on_other_type=True)
    except TypeError:
        return False
    return True


@dataclass(frozen=True)
class ReplicaCollator:
    """A collator that receives the rows of all data replicas and returns the batch of one of them.

    The rows are divided into ``replicas`` consecutive runs whose sizes differ by at most one, the larger ones first; run number
    ``replica`` is passed to ``collate``. If it is empty, the result is the batch of the first row, with every tensor shortened
    to no rows. With one replica the result is ``collate(examples)``.

    Attributes:
        collate: the collator of the DataLoader: rows to a batch.
        replicas: the number of data replicas.
        replica: this rank's, from 0.
    """

    collate: Callable[[Any], Any]
    replicas: int
    replica: int

    def __call__(self, examples: Any) -> Any:
        if self.replicas == 1:
            return self.collate(examples)
        mine = consecutive(split(len(examples), self.replicas))[self.replica]
        if len(mine):
            return self.collate(examples[mine.start : mine.stop])
        like = self.collate(examples[:1])
        return {name: value[:0] if isinstance(value, Tensor) and value.ndim else value for name, value in like.items()}


def refuse_repeated_rows(loader: Any, coordinate: MeshCoordinate) -> None:
    """Raise BatchError if every data replica would train on all rows of ``loader``, a DataLoader.

    That is so if there are several data replicas and its collator is no ReplicaCollator, which gives each its own rows.
    """
    if coordinate.data > 1 and not isinstance(getattr(loader, "collate_fn", None), ReplicaCollator):
        raise BatchError(
            "the DataLoader gives every data replica the same rows; return self.accelerator.prepare(DataLoader(...)) from "
            "get_train_dataloader and get_eval_dataloader, with batches of all replicas' rows"
        )
