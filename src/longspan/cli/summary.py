"""Texts that a run prints: layout, model and data before its first step; losses and files after its last.

They are only formatted here, and computed elsewhere. The progress between them is in metrics.py.
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
from longspan.distributed.coordinate import MeshCoordinate
from longspan.distributed.mesh import AXES, BASIC, ParallelMesh


def opening(source: ModelSource, corpus: Corpus, loader: Loader, config: Train, mesh: ParallelMesh, done: int) -> str:
    """Layout; ranks by host and axis; model; files, documents and tokens of the text; tokens, epochs and steps that are left.

    Args:
        source: the model.
        corpus: the text.
        loader: gives the number of sequences, for the epochs.
        config: the settings of the run.
        mesh: the ranks.
        done: the steps that were done before a resume; 0 in a new run.
    """
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
            f"{count(mesh.world_group.size(), 'rank')} = {degrees(c)}; "
            f"{config.tokens:,} tokens a sequence, {config.tokens // c.sequence_ranks:,} of them a rank",
            mesh.rank_map,
            f"model  {source.summary}",
            f"text   {found}, {split}{skipped}",
            f"run    {seen * config.tokens:,} tokens, {seen / loader.sequences:.3g} epochs: {length}{kept}",
        ]
    )


def closing(run: Path, losses: list[float], eval_loss: float, corpus: Corpus, config: Train, exported: bool) -> str:
    """The text that ``train`` prints last: losses in nats a token and bits a byte, the files that it wrote, the commands to run
    next.

    Args:
        run: the run's folder.
        losses: the training losses of the last steps, whose mean is shown.
        eval_loss: the last held-out loss.
        corpus: the text, for bytes per token and byte entropy.
        config: the settings of the run.
        exported: whether ``export/`` was written.
    """
    per_byte = 1 / corpus.bytes_per_token
    learned = [
        (f"loss, last {count(len(losses), 'step')}", sum(losses) / len(losses)),
        ("loss, held-out text", eval_loss),
        ("byte frequencies alone", corpus.byte_entropy / per_byte),
    ]
    lines = [f"  {what:<24}{loss:7.4f} nats a token {bits(loss * per_byte):8.4f} bits a byte" for what, loss in learned]
    ours = "longspan" if shutil.which("longspan") else sys.argv[0]
    where = "" if config.runs_folder == "runs" else f" --runs-folder {config.runs_folder}"
    degrees = {"tensor": config.tensor, "pipeline": config.pipeline}
    ranks = config.ulysses * config.tensor * config.pipeline
    flags = "".join(f" --{axis} {degree}" for axis, degree in degrees.items() if degree > 1)
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
            f"  {ours} evaluate {run.name} --ranks {ranks}{flags}{where}",
            f"  {Path(ours).with_name('tensorboard')} --logdir {config.runs_folder}",
        ]
    )


def memory_heading(run: str, step: int, source: ModelSource, config: Train, mesh: ParallelMesh) -> tuple[str, str]:
    """(title, about) of the memory page: one line with run, rank and step; three lines with layout, options and model."""
    c = mesh.coordinate
    options = {"zero": config.zero, "dtype": config.dtype, "optimizer": config.optimizer} | asdict(config.memory)
    about = (
        f"{degrees(c)}; {count(config.rows_per_step, 'sequence')} of {config.tokens:,} "
        f"tokens in {count(config.micro_batches, 'micro-batch')}",
        ", ".join(f"{name}={value}" for name, value in options.items()),
        source.summary,
    )
    return f"{run}: memory of rank 0 of {mesh.world_group.size()} in step {step}", "\n".join(about)


def degrees(coordinate: MeshCoordinate) -> str:
    """The degrees of a mesh as text: "data 1 x ring 1 x ulysses 2", and the other axes where their degree is above 1."""
    sizes = {axis.name: getattr(coordinate, axis.name) for axis in AXES}
    return " x ".join(f"{name} {size}" for name, size in sizes.items() if name in BASIC or size > 1)


def _files(counts: dict[str, int]) -> str:
    """Numbers of files by ending as text: {".txt": 10, ".md": 2} gives "12 files (10 .txt, 2 .md)"."""
    return f"{count(sum(counts.values()), 'file')} ({', '.join(f'{number:,} {ending}' for ending, number in counts.items())})"


def count(number: int, what: str) -> str:
    """``number`` and ``what`` in the singular or plural: "1 rank", "2 ranks", "2 batches"."""
    return f"{number:,} {what}{'' if number == 1 else 'es' if what.endswith('ch') else 's'}"
