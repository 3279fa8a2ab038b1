"""Train on Ray (Ray Train V2): workers that are ranks, as many as the cluster has room for, and checkpoints for any number.

    torch_trainer(loop, workers=(1, 8), ...).fit()

    worker 0 .. P-1   Ray makes the process group   loop(settings): ParallelMesh -> parallelize -> restore -> steps, report
        |                                                                                             ^
        +-- a worker or its node is lost: Ray ends all workers and starts P' where there is room -----+

``report`` is a barrier: a checkpoint is registered once every worker has saved its shards. A step's global rows are a
function of the step, and ``replica_rows`` divides them over the data replicas, so that the number of workers changes neither
the rows of a step nor, up to rounding, its loss. Independent of the model and of the mesh that the loop chooses.

Run on CPUs with gloo, two nodes on one machine; never on a GPU, and never on a cluster.
"""

import tempfile
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors

from longspan.distributed.layout import consecutive, split
from longspan.distributed.mesh import ParallelMesh
from longspan.errors import BatchError, RunError
from longspan.integrations.state_dict import load_sharded_state, read_sharded_state, sharded_state

try:
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer
except ImportError as error:
    raise ImportError(
        "longspan.integrations.ray needs Ray 2.60 or newer (Ray Train V2); install it by pip install 'ray[train]'"
    ) from error


def torch_trainer(
    loop: Callable[..., None],
    *,
    workers: int | tuple[int, int],
    storage: str,
    run: str,
    settings: Mapping[str, Any] | None = None,
    gpus: bool = False,
    restarts: int = 3,
    keep_checkpoints: int = 2,
    timeout: timedelta | None = None,
) -> TorchTrainer:
    """A TorchTrainer whose workers can make a ``ParallelMesh``: a process group with gloo for control, and one GPU a worker.

    Args:
        loop: called on every worker with ``settings``, or with nothing where they are None. It builds its mesh from the number
            of workers, which may be another one after a restart, and calls ``restore`` before its first step.
        workers: how many, or (fewest, most): then the run starts and goes on with as many as the cluster has room for.
        storage: a folder that every node sees, or a bucket; Ray keeps checkpoints in ``storage/run``.
        run: the name of the run. ``fit`` of a run of this name that was interrupted goes on from its newest checkpoint.
        settings: the picklable argument of ``loop``.
        gpus: reserve a GPU for each worker.
        restarts: how often the run is started again after a worker has failed; -1 for always. Nodes whose end Ray knew
            beforehand (preemption) do not count.
        keep_checkpoints: how many checkpoints Ray keeps.
        timeout: how long a collective waits for the other ranks before it fails; default: Ray's, 30 minutes.

    Returns:
        The trainer; ``fit()`` runs it and returns Ray's Result.

    Raises:
        RunError: a number that is out of range.
    """
    fewest, most = (workers, workers) if isinstance(workers, int) else workers
    if not 1 <= fewest <= most:
        raise RunError(
            f"workers={workers} is not possible; give a number of at least 1, or (fewest, most) with 1 <= fewest <= most"
        )
    if keep_checkpoints < 1 or restarts < -1:
        raise RunError(f"{keep_checkpoints=} must be at least 1, and {restarts=} at least -1, which is always")
    backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
    seconds = {} if timeout is None else {"timeout_s": max(1, int(timeout.total_seconds()))}
    return TorchTrainer(
        loop,
        train_loop_config=None if settings is None else dict(settings),
        torch_config=TorchConfig(backend=backend, **seconds),
        scaling_config=ray.train.ScalingConfig(num_workers=workers, use_gpu=gpus),
        run_config=ray.train.RunConfig(
            name=run,
            storage_path=storage,
            failure_config=ray.train.FailureConfig(max_failures=restarts),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=keep_checkpoints),
        ),
    )


def report(metrics: Mapping[str, Any], step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Save a checkpoint of ``step`` and report it to Ray with ``metrics``. A barrier: every worker must call it.

    Each worker writes its shards into a folder of its own, which Ray moves into the storage, so that no folder needs to be
    seen by all nodes but the storage. Rank 0's metrics count.

    Args:
        metrics: numbers by name; "step" is added.
        step: how many steps are done; ``restore`` returns it.
        model: its weights are saved.
        optimizer: its states are saved.

    Raises:
        CheckpointException: a worker cannot write its shards; Ray then starts the run again.
    """
    folder = tempfile.mkdtemp(prefix="longspan-")
    save_tensors(sharded_state(model, optimizer) | {"step": step}, checkpoint_id=folder)
    ray.train.report(
        {**metrics, "step": step},
        checkpoint=ray.train.Checkpoint.from_directory(folder),
        checkpoint_dir_name=f"step-{step:06d}",
        delete_local_checkpoint_after_upload=True,
    )


def restore(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Load the newest checkpoint that was reported, written by any number of workers. Every worker must call it.

    Args:
        model: as it was when it was saved, on any mesh; its weights are replaced.
        optimizer: its states are replaced, and torch's random states too (the CPU's, and on a GPU this rank's).

    Returns:
        The number of steps that are done; 0 where there is no checkpoint yet.

    Raises:
        RunError: the checkpoint is damaged, or of another model; raised on every worker.
    """
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return 0
    state = sharded_state(model, optimizer) | {"step": 0}
    try:
        with checkpoint.as_directory() as folder:
            read_sharded_state(state, folder)
    except (CheckpointException, RuntimeError) as error:
        found = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
        raise RunError(
            f"the checkpoint {checkpoint.path} cannot be read: {next(iter(str(found).splitlines()), type(found).__name__)}; "
            f"remove it from the storage, or name another run"
        ) from error
    load_sharded_state(model, optimizer, state)
    step: int = state["step"]
    return step


def replica_rows(batch: Mapping[str, Tensor], mesh: ParallelMesh) -> dict[str, Tensor]:
    """The rows of this rank's data replica, for ``shard_batch``, of a step's global rows, which every rank passes.

    The rows are divided as evenly as possible; a replica for which none is left gets 0 rows, which ``shard_batch`` accepts.

    Args:
        batch: tensors whose first dim is the global rows, the same on every rank.
        mesh: the mesh; its data degree is the number of replicas.

    Raises:
        BatchError: the tensors have different numbers of rows.
    """
    rows = {name: len(value) for name, value in batch.items()}
    if len(set(rows.values())) != 1:
        raise BatchError(f"the global batch has tensors of {rows} rows; every tensor must have the same rows")
    at = mesh.coordinate
    mine = consecutive(split(next(iter(rows.values())), at.data))[at.data_rank]
    return {name: value[mine.start : mine.stop] for name, value in batch.items()}
