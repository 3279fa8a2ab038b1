"""``longspan evaluate``: loss and perplexity of whole documents, one sequence-parallel forward pass each.

The model is a checkpoint of a run, the export of a run, or any Hugging Face folder.

document   |<---- tokens, up to --max-tokens ---->|
             rank 0   |   rank 1   |   rank 2           --forward-->   its loss, the same on every rank
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from rich.table import Table

from longspan.batch.agreement import sync_batches
from longspan.batch.shard import on_device
from longspan.cli import checkpoint, model_source
from longspan.cli.config import MAX_TOKENS, Evaluate, compute_dtype
from longspan.cli.metrics import output
from longspan.cli.model_source import ModelSource, without_balance_loss
from longspan.cli.settings_file import read_file
from longspan.cli.summary import count
from longspan.data.corpora import STANDARD_LIBRARY
from longspan.data.loader import part
from longspan.data.packing import Corpus, Split, bits, tokenize
from longspan.data.tokenizers import load as load_tokenizer
from longspan.distributed.consensus import raise_together, refuse_other_settings
from longspan.distributed.mesh import ParallelMesh
from longspan.errors import DataError, LayoutError, ModelError, RunError
from longspan.parallelize import forward_backward, parallelize


class DocumentLoss(NamedTuple):
    """The loss of one document, a row of the table.

    Attributes:
        number: its place in the text, from 0.
        begins: up to 32 characters of its beginning, each run of whitespace as one space.
        tokens: how many of its tokens were read.
        loss: their mean loss in nats.
    """

    number: int
    begins: str
    tokens: int
    loss: float


@dataclass(frozen=True)
class Found:
    """The model to evaluate, and what belongs to it, as ``_find`` returns it.

    Attributes:
        name: for the title.
        source: how to build it.
        checkpoint: the folder of the weights; None if ``source`` reads them.
        tokenizer: as ``tokenizers.load`` takes it.
        data: the default text; () for the standard library.
        vocab: the vocabulary size in training; None if unknown.
    """

    name: str
    source: ModelSource
    checkpoint: Path | None
    tokenizer: str
    data: tuple[str, ...]
    vocab: int | None


@torch.no_grad()
def work(config: Evaluate) -> int:
    """Evaluate on this rank and print the table on rank 0.

    Returns:
        The exit code 0.

    Raises:
        LongspanError: a checkpoint, text or number of ranks that cannot be used; raised on every rank with the same text.
    """
    ulysses = max(1, dist.get_world_size() // (config.tensor * config.pipeline))
    mesh = ParallelMesh(ulysses, tensor=config.tensor, pipeline=config.pipeline, timeout=config.timeout)
    refuse_other_settings(config.common(), mesh.world_group)
    config = replace(config, dtype=compute_dtype(config.dtype, mesh.device.type))
    with raise_together(mesh.world_group):
        found = _find(config)
        tokenizer = load_tokenizer(found.tokenizer)
        corpus = tokenize(config.data or found.data, tokenizer, text_field=config.text_field)
        text = corpus.whole if config.data else corpus.held_out
        source = found.source.for_text(found.tokenizer, corpus.vocab_size)
        _refuse_another_vocabulary(corpus, found)
        _refuse_more_ranks_than_heads(source, mesh)
        chosen = _longest(text, _max_tokens(config, source), config.documents, mesh)
    model = parallelize(source.build(0).to(mesh.device).eval(), mesh)
    if found.checkpoint is not None:
        checkpoint.load(found.checkpoint, model)

    losses = []
    for number, start, tokens in chosen:
        (mine,) = sync_batches([part(text, [start], tokens, _my_tokens(tokens, mesh))], mesh)
        with torch.autocast(mesh.device.type, torch.bfloat16, enabled=config.dtype == "bf16"):
            loss = forward_backward(model, [on_device(without_balance_loss(model, mine), mesh.device)]).item()
        begins = tokenizer.decode(text.read(start, start + min(tokens, 48)).numpy())
        losses.append(DocumentLoss(number, " ".join(begins.split())[:32], tokens, loss))
    if dist.get_rank() == 0:
        of = f"{'' if config.data else 'held-out '}documents of {', '.join(config.data or found.data) or STANDARD_LIBRARY}"
        over = count(mesh.world_group.size(), "rank")
        _print(f"{found.name}, {config.dtype}, {of}, each document over {over}", losses, corpus)
    return 0


def _find(config: Evaluate) -> Found:
    """The checkpoint or the Hugging Face folder (hf:FOLDER, or its path) that ``config.checkpoint`` names.

    Raises:
        LongspanError: there is neither, or the Hugging Face folder has no weights.
    """
    folder = Path(config.checkpoint.removeprefix(model_source.FOLDER)).expanduser()
    if config.checkpoint.startswith(model_source.FOLDER) or model_source.is_model_folder(folder):
        source = model_source.from_name(f"{model_source.FOLDER}{folder}")
        if not source.trained:
            raise ModelError(f"the folder '{folder}' holds no weights, only a config; name one that holds *.safetensors")
        return Found(str(folder), source, None, source.tokenizer, _text_of_run(folder.parent), None)
    path = checkpoint.find(config.checkpoint, config.runs_folder)
    facts = checkpoint.facts(path, ("config", "model"))
    trained, source = facts["config"], model_source.from_description(facts["model"])
    return Found(str(path), source, path, trained["tokenizer"], tuple(trained["data"]), facts["text"]["vocab"])


def _text_of_run(run: Path) -> tuple[str, ...]:
    """The setting ``data`` (files, folders or globs) of the run in the folder ``run``; () if that is not the folder of a run.

    With it an export, which is inside the folder of its run, is evaluated on the same text as the run's checkpoints.
    """
    try:
        return tuple(read_file(str(run / "config.json"))["data"])
    except (RunError, KeyError):
        return ()


def _max_tokens(config: Evaluate, source: ModelSource) -> int:
    """The limit of tokens per document: ``--max-tokens``, or by default the smaller of MAX_TOKENS and the model's longest row.

    Raises:
        ModelError: ``--max-tokens`` is more than the model's longest row (``ModelSource.reach``).
    """
    most = MAX_TOKENS if source.reach is None else source.reach
    if config.max_tokens is None:
        return min(MAX_TOKENS, most)
    if source.reach is not None and config.max_tokens > source.reach:
        raise ModelError(
            f"max_tokens={config.max_tokens} is more than the {source.reach} that the model's RoPE reaches "
            f"(max_position_embeddings in its config.json); use --max-tokens {source.reach} or fewer"
        )
    return config.max_tokens


def _longest(text: Split, max_tokens: int, documents: int, mesh: ParallelMesh) -> list[tuple[int, int, int]]:
    """The longest documents of ``text``, the longest first.

    Args:
        text: the documents.
        max_tokens: how many tokens of a document are read at most.
        documents: how many documents.
        mesh: the ranks, each of which needs a token.

    Returns:
        (its number, its first token in the text, the number of tokens read) of each.

    Raises:
        DataError: one of them, or the limit of tokens, is below the number of ranks of a sequence or below 2.
    """
    bounds = [(number, int(start), int(stop - start)) for number, (start, stop) in enumerate(text.documents)]
    chosen = sorted(bounds, key=lambda bound: -bound[2])[:documents]
    ranks = mesh.coordinate.sequence_ranks
    least = max(2, ranks)
    for number, _, tokens in chosen:
        if tokens < least:
            raise DataError(
                f"document {number} has {tokens} tokens, fewer than the {least} that {ranks} ranks need; "
                f"use fewer --documents (the longest come first), fewer --ranks, or longer text"
            )
    if max_tokens < least:
        raise DataError(f"max_tokens={max_tokens} is too few for {ranks} ranks; use --max-tokens {least} or more")
    return [(number, start, min(tokens, max_tokens)) for number, start, tokens in chosen]


def _refuse_another_vocabulary(corpus: Corpus, found: Found) -> None:
    """Raise RunError if the tokenizer of the text ``corpus`` has another number of tokens than the model was trained with."""
    if found.vocab is not None and corpus.vocab_size != found.vocab:
        raise RunError(
            f"the tokenizer {corpus.tokenizer} has {corpus.vocab_size} tokens now, and the checkpoint was trained with "
            f"{found.vocab}; bring back the tokenizer that it was trained with"
        )


def _refuse_more_ranks_than_heads(source: ModelSource, mesh: ParallelMesh) -> None:
    """Raise LayoutError if there are more ranks of a sequence than query heads, over which they split each document."""
    ranks, stages = mesh.coordinate.sequence_ranks, mesh.coordinate.pipeline
    if ranks > source.heads:
        raise LayoutError(
            f"{ranks} ranks cannot share the model's {source.heads} query heads, and each document lies on all ranks"
            f"{' of a stage' * (stages > 1)}; use --ranks {source.heads * stages} or fewer"
        )


def _my_tokens(tokens: int, mesh: ParallelMesh) -> tuple[range, ...]:
    """The positions that this rank holds of a document of ``tokens`` tokens."""
    return mesh.coordinate.my_positions(tokens)


def _print(title: str, losses: list[DocumentLoss], corpus: Corpus) -> None:
    """Print the table of losses with a line for all documents together, and the loss in bits a byte."""
    predicted = sum(document.tokens - 1 for document in losses)
    loss = sum(document.loss * (document.tokens - 1) for document in losses) / predicted
    table = Table("document", "begins", box=None, pad_edge=False)
    for name in ("tokens", "nats a token", "perplexity"):
        table.add_column(name, justify="right")
    for number, begins, tokens, own in losses:
        table.add_row(str(number), begins, f"{tokens:,}", f"{own:.4f}", f"{math.exp(own):,.3f}")
    table.add_section()
    tokens = sum(document.tokens for document in losses)
    table.add_row("all", "", f"{tokens:,}", f"{loss:.4f}", f"{math.exp(loss):,.3f}")
    console = output(120)
    console.print(title, highlight=False, markup=False, soft_wrap=True)
    console.print(table, highlight=False, markup=False)
    console.print(
        f"all: {bits(loss / corpus.bytes_per_token):.4f} bits a byte; "
        f"byte frequencies alone: {bits(corpus.byte_entropy):.4f} bits a byte",
        highlight=False,
    )
