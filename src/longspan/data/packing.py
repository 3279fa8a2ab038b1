"""Packing: documents tokenized once into one memory-mapped token stream. Independent of sequences, ranks and their order.

    documents     [def f...]   [import os...]   [class A...]
    stream        d e f ... EOS i m p ... EOS c l a ... EOS          tokens.bin: uint8, uint16 or int32, as the vocabulary needs
    train         |<---------->|            |<------------>|         a split concatenates some documents of the stream
    held out                   |<---------->|

The stream is cached under a hash of the files' contents, the tokenizer and this format: the same text is never tokenized
twice, and changed text is never read from an old stream. Files count as unchanged by their paths, sizes and modification
times; where one changed within the last seconds, the contents are hashed.
"""

import hashlib
import json
import math
import os
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int64, Integer
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from longspan.data import cache, corpora
from longspan.data.corpora import Document, Source
from longspan.data.tokenizers import Tokenizer
from longspan.errors import DataError

FORMAT = 1
TOKENS, FACTS = "tokens.bin", "corpus.json"

HELD_OUT = 20
"""One document in this many is held out, chosen by the hash of its content."""

BATCH_BYTES = 8 << 20
"""Bytes of text that are tokenized in one call, in parallel on the tokenizer's threads; one step of the progress bar."""

SETTLED_SECONDS = 2.0
"""A file that changed less long ago could change again without a new modification time, because file systems round times."""

QUIET_SECONDS = 0.5
"""The progress bar appears only after this time."""

Bounds = Int64[np.ndarray, "_ 2"]
"""[documents, 2]: the first token of each document in a stream, and the token after its last."""


class Split:
    """Some documents of a token stream, concatenated: token 0 is the first token of the first document. A ``Stream`` for
    ``Loader``.

    Attributes:
        documents: the bounds of its documents in the split, each with its end-of-document token.

    Args:
        name: whole, train or held_out, for messages.
        stream: all tokens.
        bounds: the documents of this split, as bounds in ``stream``.
        fingerprint: of the tokens; splits with equal ones have equal tokens.
    """

    def __init__(self, name: str, stream: Integer[np.ndarray, "stream"], bounds: Bounds, fingerprint: str) -> None:
        self.name, self.fingerprint = name, fingerprint
        self._stream = stream
        ends = (bounds[:, 1] - bounds[:, 0]).cumsum()
        self.documents: Bounds = np.stack([np.concatenate([[0], ends[:-1]]), ends], 1)
        # Documents that are adjacent in the stream are read as one run: a long sequence of short documents is few reads.
        first = np.concatenate([[True], bounds[1:, 0] != bounds[:-1, 1]])
        self._run_starts = self.documents[first, 0]
        self._run_shifts = bounds[first, 0] - self._run_starts

    @property
    def tokens(self) -> int:
        """The number of tokens of the split, with one end-of-document token per document."""
        return int(self.documents[-1, 1])

    def read(self, start: int, stop: int) -> Int64[Tensor, "tokens"]:
        """The tokens ``start`` to ``stop - 1`` of the split; no other part of the stream is read from the disk."""
        assert 0 <= start <= stop <= self.tokens, (start, stop, self.tokens)
        first, last = np.searchsorted(self._run_starts, [start, stop], side="right") - 1
        cuts = [start, *self._run_starts[first + 1 : last + 1].tolist(), stop]
        shifts = self._run_shifts[first : last + 1].tolist()
        pieces = [self._stream[a + shift : b + shift] for a, b, shift in zip(cuts, cuts[1:], shifts)]
        return torch.from_numpy(np.concatenate(pieces, dtype=np.int64))


@dataclass(frozen=True)
class Corpus:
    """A tokenized text, as ``tokenize`` returns it.

    Attributes:
        fingerprint: corpora with equal ones have equal tokens.
        tokenizer: the name of its tokenizer.
        vocab_size, eos: every token id is below the first; the id of the end-of-document token.
        text_bytes: the size of the text.
        byte_entropy: the loss of a model that predicts every byte by its frequency alone, in nats per byte.
        whole: every document; ``train`` and ``held_out`` are disjoint parts of it.
        files, skipped: {ending: number} of the files that were read, and of those of other kinds in the same folders.
    """

    fingerprint: str
    tokenizer: str
    vocab_size: int
    eos: int
    text_bytes: int
    byte_entropy: float
    whole: Split
    train: Split
    held_out: Split
    files: dict[str, int]
    skipped: dict[str, int]

    @property
    def tokens(self) -> int:
        """The number of tokens of the stream, with one end-of-document token per document."""
        return self.whole.tokens

    @property
    def bytes_per_token(self) -> float:
        """``text_bytes / tokens``: a loss in nats per token divided by it is in nats per byte."""
        return self.text_bytes / self.tokens


def tokenize(
    sources: Sequence[str],
    tokenizer: Tokenizer,
    *,
    text_field: str = "text",
    folder: Path | None = None,
    console: Console | None = None,
) -> Corpus:
    """Tokenize the documents of ``sources``, or read their tokens from the cache.

    All ranks may call it at once: on each machine one process tokenizes, the others wait for it.

    Args:
        sources: files, folders and globs; empty: the Python standard library.
        tokenizer: text to tokens.
        text_field: the JSON field and Parquet column of the text.
        folder: the cache; None: ``cache.default_folder()``.
        console: where the progress is shown; None: stderr.

    Returns:
        The Corpus, its tokens memory-mapped from the cache.

    Raises:
        DataError: a source cannot be read or holds no text; the data changes while it is read; or the disk is full. Nothing
            incomplete is left.
    """
    found = corpora.find(sources)
    state, newest = _state(found)
    settled = newest < time.time() - SETTLED_SECONDS
    made_by = f"{FORMAT} {tokenizer.fingerprint} {text_field}"

    def make(draft: Path) -> None:
        _write(draft, found, text_field, tokenizer, console or Console(stderr=True))
        if _state(found)[0] != state:
            raise DataError("the data changed while it was read; run again when nobody writes to it")

    folder = folder or cache.default_folder()
    return _open(cache.kept(folder, _hash(made_by + state), lambda: _content(found, made_by), make, settled), found)


def hold_out(bounds: Bounds, hashes: Integer[np.ndarray, "documents"]) -> tuple[Bounds, Bounds]:
    """Divide a stream into (train, held out).

    Held out are the documents whose hash is divisible by HELD_OUT (20), so equal texts are in the same split. If these are
    less than half or more than double of a twentieth of the tokens (few documents, or a huge one), the last twentieth of the
    stream is held out instead, and a document may be divided.

    Args:
        bounds: the documents of the stream.
        hashes: a hash of each document's text.
    """
    held = hashes % HELD_OUT == 0
    tokens = int(bounds[-1, 1])
    if tokens <= int((bounds[held, 1] - bounds[held, 0]).sum()) * 2 * HELD_OUT <= 4 * tokens:
        return bounds[~held], bounds[held]
    cut = tokens - max(1, tokens // HELD_OUT)
    return _some(bounds.clip(max=cut)), _some(bounds.clip(min=cut))


def _some(bounds: Bounds) -> Bounds:
    """Those documents of ``bounds`` [documents, (start, stop)] that are not empty."""
    return bounds[bounds[:, 0] < bounds[:, 1]]


def _open(path: Path, found: Sequence[Source]) -> Corpus:
    """The Corpus in the cached folder ``path``, for the sources ``found``.

    Raises:
        DataError: the folder is damaged.
    """
    try:
        facts = json.loads((path / FACTS).read_bytes())
        stream = np.memmap(path / TOKENS, facts["dtype"], "r", shape=(facts["tokens"],))
        whole, train, held_out = (
            Split(name, stream, np.load(path / f"{name}.npy"), f"{path.name} {name}") for name in ("whole", "train", "held_out")
        )
        known = {name: facts[name] for name in ("tokenizer", "vocab_size", "eos", "text_bytes", "byte_entropy")}
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise DataError(f"the cached tokens in '{path}' are damaged; remove that folder and run again") from error
    files, skipped = (corpora.counts(file for source in found for file in getattr(source, of)) for of in ("files", "skipped"))
    return Corpus(fingerprint=path.name, **known, whole=whole, train=train, held_out=held_out, files=files, skipped=skipped)


def _write(draft: Path, found: Sequence[Source], text_field: str, tokenizer: Tokenizer, console: Console) -> None:
    """Tokenize the documents of ``found`` and write them into the folder ``draft``: tokens, bounds and facts, which ``_open``
    reads.

    Args:
        draft: an empty folder.
        found: the sources.
        text_field: the JSON field and Parquet column of the text.
        tokenizer: text to tokens.
        console: where the progress is shown.
    """
    lengths, hashes = array("q"), array("Q")
    frequencies = np.zeros(256, np.int64)
    dtype = _narrowest(tokenizer.vocab_size)
    eos = np.array([tokenizer.eos], dtype)
    total = sum(corpora.size(path) for source in found for path in source.files)
    with (draft / TOKENS).open("wb") as file, _progress(total, console) as show:
        for batch in _batches(corpora.documents_of(found, text_field)):
            texts = [document.text for document in batch]
            encoded = tokenizer.encode_batch(texts)
            pieces = [piece for ids in encoded for piece in (ids, eos)]
            file.write(np.concatenate(pieces, dtype=dtype, casting="unsafe").data)
            lengths.extend(len(ids) + 1 for ids in encoded)
            hashes.extend(_document_hash(text) for text in texts)
            together = torch.frombuffer(bytearray().join(texts), dtype=torch.uint8)
            frequencies += torch.bincount(together, minlength=256).numpy()  # NumPy's widens each byte to eight first
            show(batch[-1].read)
        cache.sync(file)
    ends = np.frombuffer(lengths, np.int64).cumsum()
    whole = np.stack([np.concatenate([[0], ends[:-1]]), ends], 1)
    train, held_out = hold_out(whole, np.frombuffer(hashes, np.uint64))
    for name, bounds in {"whole": whole, "train": train, "held_out": held_out}.items():
        with (draft / f"{name}.npy").open("wb") as file:
            np.save(file, bounds)
            cache.sync(file)
    facts = {
        "tokenizer": tokenizer.name,
        "vocab_size": tokenizer.vocab_size,
        "eos": tokenizer.eos,
        "dtype": dtype.name,
        "tokens": int(ends[-1]),
        "text_bytes": int(frequencies.sum()),
        "byte_entropy": entropy(frequencies),
    }
    cache.write(draft / FACTS, json.dumps(facts, indent=2).encode())


def entropy(frequencies: Int64[np.ndarray, "kinds"]) -> float:
    """The entropy in nats, -sum p log p, of a distribution given by how often each kind occurs; kinds that never do are left
    out."""
    some = frequencies[frequencies > 0] / frequencies.sum()
    return float(-(some * np.log(some)).sum())


def bits(nats: float) -> float:
    """Nats converted to bits."""
    return nats / math.log(2)


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    """Yield the documents in lists of about ``BATCH_BYTES`` bytes of text, which are tokenized together."""
    batch: list[Document] = []
    held = 0
    for document in documents:
        batch.append(document)
        held += len(document.text)
        if held >= BATCH_BYTES:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def _narrowest(vocab_size: int) -> np.dtype[np.generic]:
    """The narrowest of uint8, uint16 and int32 that holds every id below ``vocab_size``."""
    return np.dtype(next((kind for kind in (np.uint8, np.uint16) if vocab_size <= np.iinfo(kind).max + 1), np.int32))


def _state(found: Sequence[Source]) -> tuple[str, float]:
    """What tells whether the files of ``found`` have changed, without reading them.

    Returns:
        (text with path, size and times of every file: a changed file changes it; the latest of these times in seconds).
    """
    try:
        stats = [(str(path.resolve()), path.stat()) for source in found for path in source.files]
    except OSError as error:
        raise DataError(f"the data '{error.filename}' cannot be read: {error.strerror}; repair it, or leave it out") from error
    newest = max(max(stat.st_mtime, stat.st_ctime) for _, stat in stats)
    return repr([(path, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for path, stat in stats]), newest


def _content(found: Sequence[Source], made_by: str) -> str:
    """The name under which the tokens of the files of ``found`` are cached.

    It is a hash of their kinds and contents, and of ``made_by``: a text that describes tokenizer and format.
    """
    digests = []
    for path in (path for source in found for path in source.files):
        with corpora.readable(path), path.open("rb") as file:
            digests.append(f"{corpora.kind(path)} {hashlib.file_digest(file, 'sha256').hexdigest()}")
    return _hash("\n".join([made_by, *digests]))


def _hash(text: str) -> str:
    return hashlib.blake2b(os.fsencode(text), digest_size=16).hexdigest()


def _document_hash(text: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


@contextmanager
def _progress(total: int, console: Console) -> Iterator[Callable[[int], None]]:
    """Context manager: yields a function that is called with the number of bytes done, out of ``total``, to show progress.

    Nothing is shown in the first seconds; then a progress bar or, if ``console`` is not a terminal, one line.
    """
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    bar = Progress(*columns, console=console, transient=True)
    task = bar.add_task("tokenizing, once", total=total)
    start, shown = time.monotonic(), False

    def show(done: int) -> None:
        nonlocal shown
        bar.update(task, completed=done)
        if shown or done >= total or time.monotonic() - start < QUIET_SECONDS:
            return
        shown = True
        if console.is_terminal:
            bar.start()
        else:
            console.print(f"tokenizing {decimal(total)} of text, once")

    try:
        yield show
    finally:
        if shown and console.is_terminal:
            bar.stop()
