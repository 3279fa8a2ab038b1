"""Settings of each verb: frozen, flat dataclasses, validated on construction.

    flags  --\\
    FILE   ---+-->  Train(ranks=2, ulysses=2, tokens=8192, ...)  --json-->  runs/NAME/config.json  --json-->  --resume NAME
    default -/

A number counts for the whole run, never for one rank: ``rows_per_step`` is the rows of all replicas and micro-batches. This
file is independent of processes and tensors, and it imports no torch.
"""

import math
from dataclasses import dataclass, fields
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Literal, get_args, get_origin

from tyro.conf import Positional, arg

from longspan.cli.output_file import refuse_no_file
from longspan.cli.settings_file import LATEST, legal_folder
from longspan.cli.trackers import refuse_missing
from longspan.distributed.pipeline_options import PipelineOptions
from longspan.errors import RunError
from longspan.memory.options import MemoryOptions
from longspan.models.decoder_config import PRESETS

MAX_TOKENS = 16_384
"""The default of ``evaluate --max-tokens``: documents are truncated to this many tokens."""
LARGEST_SEED = 2**63 - 1
LONGEST_SECONDS = 10**9
"""The longest wait that the settings take: PyTorch counts it in 64 bits."""


def _default(hint: str) -> object:
    """A tyro annotation: ``--help`` shows ``(default: {hint})`` for a setting whose default is None or empty."""
    return arg(help_behavior_hint=f"(default: {hint})")


def _number(hint: str) -> object:
    """A tyro annotation for an ``int | None``: ``--help`` shows the type INT and ``(default: {hint})``."""
    return arg(help_behavior_hint=f"(default: {hint})", metavar="INT")


@dataclass(frozen=True)
class Ranks:
    """Settings of every verb that starts ranks: processes and debugging."""

    ranks: Annotated[int | None, _number("one for each GPU, up to 4; without a GPU 2")] = None
    """Ranks to start on this machine. Under torchrun or another launcher its ranks are used instead."""
    timeout_seconds: Annotated[int | None, _number("PyTorch's, 600 for NCCL and 1800 for gloo")] = None
    """How long a rank waits in a collective for the other ranks before the run fails."""
    debug: bool = False
    """Show the traceback of an error beside its message."""

    def __post_init__(self) -> None:
        _legal_choices(self)
        _at_least(self, 1, "ranks", "timeout_seconds")
        _at_most(self, LONGEST_SECONDS, "timeout_seconds")

    @property
    def local_ranks(self) -> int:
        """The number of ranks to start on this machine if no launcher has started ranks: ``ranks``, or its default."""
        return self.ranks if self.ranks is not None else 2

    def common(self) -> dict[str, str]:
        """The settings that all ranks must have alike, as text by name: all but those of the launch."""
        return {field.name: str(getattr(self, field.name)) for field in fields(self) if field.name not in ("ranks", "debug")}

    @property
    def timeout(self) -> timedelta | None:
        """``timeout_seconds`` as a timedelta, for ``ParallelMesh(timeout=)``; None: PyTorch's."""
        return None if self.timeout_seconds is None else timedelta(seconds=self.timeout_seconds)

    @property
    def after_a_death(self) -> str:
        """Advice that is printed after the message that a rank died, such as how to resume; may be empty."""
        return ""


@dataclass(frozen=True)
class Layout(Ranks):
    """Parallel layout, ZeRO stage and memory options: the settings that ``train`` and ``check`` have in common."""

    ranks: Annotated[int | None, _number("pipeline x ring x ulysses x tensor")] = None
    """Ranks to start on this machine. Under torchrun or another launcher its ranks are used instead."""
    ulysses: Annotated[int, arg(help_behavior_hint="(default: one for each GPU, up to 4; without a GPU 2)")] = 2
    """Degree of Ulysses sequence parallelism: an all-to-all turns shards of tokens into shards of heads around attention."""
    ring: int = 1
    """Degree of ring attention (context parallelism): key/value blocks pass from rank to rank. For more ranks than heads."""
    tensor: int = 1
    """Degree of tensor parallel: heads, feed-forwards and their weights are split (Megatron-SP)."""
    pipeline: int = 1
    """Degree of pipeline parallel: the layers are split into stages, through which the micro-batches of a step pass."""
    schedule: Literal["1f1b", "gpipe", "interleaved"] = "1f1b"
    """Order of a pipeline's forwards and backwards. gpipe holds all micro-batches; interleaved has several stages on a rank."""
    stages_per_rank: int = 1
    """Pipeline stages of each rank, with --schedule interleaved."""
    zero: Literal[0, 2, 3] = 0
    """ZeRO stage (FSDP2). 0: nothing is sharded. 2: gradients and optimizer states are sharded; 3: parameters too."""
    recompute: Literal["none", "full", "selective"] = "none"
    """What a block computes again in its backward instead of keeping it: nothing, everything, or all but attention."""
    tile_tokens: Annotated[int | None, _number("all")] = None
    """Tokens that feed-forwards and norms work on at a time, forward and backward."""
    head_chunks: int = 1
    """Number of chunks of a rank's heads that are exchanged and attended one after the other."""
    offload_activations: bool = False
    """Keep in host memory what blocks save for their backward (on a GPU)."""
    chunked_loss: bool = False
    """Compute the loss of a hf: model without forming all logits. (Our decoder never forms them.)"""

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least(self, 1, "ulysses", "ring", "tensor", "pipeline", "tile_tokens", "head_chunks")
        self.stages.refuse_without_stages(self.pipeline)

    @property
    def local_ranks(self) -> int:
        return self.ranks if self.ranks is not None else self.pipeline * self.ring * self.ulysses * self.tensor

    @property
    def stages(self) -> PipelineOptions:
        """The fields of PipelineOptions among these settings, for ``parallelize(pipeline=)``."""
        return PipelineOptions(self.schedule, self.stages_per_rank)

    @property
    def memory(self) -> MemoryOptions:
        """The memory options among these settings, as the MemoryOptions that ``parallelize`` takes."""
        return MemoryOptions(**{option.name: getattr(self, option.name) for option in fields(MemoryOptions)})


@dataclass(frozen=True)
class Train(Layout):
    """Settings of ``longspan train``."""

    model: str = "tiny"
    """tiny, small, llama-1b, llama-8b or llama-70b: a decoder of that shape. hf:FOLDER: the Hugging Face model in FOLDER."""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Compute dtype of forward and backward: auto is bf16 on a GPU, else fp32. Parameters and optimizer states are fp32."""
    data: Annotated[tuple[str, ...], _default("Python's own standard library")] = ()
    """Files, folders or globs of .txt, .md, .rst, .py, .jsonl(.gz, .zst) and .parquet."""
    text_field: str = "text"
    """The field of .jsonl and the column of .parquet that holds the text."""
    tokenizer: Annotated[str, _default("the model's own, else bytes")] = ""
    """bytes, a tokenizers JSON file, or the folder of a Hugging Face tokenizer."""
    tokens: int = 8_192
    """Tokens of one sequence (the context length)."""
    rope_scaling: Literal["none", "linear", "yarn"] = "none"
    """How the RoPE of a hf: model whose positions reach fewer than --tokens is scaled; the export has it too."""
    rows_per_step: int = 1
    """Sequences of one optimizer step (the global batch size), over all data replicas and micro-batches."""
    micro_batches: int = 1
    """Micro-batches whose gradients are accumulated in one optimizer step."""
    steps: int = 55
    """Optimizer steps of the whole run."""
    epochs: Annotated[float | None, arg(help_behavior_hint="(default: --steps decides)", metavar="FLOAT")] = None
    """Passes over the text, instead of --steps."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """AdamW (betas 0.9 and 0.95), or SGD without momentum."""
    learning_rate: float = 2e-3
    """Peak learning rate: linear warm-up, then a cosine decay to a tenth of it."""
    warmup_steps: int = 6
    """Steps of the warm-up."""
    decay_steps: Annotated[int | None, _number("the steps of the run as it was started")] = None
    """The step at which the decay of the learning rate ends; later steps keep the tenth."""
    weight_decay: float = 0.1
    """Weight decay of matrices; vectors (norms, biases) are not decayed."""
    clip_norm: float = 1.0
    """Global gradient norm to which gradients are clipped."""
    eval_every_steps: int = 25
    """Steps between two evaluations on held-out text (0: only at the end)."""
    eval_rows: int = 4
    """Sequences of one evaluation."""
    checkpoint_every_steps: int = 25
    """Steps between two checkpoints (0: only at the end)."""
    keep_checkpoints: int = 2
    """How many checkpoints to keep; the oldest is removed when a newer one is complete."""
    seed: int = 0
    """Seed of the initial parameters and of the data order."""
    run: Annotated[str, _default("the next free of train-001, train-002, ...")] = ""
    """Name of the run's folder."""
    deterministic: bool = False
    """Use PyTorch's deterministic algorithms, slower, so that runs are bit-identical on a GPU too; on a CPU they are anyway."""
    memory_report: bool = False
    """Profile the memory of rank 0 in the second step after the start: a table, and memory.html in the run's folder."""
    plan: Annotated[Literal["auto"] | None, arg(help_behavior_hint="(default: the flags decide)", metavar="auto")] = None
    """auto: the layout, ZeRO stage and memory options that longspan plan finds best for this machine."""
    log_to: Annotated[tuple[str, ...], _default("TensorBoard alone")] = ()
    """wandb, trackio, mlflow: experiment trackers that get the metrics too; one that is named must be installed."""
    runs_folder: str = "runs"
    """Folder that holds the folders of all runs."""
    resume: Annotated[str | None, arg(help_behavior_hint="(default: a new run)", metavar="[NAME]")] = None
    """Resume this run (without a name: the latest) from its newest checkpoint. Flags override the settings of the run."""

    def __post_init__(self) -> None:
        super().__post_init__()
        legal_model(self.model)
        legal_folder(self.runs_folder)
        _at_least(self, 1, "rows_per_step", "micro_batches", "steps", "decay_steps", "eval_rows", "keep_checkpoints")
        _at_least(self, 2, "tokens")
        _at_least(self, 0, "warmup_steps", "eval_every_steps", "checkpoint_every_steps", "weight_decay", "seed")
        _above(self, 0, "learning_rate", "clip_norm", "epochs")
        _finite(self, "learning_rate", "weight_decay", "epochs")
        _at_most(self, LARGEST_SEED, "seed")
        refuse_missing(self.log_to)
        if self.rows_per_step < self.micro_batches:
            raise RunError(
                f"rows_per_step={self.rows_per_step} is fewer than micro_batches={self.micro_batches}; "
                f"every micro-batch needs a row: use --micro-batches {self.rows_per_step} or fewer"
            )
        _equal_micro_batches(self, "rows_per_step", self.rows_per_step, self.micro_batches)
        if Path(self.run).name != self.run or self.run == LATEST:
            raise RunError(f"run={self.run!r} is not a plain name; put the folder of the runs into --runs-folder")

    @property
    def after_a_death(self) -> str:
        """The command that resumes the run, as the end of the message that a rank died."""
        elsewhere = f" --runs-folder {self.runs_folder}" if self.runs_folder != "runs" else ""
        return f"; if it had made a checkpoint, go on from it with: longspan train --resume {self.run}".rstrip() + elsewhere


@dataclass(frozen=True)
class Evaluate(Ranks):
    """Settings of ``longspan evaluate``: an evaluation on whole documents."""

    checkpoint: Positional[str] = LATEST
    """A run's name or folder, a checkpoint's folder, ``latest``, or a Hugging Face folder (an export, or hf:FOLDER)."""
    data: Annotated[tuple[str, ...], _default("the held-out documents of the run, or of Python's standard library")] = ()
    """Files, folders or globs to evaluate on."""
    text_field: str = "text"
    """The field of .jsonl and the column of .parquet that holds the text."""
    max_tokens: Annotated[int | None, _number(f"{MAX_TOKENS}, or what a model's positions reach")] = None
    """Documents are truncated to their first this many tokens."""
    documents: int = 8
    """How many documents, the longest first. Each is one forward pass over all ranks."""
    tensor: int = 1
    """Degree of tensor parallel; the ulysses degree is the number of ranks divided by it."""
    pipeline: int = 1
    """Degree of pipeline parallel; the ulysses degree is the number of ranks divided by it too."""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Compute dtype of the forward: auto is bf16 on a GPU, else fp32."""
    runs_folder: str = "runs"
    """Folder that holds the folders of all runs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        legal_folder(self.runs_folder)
        _at_least(self, 1, "documents", "tensor", "pipeline")
        _at_least(self, 2, "max_tokens")

    @property
    def local_ranks(self) -> int:
        return self.ranks if self.ranks is not None else max(2, self.tensor * self.pipeline)


@dataclass(frozen=True)
class Check(Layout):
    """Settings of ``longspan check``: a check of guarantee 1 on this machine."""

    dtype: Literal["fp64", "fp32", "bf16"] = "fp64"
    """fp64, fp32: every gradient against that of one device. bf16: the error pooled over 8 seeds against that of one device."""
    model: str = "tiny"
    """tiny, small, llama-1b, llama-8b or llama-70b: a decoder of that shape. hf:FOLDER: the Hugging Face model in FOLDER."""
    layers: Annotated[int | None, _number("the model's own")] = None
    """Number of layers; of a hf: model its first ones."""
    heads: Annotated[int | None, _number("the model's own")] = None
    """Number of query heads of a decoder."""
    kv_heads: Annotated[int | None, _number("the model's own")] = None
    """Number of key/value heads of a decoder."""
    tokens: int = 1_024
    """Tokens of one sequence."""
    rows: int = 2
    """Sequences of the batch, over all data replicas and micro-batches."""
    micro_batches: int = 1
    """Micro-batches whose gradients are accumulated; a pipeline works on several at a time."""
    seed: int = 0
    """Seed of parameters and batch."""
    json: Annotated[str | None, arg(help_behavior_hint="(default: none)", metavar="FILE")] = None
    """File for a certificate: model, layout, versions, and each line of the table as numbers."""

    def __post_init__(self) -> None:
        super().__post_init__()
        legal_model(self.model)
        _at_least(self, 1, "layers", "heads", "kv_heads", "rows", "micro_batches")
        _at_least(self, 2, "tokens")
        _equal_micro_batches(self, "rows", self.rows, self.micro_batches)
        _at_least(self, 0, "seed")
        _at_most(self, LARGEST_SEED, "seed")
        refuse_no_file("json", self.json)


def compute_dtype(dtype: Literal["auto", "fp32", "bf16"], device_type: str) -> Literal["fp32", "bf16"]:
    """``dtype``, or what "auto" means on a device: fp32 on the "cpu", bf16 on any accelerator."""
    if dtype == "auto":
        return "fp32" if device_type == "cpu" else "bf16"
    return dtype


def _legal_choices(config: Ranks) -> None:
    """Raise RunError if a setting with listed choices (a Literal) has another value."""
    for field in fields(config):
        value = getattr(config, field.name)
        if get_origin(field.type) is Literal and value not in get_args(field.type):
            raise RunError(f"{field.name}={value!r} is unknown; legal are {', '.join(map(str, get_args(field.type)))}")


def legal_model(name: str) -> None:
    """Raise RunError if ``name`` is neither a preset nor ``hf:FOLDER``."""
    if name not in PRESETS and not name.startswith("hf:"):
        raise RunError(f"model={name!r} is unknown; legal are {', '.join(PRESETS)}, and hf:FOLDER for a Hugging Face model")


def _equal_micro_batches(config: Layout, name: str, rows: int, micro_batches: int) -> None:
    """Raise LongspanError for micro-batches that the stages of a pipeline cannot take: they need one shape, in whole rounds."""
    if config.pipeline == 1:
        return
    if rows % micro_batches:
        raise RunError(
            f"{name}={rows} cannot be split into micro_batches={micro_batches} of one shape, which the stages of "
            f"pipeline={config.pipeline} need; use --{name.replace('_', '-')} {rows + -rows % micro_batches}, or another "
            f"--micro-batches"
        )
    config.stages.refuse_broken_rounds(config.pipeline, micro_batches)


def _at_least(config: Ranks, least: int, *names: str) -> None:
    """Raise RunError if one of the settings ``names`` is below ``least``; None is legal."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not value >= least:
            raise RunError(f"{name}={value} must be at least {least}")


def _at_most(config: Ranks, most: int, *names: str) -> None:
    """Raise RunError if one of the settings ``names`` is above ``most``; None is legal."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value > most:
            raise RunError(f"{name}={value} must be at most {most}")


def _finite(config: Ranks, *names: str) -> None:
    """Raise RunError if one of the settings ``names`` is infinite; None is legal."""
    for name in names:
        value = getattr(config, name)
        if value is not None and math.isinf(value):
            raise RunError(f"{name}={value} must be finite")


def _above(config: Ranks, bound: int, *names: str) -> None:
    """Raise RunError if one of the settings ``names`` is not above ``bound``; None is legal."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not value > bound:
            raise RunError(f"{name}={value} must be above {bound}")
