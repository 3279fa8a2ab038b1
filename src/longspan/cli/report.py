"""What a run prints: the layout, the text and the model before its first step; losses and files after its last.

Knows numbers and names; the progress between them is in metrics.py.
"""

import shutil
import sys
from dataclasses import asdict
from pathlib import Path

from longspan.cli.config import Train
from longspan.cli.metrics import MEMORY
from longspan.cli.model_source import ModelSource
from longspan.data.loader import Loader
from longspan.data.packing import Corpus, bits
from longspan.distributed.mesh import ParallelMesh


def opening(source: ModelSource, corpus: Corpus, loader: Loader, config: Train, mesh: ParallelMesh, done: int) -> str:
    """The layout, the model, the text that was found, and how much of it the run sees. ``done``: the steps before a resume."""
    c, steps = mesh.coordinate, config.steps - done
    found = f"{_files(corpus.files)}, {count(len(corpus.whole.documents), 'document')}"
    split = f"{corpus.train.tokens:,} tokens to train on, {corpus.held_out.tokens:,} held out"
    skipped = f"; skipped {_files(corpus.skipped)} of other kinds" if corpus.skipped else ""
    seen = steps * config.rows_per_step
    length = f"{count(steps, 'step')} of {count(config.rows_per_step, 'sequence')}" + f"; going on after step {done}" * (
        done > 0
    )
    bent = config.decay_steps not in (None, config.steps)
    kept = f"; the learning rate keeps its decay over {config.decay_steps} steps" * bent
    return "\n".join(
        [
            f"{count(mesh.world_group.size(), 'rank')} = data {c.data} x ring {c.ring} x ulysses {c.ulysses}; "
            f"{config.tokens:,} tokens a sequence, {config.tokens // c.sequence_ranks:,} of them a rank",
            f"model  {source.summary}",
            f"text   {found}, {split}{skipped}",
            f"run    {seen * config.tokens:,} tokens, {seen / loader.sequences:.3g} epochs: {length}{kept}",
        ]
    )


def closing(run: Path, losses: list[float], eval_loss: float, corpus: Corpus, config: Train, exported: bool) -> str:
    """The losses of the run, the files that it wrote, and the commands to run next."""
    per_byte = 1 / corpus.bytes_per_token
    learned = [
        (f"loss, last {count(len(losses), 'step')}", sum(losses) / len(losses)),
        ("loss, held-out text", eval_loss),
        ("byte frequencies alone", corpus.byte_entropy / per_byte),
    ]
    lines = [f"  {what:<24}{loss:7.4f} nats a token {bits(loss * per_byte):8.4f} bits a byte" for what, loss in learned]
    ours = "longspan" if shutil.which("longspan") else sys.argv[0]
    where = "" if config.runs_folder == "runs" else f" --runs-folder {config.runs_folder}"
    return "\n".join(
        [
            "",
            "Learned",
            *lines,
            f"Kept in {run}",
            f"  checkpoints/step-{config.steps:06d}, metrics.jsonl, config.json, TensorBoard events"
            + f", {MEMORY}" * (run / MEMORY).exists()
            + ", and export/: the model for from_pretrained" * exported,
            "Next",
            f"  {ours} evaluate {run.name} --ranks {config.ulysses}{where}",
            f"  {Path(ours).with_name('tensorboard')} --logdir {config.runs_folder}",
        ]
    )


def memory_heading(run: str, step: int, source: ModelSource, config: Train, mesh: ParallelMesh) -> tuple[str, str]:
    """The lines above the memory page: run, step and rank; below them layout, memory options and model."""
    c = mesh.coordinate
    options = {"zero": config.zero, "dtype": config.dtype, "optimizer": config.optimizer} | asdict(config.memory)
    about = (
        f"data {c.data} x ring {c.ring} x ulysses {c.ulysses}; {count(config.rows_per_step, 'sequence')} of {config.tokens:,} "
        f"tokens in {count(config.micro_batches, 'micro-batch')}",
        ", ".join(f"{name}={value}" for name, value in options.items()),
        source.summary,
    )
    return f"{run}: memory of rank 0 of {mesh.world_group.size()} in step {step}", "\n".join(about)


def _files(counts: dict[str, int]) -> str:
    """As in: 12 files (10 .txt, 2 .md)"""
    return f"{count(sum(counts.values()), 'file')} ({', '.join(f'{number:,} {ending}' for ending, number in counts.items())})"


def count(number: int, what: str) -> str:
    """A number of things: 1 rank, 2 ranks."""
    return f"{number:,} {what}{'' if number == 1 else 'es' if what.endswith('ch') else 's'}"
