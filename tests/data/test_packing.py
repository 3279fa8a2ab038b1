"""The stream is the documents with an end each; splits share no token; reading a split touches what was asked for alone."""

import io
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from longspan.data import packing
from longspan.data.packing import Corpus, Split, bits, entropy, hold_out, tokenize
from longspan.data.tokenizers import Bytes, Ids

SIZES = st.lists(st.integers(1, 30), min_size=1, max_size=30)


class Words(Bytes):
    """Two bytes a token, from a vocabulary of any size."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size, self.eos, self.fingerprint = vocab_size, vocab_size - 1, str(vocab_size)

    def encode(self, text: str | bytes) -> Ids:
        return super().encode(text)[::2].astype(np.int64) * (self.vocab_size - 2) // 255


def bounds_of(sizes: Sequence[int]) -> np.ndarray:
    ends = np.cumsum(sizes, dtype=np.int64)
    return np.stack([ends - sizes, ends], 1)


def covered(bounds: np.ndarray) -> list[int]:
    return [token for start, stop in bounds.tolist() for token in range(start, stop)]


def packed(texts: Sequence[bytes], tmp_path: Path, tokenizer: Bytes | None = None) -> Corpus:
    for number, text in enumerate(texts):
        (tmp_path / f"{number:04}.txt").write_bytes(text)
    return tokenize([str(tmp_path)], tokenizer or Bytes(), folder=tmp_path / "cache")


def test_the_stream_is_every_document_with_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [bytes([65 + number % 26]) * (1 + number * 7 % 40) for number in range(200)]
    monkeypatch.setattr(packing, "BATCH_BYTES", 100)
    corpus = packed(texts, tmp_path)
    expected = [token for text in texts for token in [*text, 256]]
    assert corpus.whole.read(0, corpus.tokens).tolist() == expected
    assert [expected[start:stop] for start, stop in corpus.whole.documents.tolist()] == [[*text, 256] for text in texts]
    assert (corpus.tokenizer, corpus.vocab_size, corpus.eos) == ("bytes", 257, 256)
    assert corpus.text_bytes == sum(map(len, texts))
    assert corpus.bytes_per_token == pytest.approx(corpus.text_bytes / len(expected))
    for split in (corpus.train, corpus.held_out):
        documents = [bytes(split.read(start, stop - 1).tolist()) for start, stop in split.documents.tolist()]
        assert set(documents) <= set(texts)
    assert corpus.train.tokens + corpus.held_out.tokens == len(expected)


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(256, "uint8"), (257, "uint16"), (65536, "uint16"), (65537, "int32"), (200_000, "int32")]
)
def test_tokens_are_as_narrow_as_the_vocabulary_allows(vocab_size: int, dtype: str, tmp_path: Path) -> None:
    tokenizer, text = Words(vocab_size), bytes(range(256))
    corpus = packed([text], tmp_path, tokenizer)
    tokens = tmp_path / "cache" / corpus.fingerprint / packing.TOKENS
    assert tokens.stat().st_size == corpus.tokens * np.dtype(dtype).itemsize
    assert corpus.whole.read(0, 129).tolist() == [*tokenizer.encode(text).tolist(), vocab_size - 1]
    assert corpus.bytes_per_token == pytest.approx(256 / 129)


def test_the_entropy_is_that_of_the_frequencies_of_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "BATCH_BYTES", 10)
    texts = [b"abracadabra", b"alakazam", b"abc"]
    together = b"".join(texts)
    shares = [count / len(together) for count in Counter(together).values()]
    assert packed(texts, tmp_path).byte_entropy == pytest.approx(-sum(p * math.log(p) for p in shares))
    assert bits(entropy(np.array([1, 1, 0, 1, 1]))) == pytest.approx(2.0)
    assert entropy(np.array([0, 7])) == 0.0


@settings(deadline=None)
@given(SIZES, st.integers(0, 99))
def test_train_and_held_out_share_no_token_and_miss_none(sizes: list[int], seed: int) -> None:
    bounds = bounds_of([size + 1 for size in sizes])
    hashes = np.random.default_rng(seed).integers(0, 2**63, len(sizes)).astype(np.uint64)
    train, held_out = hold_out(bounds, hashes)
    assert sorted(covered(train) + covered(held_out)) == list(range(sum(sizes) + len(sizes)))
    assert len(covered(train)) > 0
    assert 1 <= len(covered(held_out)) <= max(1, (sum(sizes) + len(sizes)) / 10)


def test_documents_are_held_out_whole_by_their_hash_where_these_are_about_a_twentieth() -> None:
    hashes = np.array([3, 20, 1, 40, *range(21, 40)] + [7] * 20, np.uint64)
    train, held_out = hold_out(bounds_of([10] * 43), hashes)
    assert held_out.tolist() == [[10, 20], [30, 40]]
    assert len(train) == 41
    few, tail = hold_out(bounds_of([10] * 43), np.where(hashes == 20, 1, hashes))  # one of 43: 2.3% is no twentieth
    assert (tail.tolist(), few.tolist()[-1]) == ([[409, 410], [410, 420], [420, 430]], [400, 409])


def test_the_same_text_stays_on_one_side(tmp_path: Path) -> None:
    texts = [b"%d" % (number % 100) * 50 for number in range(300)]
    corpus = packed(texts, tmp_path)
    sides = [
        {bytes(split.read(start, stop - 1).tolist()) for start, stop in split.documents.tolist()}
        for split in (corpus.train, corpus.held_out)
    ]
    assert all(sides)
    assert not sides[0] & sides[1]


def test_of_one_document_the_tail_is_held_out(tmp_path: Path) -> None:
    text = bytes(range(32, 127)) * 10
    corpus = packed([text], tmp_path)
    tokens = [*text, 256]
    assert corpus.held_out.tokens == len(tokens) // 20
    assert corpus.train.read(0, corpus.train.tokens).tolist() == tokens[: -len(tokens) // 20 + 1]
    assert corpus.held_out.read(0, corpus.held_out.tokens).tolist() == tokens[-(len(tokens) // 20) :]


def test_of_one_byte_its_end_is_held_out(tmp_path: Path) -> None:
    corpus = packed([b"x"], tmp_path)
    assert (corpus.train.read(0, 1).tolist(), corpus.held_out.read(0, 1).tolist()) == ([120], [256])


class Watched(np.ndarray):
    """An array that notes which of its elements are asked for."""

    touched: list[int]

    def __getitem__(self, key: Any) -> Any:
        self.touched += range(*key.indices(len(self)))
        return np.asarray(self)[key]


@settings(deadline=None)
@given(SIZES, st.data())
def test_reading_is_slicing_the_documents_side_by_side_and_touches_nothing_else(sizes: list[int], data: st.DataObject) -> None:
    bounds = bounds_of(sizes)
    chosen = data.draw(st.lists(st.booleans(), min_size=len(sizes), max_size=len(sizes)).filter(any))
    stream = np.arange(1000, 1000 + sum(sizes), dtype=np.uint16).view(Watched)
    stream.touched = []
    split = Split("some", stream, bounds[chosen], "")
    flat = covered(bounds[chosen])
    start = data.draw(st.integers(0, len(flat)))
    stop = data.draw(st.integers(start, len(flat)))
    read = split.read(start, stop)
    assert read.dtype == torch.int64
    assert read.tolist() == [1000 + token for token in flat[start:stop]]
    assert stream.touched == flat[start:stop]
    assert split.tokens == len(flat)
    assert (split.documents[:, 1] - split.documents[:, 0]).tolist() == [s for s, c in zip(sizes, chosen) if c]


def output_while_tokenizing(text: str, tmp_path: Path, terminal: bool) -> str:
    screen = io.StringIO()
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text(text)
    console = Console(file=screen, force_terminal=terminal, width=99)
    tokenize([str(tmp_path)], Bytes(), folder=tmp_path / "cache", console=console)
    return screen.getvalue()


def test_work_that_lasts_shows_a_bar_or_a_line_and_quick_work_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "BATCH_BYTES", 1)
    assert output_while_tokenizing("a" * 900, tmp_path, terminal=True) == ""
    monkeypatch.setattr(packing, "QUIET_SECONDS", -1.0)
    assert output_while_tokenizing("a" * 900, tmp_path, terminal=True) == ""  # it is in the cache
    assert "tokenizing, once" in output_while_tokenizing("b" * 900, tmp_path, terminal=True)
    assert output_while_tokenizing("c" * 900, tmp_path, terminal=False) == "tokenizing 2.7 kB of text, once\n"


def test_the_default_corpus_is_enough_to_train_on(tmp_path: Path) -> None:
    corpus = tokenize([], Bytes(), folder=tmp_path)
    assert corpus.train.tokens > 100 * 8192
    assert corpus.held_out.tokens > 4 * 8192
    assert 0.02 < corpus.held_out.tokens / corpus.tokens < 0.1
    assert 3.0 < corpus.byte_entropy < 3.5
