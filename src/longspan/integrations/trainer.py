"""Transformers' Trainer over a mesh: the losses, weights and checkpoints of one device. Needs the extra ``hf``.

    get_batch_samples   micro-batches of this replica's rows  --shard-->  this rank's tokens, labels counted once for all
    training_step       forward, backward over the mesh (parallelize); the loss is one device's, so nothing is scaled
    prediction_step     the same loss; logits, where they are asked for, put together
    _save, _load        one rank writes what one device would write; every rank reads it, and keeps its part

Each rank runs the loop of one device (one_device.py), so a step that the ranks take together is a step of that device.
The library's own loop stays: what is replaced here is named above, and a version of it that lacks one of them is refused.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_utils import get_last_checkpoint

from longspan.batch.shard import IGNORE, shard_batch, sync_batches, unshard
from longspan.distributed.collectives import all_gather
from longspan.distributed.consensus import gather, raise_together, refuse_difference
from longspan.distributed.mesh import ParallelMesh
from longspan.errors import BatchError, LongspanError, RunError
from longspan.hf.loss import is_in_place
from longspan.hf.names import is_encoder_decoder
from longspan.integrations.accelerate import OneDevice, as_one_device, refuse, refuse_undealt
from longspan.integrations.state_dict import read_whole_weights, spread_optimizer, whole
from longspan.memory.options import MemoryOptions
from longspan.models.adapter import parallel_state
from longspan.parallelize import parallelize

OLDEST = (5, 23)
"""Of Transformers. Its Trainers before saved on one rank alone, which would wait for ever for the parts of the others."""
REPLACED = ("compute_loss", "prediction_step", "_get_num_items_in_batch")
"""What is done here in place of the base class, not around it."""
WRAPPED = (
    "create_accelerator_and_postprocess", "call_model_init", "get_batch_samples", "training_step", "evaluation_loop",
    "store_flos", "_track_num_input_tokens", "_prepare_for_training", "_save", "_save_checkpoint", "_save_rng_state",
    "_save_optimizer_and_scheduler", "_load_from_checkpoint", "_load_optimizer_and_scheduler", "_load_best_model",
    "loss_is_scaled_for_ga",
)  # fmt: skip


Base: Any = Trainer
"""Untyped: many of its attributes are None until it trains."""


class LongTrainer(Base):  # type: ignore[misc]
    """``transformers.Trainer`` whose every sequence lies on ``ring x ulysses`` ranks of ``mesh``.

    Takes what Trainer takes, and ``mesh``, ``zero`` and ``memory`` of ``parallelize``, its other keywords as
    ``parallelize_kwargs``, and ``dims`` of ``shard_batch``. Before another trainer class it does the same to that
    one: ``class LongSFT(LongTrainer, SFTTrainer): ...``.
    Every rank runs the same script; ``per_device_train_batch_size`` and ``per_device_eval_batch_size`` are rows a data replica.

    Equals ``Trainer`` on one device with ``per_device_train_batch_size`` times ``mesh.coordinate.data``: batches and their
    order, logged losses and norms, weights, ``eval_loss`` (Trainer's own: each batch's mean over its labelled tokens, weighted
    by the batch's rows), predictions, and the files of a checkpoint. A last batch that does not divide is split as it is, no
    row is repeated. ``trainer.args`` is a copy, that of the one device.

    With ``compute_metrics`` the logits of all rows and tokens are gathered on every rank. A ``compute_loss`` of your own
    belongs into a class in front of this one; its ``inputs`` are this rank's tokens, its loss must be equal on every rank.

    Raises RunError for arguments that do not go with a mesh, and what ``parallelize`` and ``shard_batch`` raise.
    """

    accelerator: Any
    current_flos: float
    loss_is_scaled_for_ga = True  # labels are counted over the whole accumulated step

    def __init__(
        self,
        *positional: Any,
        mesh: ParallelMesh,
        zero: int = 0,
        memory: MemoryOptions = MemoryOptions(),  # noqa: B008 - frozen
        parallelize_kwargs: Mapping[str, Any] | None = None,
        dims: Mapping[str, int] | None = None,
        args: TrainingArguments | None = None,
        **keywords: Any,
    ) -> None:
        if wrong := {"mesh", "zero", "memory"} & set(parallelize_kwargs or {}):
            raise RunError(f"parallelize_kwargs= names {', '.join(sorted(wrong))}; pass it to LongTrainer itself")
        self.mesh, self.zero, self.dims = mesh, zero, dims
        self.parallelize_kwargs = {"memory": memory, **(parallelize_kwargs or {})}
        if args is None or len(positional) > 1:
            raise RunError("LongTrainer takes all but the model by name; pass args=TrainingArguments(...) and mesh=...")
        _refuse_other_versions()
        refuse(args, mesh)
        _refuse_other_losses(type(self), args)
        _refuse_by_keywords(keywords, zero)
        super().__init__(*positional, args=as_one_device(args, mesh), **keywords)
        self._refuse_other_ranks()
        if self.model_init is None:
            self._parallelize(self.model)

    def _refuse_other_ranks(self) -> None:
        """What came in on the way: accelerate's configuration of the environment, a class that rebuilt the arguments."""
        if self.is_deepspeed_enabled or self.is_fsdp_enabled or self.accelerator.parallelism_config is not None:
            raise RunError(
                "accelerate's configuration (DeepSpeed, FSDP or a ParallelismConfig) would shard the model as well; start the "
                "script with torchrun, or with an accelerate configuration without them"
            )
        if self.args.world_size != 1:
            raise RunError(
                f"{type(self).__name__} built its arguments anew; pass arguments of its own kind, {type(self.args).__name__}"
            )

    def _parallelize(self, model: nn.Module) -> nn.Module:
        model = parallelize(model.to(self.args.device), self.mesh, zero=self.zero, **self.parallelize_kwargs)
        if self.zero:
            read_whole_weights(model)
        return model

    def call_model_init(self, trial: Any = None) -> nn.Module:
        return self._parallelize(super().call_model_init(trial))

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.accelerator = OneDevice.over(self.accelerator, self.mesh)
        self.gather_function = self.accelerator.gather_for_metrics

    def hyperparameter_search(self, *_: Any, **__: Any) -> Any:
        raise RunError("hyperparameter_search chooses on one rank what all must train with; start one run per choice instead")

    # ---- Batches and the loss

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], None]:
        """The micro-batches of one step, each with this rank's part of it."""
        self._share_random_numbers()
        with self._for_all_ranks():
            batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        return [_Dealt(batch, part) for batch, part in zip(batches, self._shard(batches))], None

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> None:
        """``shard_batch`` counts."""

    def _shard(self, batches: Sequence[Mapping[str, Any]]) -> list[Any]:
        if not batches:
            return sync_batches([], self.mesh)
        offer: Any = self._adapter()
        given = [offer.with_targets(dict(batch.items())) for batch in batches]
        shifts = self._loss_shifts_labels if offer.loss_kind is None else not is_in_place(offer.loss_kind)
        shift = shifts and not is_encoder_decoder(self.model)
        parts: list[Any] = shard_batch(given, self.mesh, shift=shift, dims=self.dims)
        return parts

    def _adapter(self) -> Any:
        state = parallel_state(self.model)
        assert state is not None
        return state.adapter

    @contextmanager
    def _for_all_ranks(self) -> Iterator[None]:
        """What fails on one rank (a row, a collator) where the others go on to ``shard_batch`` is raised by all of them."""
        try:
            yield
        except Exception as error:
            sync_batches([], self.mesh, error=_as_ours(error, BatchError))
            raise

    def _share_random_numbers(self) -> None:
        """Rank 0's: samplers and collators draw the same on every rank, whatever its dropout drew."""
        if self.mesh.world_group.size() > 1:
            state = torch.get_rng_state()
            dist.broadcast(state, group=self.mesh.world_group, group_src=0)
            torch.set_rng_state(state)

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        part = inputs.part if isinstance(inputs, _Dealt) else self._shard([inputs])[0]
        loss: Tensor = super().training_step(model, part, num_items_in_batch)
        return loss

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        """The model's own loss over the mesh, whatever a class behind this one would do with one rank's logits."""
        return Trainer.compute_loss(self, model, inputs, return_outputs)

    # ---- What is counted

    def store_flos(self) -> None:
        self.current_flos = self._over_replicas(float(self.current_flos))
        super().store_flos()

    def _track_num_input_tokens(self, inputs: Any) -> None:
        before = self.state.num_input_tokens_seen
        super()._track_num_input_tokens(inputs)
        if self.args.include_num_input_tokens_seen != "no":
            self.state.num_input_tokens_seen = before + int(self._over_replicas(self.state.num_input_tokens_seen - before))

    def _over_replicas(self, count: int | float) -> float:
        """The sum over data replicas of what every rank of a sequence counts alike."""
        total = torch.tensor(count, dtype=torch.float64)
        dist.all_reduce(total, group=self.mesh.world_group)
        return total.item() / (self.mesh.coordinate.sequence_ranks)

    # ---- Evaluation

    def evaluation_loop(self, dataloader: Any, *args: Any, **keywords: Any) -> Any:
        refuse_undealt(dataloader, self.mesh.coordinate)
        self._share_random_numbers()
        return super().evaluation_loop(dataloader, *args, **keywords)

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Any, Any]:
        """The loss of the batch of all replicas and, unless ``prediction_loss_only``, its logits and labels, whole."""
        part = self._prepare_inputs(self._shard([inputs])[0])
        has_labels = bool(self.label_names) and all(inputs.get(name) is not None for name in self.label_names)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, part, return_outputs=True) if has_labels else (None, model(**part))
        loss = None if loss is None else loss.detach().mean()
        if prediction_loss_only:
            return loss, None, None
        ignored = ignore_keys or getattr(self.model.config, "keys_to_ignore_at_inference", ["past_key_values"])
        step = part["longspan"]
        logits = tuple(self._put_together(name, x, step) for name, x in outputs.items() if name not in [*ignored, "loss"])
        labels = tuple(self._of_all_replicas(inputs[name]) for name in self.label_names) if has_labels else None
        return loss, _alone(logits), _alone(labels)

    def _put_together(self, name: str, mine: Any, step: Any) -> Any:
        """An output [rows, my tokens, ...] of the model for every row of all replicas and every token."""
        if isinstance(mine, tuple | list):
            return type(mine)(self._put_together(name, each, step) for each in mine)
        if step.target is not None and not name.startswith("encoder_"):
            step = step.target
        if not isinstance(mine, Tensor) or mine.ndim < 2 or mine.shape[1] != sum(map(len, step.positions)):
            raise BatchError(
                f"the model's output {name!r} has no dimension of tokens that could be put together; leave it out with "
                f"ignore_keys, or evaluate with prediction_loss_only=True"
            )
        return self._of_all_replicas(unshard(mine.detach(), self.mesh, tokens=step.tokens))

    def _of_all_replicas(self, rows: Tensor) -> Tensor:
        """[rows, tokens, ...] of all replicas, in the order of the batch; shorter ones padded with -100 as Trainer does."""
        mesh = self.mesh
        shapes = gather(tuple(rows.shape), mesh.world_group)
        replicas = shapes[:: mesh.coordinate.sequence_ranks]
        longest = max(shape[1] for shape in replicas)
        padding = [0, 0] * (rows.ndim - 2) + [0, longest - rows.shape[1]]
        padded = F.pad(rows.to(self.args.device), padding, value=IGNORE).contiguous()
        group = mesh.data_group
        return all_gather(padded, group, mesh.transport, 0, [shape[0] for shape in replicas])

    # ---- Checkpoints

    def train(self, resume_from_checkpoint: str | bool | None = None, **keywords: Any) -> Any:
        folder: Any = resume_from_checkpoint
        if folder is True:
            folder = get_last_checkpoint(self.args.output_dir)  # type: ignore[no-untyped-call]
        if resume_from_checkpoint:
            held = sorted(os.listdir(folder)) if folder and os.path.isdir(folder) else "nothing"
            refuse_difference(
                "the checkpoint to resume from",
                f"{folder} with {held}",
                self.mesh.world_group,
                "let every rank read the same folder",
            )
            resume_from_checkpoint = folder or resume_from_checkpoint
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **keywords)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        refuse_undealt(train_dataloader, self.mesh.coordinate)
        return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)

    @contextmanager
    def _or_none(self, what: str) -> Iterator[None]:
        """What fails on one rank's disk fails on all, with one text; and none goes on before all are done."""

        def convert(found: BaseException) -> LongspanError | None:
            return _as_ours(found, RunError, f"{what} failed: ") if isinstance(found, Exception) else None

        with raise_together(self.mesh.world_group, convert):
            yield

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if state_dict is None and self.zero:
            state_dict = whole(self.model.state_dict(), keep=self.args.should_save)
        with self._or_none(f"writing the model to {output_dir or self.args.output_dir}"):
            super()._save(output_dir, state_dict)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        with self._or_none(f"writing checkpoint {self.state.global_step} to {self.args.output_dir}"):
            super()._save_checkpoint(model, trial)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        state = whole(self.optimizer.state_dict(), keep=self.args.should_save)
        if self.args.should_save:
            torch.save(state, os.path.join(output_dir, OPTIMIZER_NAME))
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_NAME))

    def _save_rng_state(self, output_dir: str) -> None:
        if self.args.should_save:
            super()._save_rng_state(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with self._or_none(f"reading the weights in {resume_from_checkpoint}"):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        with self._or_none(f"reading the best weights in {self.state.best_model_checkpoint}"):
            super()._load_best_model()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        handle = self.optimizer.optimizer.register_load_state_dict_pre_hook(spread_optimizer)
        try:
            with self._or_none(f"reading the optimizer in {checkpoint}"):
                super()._load_optimizer_and_scheduler(checkpoint)
        finally:
            handle.remove()


class _Dealt(dict[str, Any]):
    """A batch of this replica's rows, whole, as the Trainer's own counters want it; and this rank's part of it."""

    def __init__(self, batch: Mapping[str, Any], part: Any) -> None:
        super().__init__(batch.items())
        self.part = part


def _as_ours(error: Exception, kind: type[LongspanError], before: str = "") -> LongspanError:
    return error if isinstance(error, LongspanError) else kind(f"{before}{type(error).__name__}: {error}")


def _alone(values: tuple[Any, ...] | None) -> Any:
    return values[0] if values is not None and len(values) == 1 else values


def _refuse_other_versions() -> None:
    version = transformers.__version__
    if tuple(int(number) for number in version.split(".")[:2]) < OLDEST:
        raise RunError(
            f"Trainer of transformers {version} saves on one rank alone, and could not gather a model's parts; install 5.23 or "
            f"newer, or train with parallelize in a loop of your own, which needs 5.4"
        )
    missing = [name for name in (*REPLACED, *WRAPPED) if not hasattr(Trainer, name)]
    if missing:
        raise RunError(f"transformers {version} has no Trainer.{missing[0]}; install the one this is tested with, 5.23")


def _refuse_other_losses(trainer: type, args: TrainingArguments) -> None:
    """A class behind this one that computes its own loss would do so from one rank's tokens."""
    behind = trainer.__mro__[trainer.__mro__.index(LongTrainer) + 1 :]
    for name in REPLACED:
        owner = next(kind for kind in behind if name in vars(kind))
        known = owner.__name__ == "SFTTrainer" and getattr(args, "loss_type", "nll") == "nll"
        mine = getattr(trainer, name) is not getattr(LongTrainer, name)
        if owner is not Trainer and not known and not mine:
            raise RunError(
                f"{owner.__name__}.{name} would work on this rank's tokens only; write {name} in a class in front: "
                f"class Mine(LongTrainer, {owner.__name__}), with unshard or longspan.cross_entropy where it needs all tokens"
            )


def _refuse_by_keywords(keywords: Mapping[str, Any], zero: int) -> None:
    if keywords.get("compute_loss_func") is not None:
        raise RunError(
            "compute_loss_func would be given this rank's logits; write compute_loss in a class in front of LongTrainer, with "
            "longspan.cross_entropy or unshard"
        )
    if zero and any(given is not None for given in keywords.get("optimizers", ())):
        raise RunError(
            f"optimizers= were built before zero={zero} shards the parameters and would train nothing; pass "
            f"optimizer_cls_and_kwargs"
        )
