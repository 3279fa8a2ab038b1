"""``longspan train``: the training loop, from the text to the last checkpoint and the exported model.

    text -> my tokens of a step -> sync_batches -> forward_backward (of all micro-batches) -> clip -> read -> update -> record
                 ^                                                                             |                         |
                 +------------------ those of the next step, while the device computes --------+                         |
                                                                                                                         |
                                      runs/NAME/  config.json  metrics.jsonl  events.*  checkpoints/  <------------------+
                                                  export/, where the model came from a Hugging Face folder

The host waits for the device once a step, where it reads the loss and the gradient norm. Before that it reads the next step's
tokens and starts their copy to the device; the ranks agree on them when their step begins.

Data order, learning rate and evaluation are functions of the step, so on a CPU a resumed run equals an uninterrupted one bit by
bit.
"""

import math
import os
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from longspan.batch.agreement import sync_batches
from longspan.batch.context import Part
from longspan.batch.shard import on_device
from longspan.cli import checkpoint, model_source
from longspan.cli.config import Train, compute_dtype
from longspan.cli.metrics import Display, Journal, Record, fullest_rank_bytes, measured_peak_flops, memory_table, peak_bytes
from longspan.cli.model_source import ModelSource, without_balance_loss
from longspan.cli.run_folder import open_run
from longspan.cli.summary import closing, memory_heading, opening
from longspan.data.loader import Loader
from longspan.data.packing import Corpus, tokenize
from longspan.data.tokenizers import load as load_tokenizer
from longspan.distributed.collectives import CountingTransport, TorchTransport
from longspan.distributed.consensus import raise_first_error, raise_together, refuse_difference, refuse_other_settings
from longspan.distributed.grad_norm import clip_grad_norm_
from longspan.distributed.mesh import ParallelMesh
from longspan.errors import LongspanError, RunError
from longspan.memory.profiler import Recorded
from longspan.parallelize import forward_backward, parallelize

DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16}
FINAL_RATE = 0.1
"""The cosine decay ends at this fraction of the peak learning rate."""
LAST_STEPS = 10
"""The training loss that is printed at the end is the mean over this many last steps."""


def work(config: Train) -> int:
    """Run the training of this rank: tokenize the text, train, write checkpoints and metrics, export the model.

    Returns:
        The exit code 0.

    Raises:
        LongspanError: settings, text, model or layout that cannot be used, a diverged loss, or a failed write; raised on
            every rank with the same text.
    """
    if config.deterministic:
        _use_deterministic_algorithms()
    transport = CountingTransport(TorchTransport())
    mesh = ParallelMesh(
        config.ulysses, config.ring, tensor=config.tensor, pipeline=config.pipeline, transport=transport, timeout=config.timeout
    )
    refuse_other_settings(config.common(), mesh.world_group)
    config = replace(config, dtype=compute_dtype(config.dtype, mesh.device.type))
    lead = dist.get_rank() == 0
    with raise_together(mesh.world_group):
        source = model_source.from_name(config.model)
        config = replace(config, tokenizer=config.tokenizer or source.tokenizer)
        corpus = tokenize(config.data, load_tokenizer(config.tokenizer), text_field=config.text_field)
        source = source.for_text(config.tokenizer, corpus.vocab_size).for_training(config.tokens, config.rope_scaling)
        loader = _loader(corpus, config, mesh)
        config = _for_epochs(config, loader.sequences)
        _refuse_idle_replicas(config, mesh)
        held_out = _held_out(corpus, config, mesh)
    refuse_difference("the text", corpus.fingerprint, mesh.world_group, "give every machine the same files and tokenizer")
    model = _on(mesh, source.build(config.seed, config.zero))
    model = parallelize(model, mesh, zero=config.zero, memory=config.memory, pipeline=config.stages)
    optimizer = _optimizer(model, config)
    run = open_run(config, mesh)
    done = _resume(run, model, optimizer, source, corpus, config, mesh)
    flops_per_token = source.flops_per_token(config.tokens)
    peak_flops = measured_peak_flops(mesh, DTYPE[config.dtype])
    journal = Journal(run, done, lead, config.log_to, asdict(config))
    losses, eval_loss = [], math.nan
    watched = Recorded(model, optimizer, mesh.device)
    reported = min(done + 2, config.steps) if config.memory_report and lead else 0
    fetched = _fetch(loader, done + 1, mesh)

    with journal, Display(run.name, config.steps, done, lead) as display:
        display.say(opening(source, corpus, loader, config, mesh, done))
        for step in range(done + 1, config.steps + 1):
            started, sent_before = time.perf_counter(), transport.traffic.bytes
            rate = learning_rate(step, config)
            with watched if step == reported else nullcontext():
                parts = _agree(fetched, journal, mesh)
                with _computing_in(config, mesh):
                    step_loss = forward_backward(model, parts)
                norm = clip_grad_norm_(model, config.clip_norm)
                if step < config.steps:
                    fetched = _fetch(loader, step + 1, mesh)
                loss, grad_norm = _read(step_loss, norm)
                _refuse_divergence(step, loss, grad_norm)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                optimizer.step()
                optimizer.zero_grad()

            seconds = time.perf_counter() - started
            tokens_per_s = config.rows_per_step * config.tokens / seconds
            record: Record = {
                "step": step,
                "loss": loss,
                "grad_norm": grad_norm,
                "learning_rate": rate,
                "tokens_per_s": tokens_per_s,
                "peak_share": tokens_per_s * flops_per_token / peak_flops,
                "memory_bytes": fullest_rank_bytes(mesh),
                "exchanged_bytes": transport.traffic.bytes - sent_before,
            }
            losses.append(loss)
            journal.write(record)
            display.show(record, peak_flops)
            if _is_due(step, config.eval_every_steps, config):
                eval_loss = evaluate(model, held_out, config, mesh)
                journal.write({"step": step, "eval_loss": eval_loss})
                display.say(f"{run.name}  step {step}: held-out loss {eval_loss:.4f}")
            if _is_due(step, config.checkpoint_every_steps, config):
                facts = _facts(step, source, corpus, config)
                checkpoint.save(run, step, model, optimizer, facts, mesh, config.keep_checkpoints)
            if step == reported:
                journal.write_memory(watched.timeline, *memory_heading(run.name, step, source, config, mesh))
                process_bytes = peak_bytes(mesh.device) if mesh.device.type == "cpu" else None
                display.say(memory_table(watched.timeline, step, process_bytes))
    raise_first_error(journal.fault, mesh.world_group)
    exported = source.export(model, run / "export", config.tokenizer, mesh)
    display.say(closing(run, losses[-LAST_STEPS:], eval_loss, corpus, config, exported))
    return 0


def _use_deterministic_algorithms() -> None:
    """Let PyTorch use deterministic algorithms in this process; an operator that has none raises PyTorch's error."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when its first handle is made
    torch.use_deterministic_algorithms(True)


def _read(loss: Tensor, norm: Tensor) -> tuple[float, float]:
    """The step's loss and its gradient norm, in one copy to the host."""
    on_host, grad_norm = torch.stack([loss.double(), norm.to(loss.device, torch.float64)]).tolist()
    return on_host, grad_norm


def learning_rate(step: int, config: Train) -> float:
    """The learning rate of ``step`` (from 1): linear warm-up to the peak, cosine decay to a tenth of it at ``decay_steps``."""
    if step <= config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    last = config.decay_steps or config.steps
    progress = min(1.0, (step - config.warmup_steps) / max(1, last - config.warmup_steps))
    cosine = (1 + math.cos(math.pi * progress)) / 2
    return config.learning_rate * (FINAL_RATE + (1 - FINAL_RATE) * cosine)


@torch.no_grad()
def evaluate(model: nn.Module, held_out: Loader, config: Train, mesh: ParallelMesh) -> float:
    """Mean cross-entropy, in nats per token, of the first ``eval_rows`` sequences of ``held_out``, equal on every rank. Every
    rank must call it."""
    parts = sync_batches(held_out.epoch(config.eval_rows, rounds=mesh.coordinate.pipeline), mesh)
    parts = [without_balance_loss(model, part) for part in parts]
    with _computing_in(config, mesh):
        return forward_backward(model, [on_device(part, mesh.device) for part in parts]).item()


def _loader(corpus: Corpus, config: Train, mesh: ParallelMesh) -> Loader:
    """The Loader of the training part of ``corpus``, with rows, micro-batches and seed from the settings."""
    return Loader(
        corpus.train,
        tokens=config.tokens,
        rows=config.rows_per_step,
        seed=config.seed,
        coordinate=mesh.coordinate,
        micro_batches=config.micro_batches,
    )


def _for_epochs(config: Train, sequences: int) -> Train:
    """A copy of ``config`` in which ``epochs`` is replaced by ``steps``, rounded up; ``config`` itself if ``epochs`` is None.

    An epoch is ``sequences`` sequences of the text.
    """
    if config.epochs is None:
        return config
    return replace(config, steps=math.ceil(config.epochs * sequences / config.rows_per_step), epochs=None)


def _refuse_idle_replicas(config: Train, mesh: ParallelMesh) -> None:
    """Raise RunError if every micro-batch has fewer rows than there are data replicas: some replica would never have a row."""
    c, rows = mesh.coordinate, math.ceil(config.rows_per_step / config.micro_batches)
    if rows >= c.data:
        return
    ranks = mesh.world_group.size()
    axes = ["ulysses", "ring", "tensor"] + ["pipeline"] * (c.pipeline > 1)
    given = [f"{axis}={getattr(c, axis)}" for axis in axes]
    raise RunError(
        f"{ranks} ranks with {', '.join(given[:-1])} and {given[-1]} are {c.data} data replicas, and "
        f"rows_per_step={config.rows_per_step} gives a micro-batch {rows} row{'s' * (rows > 1)}, so that a replica would never "
        f"have one; use --rows-per-step {c.data * config.micro_batches} or more, or one replica: --ranks {ranks // c.data}, "
        f"or --{', --'.join(axes[:-1])} and --{axes[-1]} whose product is {ranks}"
    )


def _held_out(corpus: Corpus, config: Train, mesh: ParallelMesh) -> Loader:
    """The Loader of the evaluation, over the held-out part of ``corpus``: one row per data replica at a time.

    If that is shorter than ``config.tokens``, its one sequence is all of it.

    Raises:
        RunError: it is one token, which no other one predicts.
    """
    if corpus.held_out.tokens < 2:
        raise RunError(
            f"the text has {corpus.train.tokens + corpus.held_out.tokens} tokens, and the twentieth that is held out would be "
            f"one token, which has no loss; give --data of 40 tokens or more"
        )
    tokens = min(config.tokens, corpus.held_out.tokens)
    return Loader(corpus.held_out, tokens=tokens, rows=mesh.coordinate.data, seed=config.seed, coordinate=mesh.coordinate)


@dataclass(frozen=True, kw_only=True)
class _Fetched:
    """This rank's micro-batches of a step on its device, before ``sync_batches``; or the error that it met instead."""

    parts: list[Part]
    error: LongspanError | None = None


def _fetch(loader: Loader, step: int, mesh: ParallelMesh) -> _Fetched:
    """Read this rank's micro-batches of ``step`` (from 1) and start their copy to its device. No collective, no wait.

    An error (of its text, its disk) is kept for ``_agree``: the step before may still be computing.
    """
    try:
        return _Fetched(parts=[on_device(part, mesh.device) for part in loader.step(step - 1)])
    except LongspanError as error:
        return _Fetched(parts=[], error=error)


def _agree(fetched: _Fetched, journal: Journal, mesh: ParallelMesh) -> list[Part]:
    """The micro-batches of a step after ``sync_batches``. Every rank must call it.

    An error of one rank (``fetched.error``, ``journal.fault``) is raised on all ranks.
    """
    return sync_batches(fetched.parts, mesh, error=journal.fault or fetched.error)


def _on(mesh: ParallelMesh, model: nn.Module) -> nn.Module:
    """``model`` moved to the mesh's device; a model on the meta device unchanged: ``parallelize`` loads its weights later."""
    return model if any(parameter.is_meta for parameter in model.parameters()) else model.to(mesh.device)


def _computing_in(config: Train, mesh: ParallelMesh) -> torch.autocast:
    """Context manager: autocast to bf16 if ``config.dtype`` is bf16; parameters, gradients and the update stay fp32."""
    return torch.autocast(mesh.device.type, torch.bfloat16, enabled=config.dtype == "bf16")


def _optimizer(model: nn.Module, config: Train) -> torch.optim.Optimizer:
    """The optimizer that the settings ask for; matrices are decayed, vectors (norms, biases) are not."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    norms = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": norms, "weight_decay": 0.0}]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.learning_rate)
    fused = True if matrices[0].device.type == "cuda" else None  # one launch for many parameters; None is PyTorch's default
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95), fused=fused)


def _refuse_divergence(step: int, loss: float, grad_norm: float) -> None:
    """Raise RunError if the loss or the gradient norm of ``step`` is not finite."""
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise RunError(
            f"the run diverged at step {step}: loss {loss}, gradient norm {grad_norm}; start another run with a lower "
            f"--learning-rate or more --warmup-steps"
        )


def _is_due(step: int, every: int, config: Train) -> bool:
    """Whether ``step`` is a multiple of ``every`` (0: never), or the last step of the run."""
    return step == config.steps or (every > 0 and step % every == 0)


def _resume(
    run: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    source: ModelSource,
    corpus: Corpus,
    config: Train,
    mesh: ParallelMesh,
) -> int:
    """With ``--resume``, load model and optimizer from the run's newest checkpoint, in place. Every rank must call it.

    Args:
        run: the folder of the run.
        model, optimizer: what is loaded.
        source, corpus, config: model, text and settings of this run, which must be those of the checkpoint.
        mesh: the ranks.

    Returns:
        The number of steps that are done; 0 without ``--resume`` or without a checkpoint.

    Raises:
        RunError: the checkpoint is damaged or of another model, text or optimizer, or its steps are all done.
    """
    with raise_together(mesh.world_group):
        path = checkpoint.newest(run) if config.resume else None
    if path is None:
        return 0
    with raise_together(mesh.world_group):
        theirs, mine = checkpoint.facts(path), _facts(0, source, corpus, config)
        for what in ("model", "text", "optimizer"):
            checkpoint.refuse_differences(path, what, theirs.get(what, {}), mine[what])
        done: int = theirs["step"]
        if done >= config.steps:
            raise RunError(f"the run {run} has done its {done} steps; go further with --steps, or start another one")
    checkpoint.load(path, model, optimizer)
    return done


def _facts(step: int, source: ModelSource, corpus: Corpus, config: Train) -> dict[str, Any]:
    """What a checkpoint's ``run.json`` holds after ``step`` steps: step, model, text, optimizer and all settings, as JSON
    values.

    The position in the text is not stored, because it is a function of the step.
    """
    return {
        "step": step,
        "model": source.described(),
        "text": {
            "corpus": corpus.fingerprint,
            "vocab": corpus.vocab_size,
            "tokens": config.tokens,
            "rows_per_step": config.rows_per_step,
            "seed": config.seed,
        },
        "optimizer": {"optimizer": config.optimizer},
        "config": asdict(config),
    }
