"""Documents as one stream of tokens in a memory map, tokenized once. Knows nothing of sequences, ranks or order.

    documents     [def f...]   [import os...]   [class A...]
    stream        d e f ... EOS i m p ... EOS c l a ... EOS          tokens.bin: uint8, uint16 or int32, as the vocabulary needs
    train         |<---------->|            |<------------>|         a split is documents of the stream, side by side
    held out                   |<---------->|

The stream lies in the cache under a name that is a hash of the content of the files, the tokenizer and this format: the
same text is never tokenized twice, and changed text never read from an old stream. To know that files did not change,
their paths, sizes and times of change are enough; where one changed in the last seconds, its content is hashed.
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
"""One document in so many is held out, chosen by its content."""

BATCH_BYTES = 8 << 20
"""Text that is tokenized at once: what all threads of a tokenizer share, and what the progress bar moves by."""

SETTLED_SECONDS = 2.0
"""A file that changed this lately could change again without a newer time: file systems count coarsely."""

QUIET_SECONDS = 0.5
"""Work that is shorter needs no progress bar."""

Bounds = Int64[np.ndarray, "_ 2"]
"""Where documents start and stop, a row each."""


class Split:
    """Documents of a stream, side by side: token 0 is the first of the first document.

    ``documents`` are their bounds, each with its end-of-document token; ``fingerprint`` is equal where the tokens are.
    """

    def __init__(self, name: str, stream: Integer[np.ndarray, "stream"], bounds: Bounds, fingerprint: str) -> None:
        self.name, self.fingerprint = name, fingerprint
        self._stream = stream
        ends = (bounds[:, 1] - bounds[:, 0]).cumsum()
        self.documents: Bounds = np.stack([np.concatenate([[0], ends[:-1]]), ends], 1)
        # Neighbours in the stream are read as one run: a long sequence of short documents is few reads.
        first = np.concatenate([[True], bounds[1:, 0] != bounds[:-1, 1]])
        self._run_starts = self.documents[first, 0]
        self._run_shifts = bounds[first, 0] - self._run_starts

    @property
    def tokens(self) -> int:
        """How many tokens it has in all."""
        return int(self.documents[-1, 1])

    def read(self, start: int, stop: int) -> Int64[Tensor, "tokens"]:
        """The tokens at ``start`` .. ``stop - 1``; nothing else of the stream is touched."""
        assert 0 <= start <= stop <= self.tokens, (start, stop, self.tokens)
        first, last = np.searchsorted(self._run_starts, [start, stop], side="right") - 1
        cuts = [start, *self._run_starts[first + 1 : last + 1].tolist(), stop]
        shifts = self._run_shifts[first : last + 1].tolist()
        pieces = [self._stream[a + shift : b + shift] for a, b, shift in zip(cuts, cuts[1:], shifts)]
        return torch.from_numpy(np.concatenate(pieces, dtype=np.int64))


@dataclass(frozen=True)
class Corpus:
    """A tokenized text. ``text_bytes`` of text became ``tokens`` tokens (an end-of-document token each included).

    ``byte_entropy`` is what a model that knows only how frequent bytes are would pay: nats per byte of the whole text.
    ``whole`` is every document; ``train`` and ``held_out`` share none of its tokens.
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

    @property
    def tokens(self) -> int:
        """How many tokens the stream has."""
        return self.whole.tokens

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text a token stands for, on average: a loss in nats per token is so many times its nats per byte."""
        return self.text_bytes / self.tokens


def tokenize(
    sources: Sequence[str],
    tokenizer: Tokenizer,
    *,
    text_field: str = "text",
    folder: Path | None = None,
    console: Console | None = None,
) -> Corpus:
    """The stream of ``sources`` (see ``corpora.documents``), made where it is not in the cache ``folder`` yet.

    Every rank may call it: on each machine one makes the stream and shows its progress on ``console`` (default: stderr),
    the others wait for it. Raises DataError as ``documents`` does, where the data changes while it is read, and where
    the disk is full; then nothing half-made stays.
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
    return _open(cache.kept(folder, _hash(made_by + state), lambda: _content(found, made_by), make, settled))


def hold_out(bounds: Bounds, hashes: Integer[np.ndarray, "documents"]) -> tuple[Bounds, Bounds]:
    """(train, held out): one document in 20 is held out, by the hash of its content, so the same text stays on one side.

    Where these are not about a twentieth of the tokens (one document, few, or some huge), it is the tail of the stream.
    """
    held = hashes % HELD_OUT == 0
    tokens = int(bounds[-1, 1])
    if tokens <= int((bounds[held, 1] - bounds[held, 0]).sum()) * 2 * HELD_OUT <= 4 * tokens:
        return bounds[~held], bounds[held]
    cut = tokens - max(1, tokens // HELD_OUT)
    return _some(bounds.clip(max=cut)), _some(bounds.clip(min=cut))


def _some(bounds: Bounds) -> Bounds:
    return bounds[bounds[:, 0] < bounds[:, 1]]


def _open(path: Path) -> Corpus:
    try:
        facts = json.loads((path / FACTS).read_bytes())
        stream = np.memmap(path / TOKENS, facts["dtype"], "r", shape=(facts["tokens"],))
        whole, train, held_out = (
            Split(name, stream, np.load(path / f"{name}.npy"), f"{path.name} {name}") for name in ("whole", "train", "held_out")
        )
        known = {name: facts[name] for name in ("tokenizer", "vocab_size", "eos", "text_bytes", "byte_entropy")}
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise DataError(f"the cached tokens in '{path}' are damaged; remove that folder and run again") from error
    return Corpus(fingerprint=path.name, **known, whole=whole, train=train, held_out=held_out)


def _write(draft: Path, found: Sequence[Source], text_field: str, tokenizer: Tokenizer, console: Console) -> None:
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
    """Nats per item of a text whose items are this frequent: -sum p log p."""
    some = frequencies[frequencies > 0] / frequencies.sum()
    return float(-(some * np.log(some)).sum())


def bits(nats: float) -> float:
    """Nats as bits."""
    return nats / math.log(2)


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
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
    return np.dtype(next((kind for kind in (np.uint8, np.uint16) if vocab_size <= np.iinfo(kind).max + 1), np.int32))


def _state(found: Sequence[Source]) -> tuple[str, float]:
    """Every file with its size and times, and the latest of these times. A changed file has another state."""
    try:
        stats = [(str(path.resolve()), path.stat()) for source in found for path in source.files]
    except OSError as error:
        raise DataError(f"the data '{error.filename}' cannot be read: {error.strerror}; mend it, or leave it out") from error
    newest = max(max(stat.st_mtime, stat.st_ctime) for _, stat in stats)
    return repr([(path, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for path, stat in stats]), newest


def _content(found: Sequence[Source], made_by: str) -> str:
    """The name of the stream: what is in the files, in their order, and who makes tokens of it."""
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
    """A function to be told how much of ``total`` bytes is done; it shows a bar (without a terminal: a line) if this lasts."""
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    bar = Progress(*columns, console=console, transient=True)
    task = bar.add_task("tokenizing, once", total=total)
    start, said = time.monotonic(), False

    def show(done: int) -> None:
        nonlocal said
        bar.update(task, completed=done)
        if said or done >= total or time.monotonic() - start < QUIET_SECONDS:
            return
        said = True
        if console.is_terminal:
            bar.start()
        else:
            console.print(f"tokenizing {decimal(total)} of text, once")

    try:
        yield show
    finally:
        if said and console.is_terminal:
            bar.stop()
