"""Checks of what a user gives LongTrainer: the TrainingArguments, keywords and versions that do not work on a mesh.

Every check raises RunError with the name of the field, the reason and what to set instead, before anything is built.
"""

from collections.abc import Mapping
from typing import Any

import transformers
from transformers import Trainer, TrainingArguments

from longspan.distributed.mesh import ParallelMesh
from longspan.errors import RunError

OLDEST = (5, 23)
"""The oldest Transformers version: in earlier ones Trainer saves on one rank only, which then waits for the others' shards."""

REMEDIES = {
    "deepspeed": "leave it out; zero=3 of this trainer shards parameters, gradients and optimizer states",
    "fsdp": "leave it out; zero=3 of this trainer shards parameters, gradients and optimizer states",
    "parallelism_config": "leave it out; pass mesh=ParallelMesh(ulysses=..., ring=...) to the trainer",
    "label_smoothing_factor": "set it to 0; the loss over all ranks is the plain cross-entropy",
    "auto_find_batch_size": "set it to False; one rank that runs out of memory would leave the others waiting",
    "fp16": "use bf16=True, which needs no scaling of the loss",
    "fp16_full_eval": "leave it out, and evaluate in the dtype of training",
    "bf16_full_eval": "leave it out, and evaluate in the dtype of training",
    "torch_compile": "set it to False; compiling the whole model over a mesh is not tested",
    "neftune_noise_alpha": "leave it out; its noise is scaled by the length of the row, and a rank has a part of it",
    "use_liger_kernel": "leave it out; its loss would be that of one rank's tokens",
    "enable_jit_checkpoint": "leave it out; the ranks would begin to save at different steps",
    "eval_use_gather_object": "leave it out; only tensors are gathered",
    "predict_with_generate": "leave it out; to generate, trainer.save_model(folder) and from_pretrained(folder)",
}
"""TrainingArguments that need a single process or that start another library's sharding, and what to do instead."""

ON_AT_ZERO = ("neftune_noise_alpha",)
"""Those of REMEDIES that Trainer acts on at every value but None, 0 too."""

STEPS_IN_BACKWARD = ("lomo", "adalomo", "layerwise")
"""Parts of the names of optimizers that update parameters during the backward, before gradients are averaged over ranks."""


def refuse_arguments(args: TrainingArguments, mesh: ParallelMesh) -> None:
    """Raise RunError, naming the field, for a TrainingArguments setting that is not supported over ``mesh``.

    docs/arguments.md lists the fields that are refused; of others single values are: an optimizer that steps in the backward,
    accelerate's ``split_batches`` and ``dispatch_batches``, and metrics of inputs. So are several GPUs in one process,
    another device than the mesh's, and a pipeline.
    """
    if mesh.coordinate.pipeline > 1:
        raise RunError(
            f"a trainer calls its model, which pipeline={mesh.coordinate.pipeline} does not allow; use pipeline=1, or a loop "
            f"of your own with forward_backward(model, parts)"
        )
    for name, remedy in REMEDIES.items():
        value = getattr(args, name, None)
        if value or (name in ON_AT_ZERO and value is not None):
            raise RunError(f"TrainingArguments({name}={value!r}) is not supported over a mesh: {remedy}")
    optimizer = str(getattr(args.optim, "value", args.optim))
    if any(kind in optimizer for kind in STEPS_IN_BACKWARD):
        raise RunError(
            f"TrainingArguments(optim={optimizer!r}) steps inside the backward, before gradients are averaged over the ranks; "
            f"use another one, like 'adamw_torch'"
        )
    for name in ("split_batches", "dispatch_batches"):
        if getattr(args.accelerator_config, name, None):
            raise RunError(
                f"TrainingArguments(accelerator_config={{'{name}': True}}) distributes batches by accelerate's ranks; leave it "
                f"out: each data replica of the mesh gets per_device_train_batch_size rows"
            )
    if "inputs" in args.include_for_metrics:
        raise RunError("TrainingArguments(include_for_metrics=['inputs']) is not supported: inputs are not gathered")
    for name in ("activation_checkpointing", "gradient_checkpointing"):
        if mesh.coordinate.tensor > 1 and getattr(args, name, False):
            raise RunError(
                f"TrainingArguments({name}=True) would compute layers again without their tensor ranks; pass "
                f"memory=MemoryOptions(recompute='full') to the trainer instead"
            )
    if args.n_gpu > 1:
        raise RunError(
            f"this process sees {args.n_gpu} GPUs and would split its batch among them; start one process per GPU: "
            f"torchrun --nproc-per-node {args.n_gpu} ..."
        )
    if args.device.type != mesh.device.type or (args.device.index or 0) != (mesh.device.index or 0):
        raise RunError(
            f"TrainingArguments chose device {args.device}, but the mesh is on {mesh.device}; pass "
            f"ParallelMesh(device={str(args.device)!r}), or TrainingArguments(use_cpu=True)"
        )


def refuse_other_sharding(trainer: Any) -> None:
    """Raise RunError if accelerate's configuration also shards the model, or if a base class has replaced the arguments.

    ``trainer`` is the LongTrainer, after Trainer has built its accelerator and before the model is made parallel.
    """
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled or trainer.accelerator.parallelism_config is not None:
        raise RunError(
            "accelerate's configuration (DeepSpeed, FSDP or a ParallelismConfig) would shard the model as well; start the "
            "script with torchrun, or with an accelerate configuration without them"
        )
    if trainer.args.world_size != 1:
        raise RunError(
            f"{type(trainer).__name__} replaced its arguments; pass arguments of its own kind, {type(trainer.args).__name__}"
        )


def refuse_keywords(keywords: Mapping[str, Any], zero: int, tensor: int = 1) -> None:
    """Raise RunError for a keyword of Trainer that would be wrong on a mesh.

    Refused: ``compute_loss_func``, which would get one rank's logits; with ``zero`` above 0 or ``tensor`` above 1 also
    ``optimizers``, which would hold the parameters from before sharding.
    """
    if keywords.get("compute_loss_func") is not None:
        raise RunError(
            "compute_loss_func would be given this rank's logits; write compute_loss in a class in front of LongTrainer, with "
            "longspan.cross_entropy or unshard"
        )
    if (zero or tensor > 1) and any(given is not None for given in keywords.get("optimizers", ())):
        raise RunError(
            f"optimizers= were built before zero={zero} and tensor={tensor} shard the parameters and would train nothing; pass "
            f"optimizer_cls_and_kwargs"
        )


def refuse_versions(methods: tuple[str, ...]) -> None:
    """Raise RunError if Transformers is older than OLDEST, or if its Trainer lacks one of ``methods``."""
    version = transformers.__version__
    if tuple(int(number) for number in version.split(".")[:2]) < OLDEST:
        raise RunError(
            f"Trainer of transformers {version} saves on one rank only, and could not gather a model's shards; install 5.23 or "
            f"newer, or train with parallelize in a loop of your own, which needs 5.4"
        )
    missing = [name for name in methods if not hasattr(Trainer, name)]
    if missing:
        raise RunError(f"transformers {version} has no Trainer.{missing[0]}; install the version that is tested, 5.23")


def refuse_other_losses(trainer: type, front: type, args: TrainingArguments, replaced: tuple[str, ...]) -> None:
    """Raise RunError if a class behind LongTrainer has its own version of a method that LongTrainer replaces.

    That version computes the loss, and would see one rank's tokens only. Accepted are Trainer's own methods, those of TRL's
    SFTTrainer with its ``nll`` loss, and a method that a class in front of LongTrainer overrides again.

    Args:
        trainer: the class of the trainer that is built.
        front: LongTrainer; the classes after it in the method resolution order of ``trainer`` are those behind it.
        args: the arguments of the trainer; ``args.loss_type`` names TRL's loss.
        replaced: the names of the methods that ``front`` replaces.
    """
    behind = trainer.__mro__[trainer.__mro__.index(front) + 1 :]
    for name in replaced:
        owner = next(kind for kind in behind if name in vars(kind))
        known = owner.__name__ == "SFTTrainer" and getattr(args, "loss_type", "nll") == "nll"
        mine = getattr(trainer, name) is not getattr(front, name)
        if owner is not Trainer and not known and not mine:
            raise RunError(
                f"{owner.__name__}.{name} would see this rank's tokens only; write {name} in a class in front: "
                f"class Mine(LongTrainer, {owner.__name__}), with unshard or longspan.cross_entropy where it needs all tokens"
            )
