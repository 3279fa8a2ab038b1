"""LongTrainer: Transformers' Trainer over a mesh, with the losses, weights and checkpoints of one device (extra ``hf``).

    get_batch_samples   micro-batches of this replica's rows  --shard_batch-->  this rank's tokens, labels counted once
    training_step       forward and backward over the mesh (parallelize); the loss is that of one device, so nothing is scaled
    prediction_step     the same loss; predictions are gathered if Trainer asks for them
    _save, _load        one rank writes the files of one device; every rank reads them and keeps its shard

Each rank runs Trainer's loop as a single process (accelerate.py), so a step that the ranks take together is a step of one
device. REPLACED and WRAPPED name the methods that are overridden; a Transformers version that lacks one of them is refused.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_utils import get_last_checkpoint

from longspan.batch.agreement import sync_batches
from longspan.batch.shard import shard_batch
from longspan.distributed.consensus import gather, raise_together, refuse_difference
from longspan.distributed.mesh import ParallelMesh, refuse_no_mesh
from longspan.distributed.whole_tensors import load_whole_tensors
from longspan.errors import BatchError, LongspanError, RunError
from longspan.hf.loss import is_in_place
from longspan.hf.names import is_encoder_decoder
from longspan.integrations import arguments, predictions, random_state, trl_loss
from longspan.integrations.accelerate import OneDevice, refuse_repeated_rows, single_process_arguments
from longspan.integrations.control import SharedDecisions, follow
from longspan.integrations.presence import absent_ranks
from longspan.integrations.state_dict import gather_state, shard_optimizer_state
from longspan.memory.options import AutoMemory, MemoryOptions
from longspan.models.adapter import parallel_state
from longspan.parallelize import parallelize

REPLACED = ("compute_loss", "prediction_step", "_get_num_items_in_batch")
"""Methods of Trainer that are overridden here without ``super()``."""
WRAPPED = (
    "create_accelerator_and_postprocess", "call_model_init", "get_batch_samples", "training_step", "evaluation_loop",
    "store_flos", "_track_num_input_tokens", "_prepare_for_training", "save_model", "_save", "_save_checkpoint",
    "_save_rng_state", "_save_optimizer_and_scheduler", "_load_from_checkpoint", "_load_optimizer_and_scheduler",
    "_load_best_model", "_maybe_log_save_evaluate", "loss_is_scaled_for_ga",
)  # fmt: skip
"""Methods and attributes of Trainer that are overridden here; the methods call ``super()``."""
SAVE_WAIT_S = 10.0
"""Seconds that ``save_model`` with sharded parameters waits for the other ranks to call it too."""

Base: Any = Trainer
"""Untyped: many of its attributes are None until it trains."""


class LongTrainer(Base):  # type: ignore[misc]
    """``transformers.Trainer`` that splits every sequence over ``ring x ulysses x tensor`` ranks of ``mesh``.

    To use it with another trainer class, inherit from both: ``class LongSFT(LongTrainer, SFTTrainer): ...``. Every rank
    runs the same script. Results equal those of ``Trainer`` on one device with ``per_device_train_batch_size`` times
    ``mesh.coordinate.data``: batches and their order, logged losses and norms, weights, ``eval_loss`` (Trainer's own: the mean
    over labelled tokens of each batch, weighted by the rows of the batch), predictions, and the files of a checkpoint. An
    incomplete last batch is divided too; no row is repeated. ``trainer.args`` is a copy with the settings of one device.

    Dropout draws different random numbers on every rank, so that each token's are independent; they are a function of
    ``args.seed``, the step, the micro-batch and the rank. What samplers and collators draw is equal on all ranks.

    Predictions: with ``compute_metrics`` every rank gets them for all rows and tokens. If ``preprocess_logits_for_metrics`` is
    token-wise (argmax, top-k, the log-probability of the label), it is applied to each rank's own tokens, and only its
    results are gathered; ``predictions.is_token_wise`` tests this once per evaluation. Any other function gets the whole
    logits of one batch at a time, as on one device, and so does every function of an encoder-decoder's logits. With a chunked
    loss the logits take a second forward of the evaluated batch.

    Callbacks: each rank has its own, and what one decides on any rank (to stop, log, evaluate or save) all ranks do.

    Put a ``compute_loss`` of your own into a class that inherits from this one; its ``inputs`` are this rank's tokens, and its
    loss must be equal on every rank. At ``zero=0`` each rank that calls ``save_model`` runs it alone, and rank 0 writes; with
    sharded parameters (``zero`` 2 or 3, or tensor > 1) every rank must call it.

    Args:
        mesh: the ranks; every rank passes an equal one.
        zero: ``zero`` of ``parallelize``: 0, 2 or 3. With tensor > 1, ``optimizers=`` is refused as with 2 and 3.
        memory: ``memory`` of ``parallelize``; an AutoMemory chooses the ZeRO stage too.
        parallelize_kwargs: the other keywords of ``parallelize``.
        dims: for tensors in the batch that ``shard_batch`` does not know: name to the number of their dim of tokens.
        args: TrainingArguments; ``per_device_train_batch_size`` and ``per_device_eval_batch_size`` are rows per data replica.
        positional: the model, or nothing with ``model_init=``.
        keywords: any other argument of ``Trainer``.

    Raises:
        RunError: for arguments that are not supported over a mesh; and what ``parallelize`` and ``shard_batch`` raise.
    """

    accelerator: Any
    callback_handler: SharedDecisions
    current_flos: float
    preprocess_logits_for_metrics: Any
    loss_is_scaled_for_ga = True  # labels are counted over the whole accumulated step

    def __init__(
        self,
        *positional: Any,
        mesh: ParallelMesh,
        zero: int = 0,
        memory: MemoryOptions | AutoMemory = MemoryOptions(),  # noqa: B008 - frozen
        parallelize_kwargs: Mapping[str, Any] | None = None,
        dims: Mapping[str, int] | None = None,
        args: TrainingArguments | None = None,
        **keywords: Any,
    ) -> None:
        if wrong := {"mesh", "zero", "memory"} & set(parallelize_kwargs or {}):
            raise RunError(f"parallelize_kwargs= names {', '.join(sorted(wrong))}; pass it to LongTrainer itself")
        refuse_no_mesh(mesh)
        self.mesh, self.zero, self.dims = mesh, zero, dims
        self.parallelize_kwargs = {"memory": memory, **(parallelize_kwargs or {})}
        self._micro_batch = 0
        self._preprocess: Any = None
        self._token_wise: bool | None = None
        if args is None or len(positional) > 1:
            raise RunError("LongTrainer takes all but the model by name; pass args=TrainingArguments(...) and mesh=...")
        with raise_together(mesh.world_group):
            arguments.refuse_versions((*REPLACED, *WRAPPED))
            arguments.refuse_arguments(args, mesh)
            arguments.refuse_other_losses(type(self), LongTrainer, args, REPLACED)
            arguments.refuse_keywords(keywords, zero, mesh.coordinate.tensor)
        super().__init__(*positional, args=single_process_arguments(args, mesh), **keywords)
        arguments.refuse_other_sharding(self)
        self.callback_handler = SharedDecisions(self.callback_handler, mesh)
        if self.model_init is None:
            self._parallelize(self.model)

    @property
    def _is_sharded(self) -> bool:
        """Whether a rank holds only a part of some parameters: with zero=2 or 3, or cut over tensor ranks."""
        return self._state().zero > 0 or self.mesh.coordinate.tensor > 1

    def _parallelize(self, model: nn.Module) -> nn.Module:
        model = parallelize(model.to(self.args.device), self.mesh, zero=self.zero, **self.parallelize_kwargs)
        if self.mesh.coordinate.tensor > 1:
            load_whole_tensors(model)
        return model

    def call_model_init(self, trial: Any = None) -> nn.Module:
        return self._parallelize(super().call_model_init(trial))

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.accelerator = OneDevice.over(self.accelerator, self.mesh)
        self.gather_function = self.accelerator.gather_for_metrics

    def hyperparameter_search(self, *_: Any, **__: Any) -> Any:
        raise RunError("hyperparameter_search chooses on one rank what all must train with; start one run per choice instead")

    # ---- Batches

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], None]:
        """The next ``num_batches`` batches of Trainer, each with this rank's part of it, and None.

        The second value would be the number of labels, which ``shard_batch`` counts instead. Every rank must call it. An error
        of one rank's dataset or collator is raised on all ranks.
        """
        self._micro_batch = 0
        random_state.synchronize(self.mesh)
        with self._fail_on_all_ranks():
            batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        return [_MicroBatch(batch, part) for batch, part in zip(batches, self._shard(batches))], None

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> None:
        """Return None: ``shard_batch`` counts the labels."""

    def _shard(self, batches: Sequence[Mapping[str, Any]]) -> list[Any]:
        if not batches:
            return sync_batches([], self.mesh)
        offer = self._state().adapter
        given = [offer.with_targets(dict(batch.items())) for batch in batches]
        shifts = self._loss_shifts_labels if offer.loss_kind is None else not is_in_place(offer.loss_kind)
        shift = shifts and not is_encoder_decoder(self.model)
        parts: list[Any] = shard_batch(given, self.mesh, shift=shift, dims=self.dims)
        return parts

    def _state(self) -> Any:
        """What ``parallelize`` did to the model, with the ZeRO stage and the memory options that an AutoMemory has chosen."""
        return parallel_state(self.model)

    @contextmanager
    def _fail_on_all_ranks(self) -> Iterator[None]:
        """Context manager: an error of this rank is raised here, and by ``shard_batch`` on the other ranks."""
        try:
            yield
        except Exception as error:
            sync_batches([], self.mesh, error=_longspan_error(error, BatchError))
            raise

    # ---- The loss

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        part = inputs.part if isinstance(inputs, _MicroBatch) else self._shard([inputs])[0]
        with random_state.stream_of_this_rank(self.mesh, self.args.seed, self.state.global_step, self._micro_batch):
            loss: Tensor = super().training_step(model, part, num_items_in_batch)
        self._micro_batch += 1
        return loss

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        """The model's own loss over all ranks, equal on every rank.

        A step without any label gives what one device gives: nan with zero gradients, or 0 with TRL's SFTTrainer.

        Returns:
            The loss; with ``return_outputs`` (loss, outputs for this rank's tokens).
        """
        labelled = inputs.get("labels") is not None and self._state().adapter.loss_kind is not None
        loss, outputs = Trainer.compute_loss(self, model, inputs, return_outputs=True)
        if trl_loss.is_behind(type(self), LongTrainer):
            loss = trl_loss.average_balance_loss(self, loss, outputs)
        elif labelled and inputs["longspan"].num_labels == 0:
            loss = loss + torch.nan
        return (loss, outputs) if return_outputs else loss

    # ---- Counters

    def store_flos(self) -> None:
        self.current_flos = predictions.sum_over_replicas(float(self.current_flos), self.mesh)
        super().store_flos()

    def _track_num_input_tokens(self, inputs: Any) -> None:
        before = self.state.num_input_tokens_seen
        super()._track_num_input_tokens(inputs)
        if self.args.include_num_input_tokens_seen != "no":
            seen = predictions.sum_over_replicas(self.state.num_input_tokens_seen - before, self.mesh)
            self.state.num_input_tokens_seen = before + int(seen)

    # ---- Callbacks

    def _maybe_log_save_evaluate(self, *args: Any, **keywords: Any) -> None:
        super()._maybe_log_save_evaluate(*args, **keywords)
        follow(self.control, self.mesh)  # what callbacks of these events have decided

    # ---- Evaluation

    def evaluation_loop(self, dataloader: Any, *args: Any, **keywords: Any) -> Any:
        refuse_repeated_rows(dataloader, self.mesh.coordinate)
        random_state.synchronize(self.mesh)
        if type(self).prediction_step is not LongTrainer.prediction_step:  # which wants the logits, and the loop preprocesses
            return super().evaluation_loop(dataloader, *args, **keywords)
        self._token_wise = None
        self._preprocess, self.preprocess_logits_for_metrics = self.preprocess_logits_for_metrics, None
        try:
            return super().evaluation_loop(dataloader, *args, **keywords)
        finally:
            self._preprocess, self.preprocess_logits_for_metrics = None, self._preprocess

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Any, Any]:
        """(loss, predictions, labels) of one batch of all data replicas, equal on every rank.

        ``loss`` is None without labels. With ``prediction_loss_only`` the others are None; else they hold all rows and all
        tokens. Predictions are the logits or, inside ``evaluation_loop``, ``preprocess_logits_for_metrics`` of them.
        """
        part = self._prepare_inputs(self._shard([inputs])[0])
        self.accelerator.weigh_last_batch(lambda: predictions.sum_over_replicas(part["longspan"].rows, self.mesh))
        has_labels = bool(self.label_names) and all(inputs.get(name) is not None for name in self.label_names)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, part, return_outputs=True) if has_labels else (None, model(**part))
            if not prediction_loss_only and has_labels and self._state().memory.chunked_loss:
                outputs = model(**{name: x for name, x in part.items() if name not in ("labels", "shift_labels")})
        loss = None if loss is None else loss.detach().mean()
        if prediction_loss_only:
            return loss, None, None
        ignored = [*(ignore_keys or getattr(self.model.config, "keys_to_ignore_at_inference", ["past_key_values"]))]
        labels = (
            tuple(predictions.gather_replicas(inputs[name], self.mesh) for name in self.label_names) if has_labels else None
        )
        logits = {name: x for name, x in outputs.items() if name not in (*ignored, *("loss",) * has_labels)}  # as Trainer does
        return loss, self._predictions(logits, part, predictions.single(labels)), predictions.single(labels)

    def _predictions(self, outputs: Mapping[str, Any], part: Mapping[str, Any], labels: Any) -> Any:
        """The predictions for all rows and tokens, on every rank: ``preprocess_logits_for_metrics`` of the model's ``outputs``.

        The function is applied to each rank's tokens before they are gathered if it is token-wise, else to the gathered logits;
        without it the predictions are the logits.
        """
        info, function = part["longspan"], self._preprocess
        if function is not None and info.target is None:
            mine = predictions.single(tuple(outputs.values()))
            cut = None if labels is None else predictions.my_labels(part, self.label_names, sum(map(len, info.positions)))
            if self._token_wise is None:
                self._token_wise = (cut is None) is (labels is None) and predictions.is_token_wise(function, mine, cut)
            if self._token_wise:
                reduced = predictions.apply_token_wise(function, mine, cut)
                return predictions.gather_output("logits", reduced, info, self.mesh)
        whole = predictions.single(tuple(predictions.gather_output(name, x, info, self.mesh) for name, x in outputs.items()))
        return whole if function is None else function(whole, labels)

    # ---- Checkpoints

    def train(self, resume_from_checkpoint: str | bool | None = None, **keywords: Any) -> Any:
        """Train as ``Trainer.train`` does; ``resume_from_checkpoint`` is a folder, True for the newest checkpoint, or None.

        Raises:
            BatchError: the ranks would resume from different checkpoints.
        """
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
        refuse_repeated_rows(train_dataloader, self.mesh.coordinate)
        return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)

    @contextmanager
    def _all_or_none(self, what: str) -> Iterator[None]:
        """Context manager: raise an Exception of one rank on all ranks, as a LongspanError. Exit waits for all ranks.

        ``what`` begins the message: ``{what} failed: ...``; a LongspanError keeps its own text.
        """

        def convert(found: BaseException) -> LongspanError | None:
            return _longspan_error(found, RunError, f"{what} failed: ") if isinstance(found, Exception) else None

        with raise_together(self.mesh.world_group, convert):
            yield

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the model to ``output_dir`` (None: ``args.output_dir``). With sharded parameters every rank must call it.

        Raises:
            RunError: where parameters are sharded and another rank does not call it within 10 seconds.
        """
        if self._is_sharded and not _internal_call and (absent := absent_ranks("save_model", self.mesh, SAVE_WAIT_S)):
            raise RunError(
                f"save_model was not called on rank {absent} within {SAVE_WAIT_S:g} s, and with zero={self._state().zero} and "
                f"tensor={self.mesh.coordinate.tensor} each rank holds a shard of the parameters; call it on every rank (only "
                f"one writes), not under is_world_process_zero()"
            )
        super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if not self._is_sharded:  # every rank holds all parameters, so that one that saves needs no other
            super()._save(output_dir, state_dict)
            return
        if state_dict is None:
            state_dict = gather_state(self.model.state_dict(), keep=self.args.should_save)
        with self._all_or_none(f"writing the model to {output_dir or self.args.output_dir}"):
            super()._save(output_dir, state_dict)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        with self._all_or_none(f"writing checkpoint {self.state.global_step} to {self.args.output_dir}"):
            super()._save_checkpoint(model, trial)
        self.state.best_model_checkpoint = gather(self.state.best_model_checkpoint, self.mesh.world_group)[0]  # of rank 0

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        state = gather_state(self.optimizer.state_dict(), keep=self.args.should_save)
        if self.args.should_save:
            torch.save(state, os.path.join(output_dir, OPTIMIZER_NAME))
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_NAME))

    def _save_rng_state(self, output_dir: str) -> None:
        if self.args.should_save:
            super()._save_rng_state(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with self._all_or_none(f"reading the weights in {resume_from_checkpoint}"):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        with self._all_or_none(f"reading the best weights in {self.state.best_model_checkpoint}"):
            super()._load_best_model()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        handle = self.optimizer.optimizer.register_load_state_dict_pre_hook(shard_optimizer_state)
        try:
            with self._all_or_none(f"reading the optimizer in {checkpoint}"):
                super()._load_optimizer_and_scheduler(checkpoint)
        finally:
            handle.remove()


class _MicroBatch(dict[str, Any]):
    """A batch with the rows of this data replica, from which Trainer counts tokens; ``part`` is this rank's part of it."""

    def __init__(self, batch: Mapping[str, Any], part: Any) -> None:
        super().__init__(batch.items())
        self.part = part


def _longspan_error(error: Exception, kind: type[LongspanError], before: str = "") -> LongspanError:
    return error if isinstance(error, LongspanError) else kind(f"{before}{type(error).__name__}: {error}")
