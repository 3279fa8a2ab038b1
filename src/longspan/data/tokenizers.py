"""Tokenizers: bytes, a file of the ``tokenizers`` library, or a Hugging Face folder. Independent of data files and streams.

    "bytes"                      "abc"  ->  97 98 99              256 bytes, and 256 for the end of a document
    path/to/tokenizer.json       "abc"  ->  39305                 a file of the ``tokenizers`` library
    path/to/folder/              "abc"  ->  39305                 a Hugging Face tokenizer, from the disk only

A tokenizer without an end-of-document token gets one: the id behind the last of its vocabulary.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Integer

from longspan.errors import DataError

Ids = Integer[np.ndarray, "tokens"]

ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "[SEP]")
"""Names of the end-of-document token in well-known models. A tokenizers file names none: the first one it holds is used."""


@runtime_checkable
class Tokenizer(Protocol):
    """Converts text to token ids and back; ``load`` makes one.

    Attributes:
        name: what ``load`` was given.
        vocab_size: every id is below it.
        eos: the id of the end-of-document token.
        fingerprint: two tokenizers with equal ones give equal ids for every text.
    """

    @property
    def name(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def eos(self) -> int: ...
    @property
    def fingerprint(self) -> str: ...

    def encode(self, text: str | bytes) -> Ids:
        """The token ids [tokens] of a text, without ``eos``; bytes are read as UTF-8."""

    def encode_batch(self, texts: Sequence[bytes]) -> list[Ids]:
        """The token ids of each text, in order: ``[encode(text) for text in texts]``, on several threads if possible."""

    def decode(self, ids: Sequence[int] | Ids) -> str:
        """The text of token ids; every ``eos`` is left out."""


def load(name: str) -> Tokenizer:
    """Load a tokenizer from the disk.

    Args:
        name: ``bytes``, the path of a ``tokenizers`` JSON file, or a Hugging Face folder.

    Returns:
        A ``Bytes``, ``Fast`` or ``Slow`` tokenizer.

    Raises:
        DataError: there is no such file or folder, it holds something else, or the library that reads it is not installed.
    """
    if name == Bytes.name:
        return Bytes()
    path = Path(name).expanduser()
    if path.is_dir():
        return _from_folder(path)
    if path.is_file():
        return _from_file(path)
    raise DataError(
        f"the tokenizer {name!r} is unknown; legal are 'bytes', the path of a tokenizers JSON file, and the folder of a "
        f"Hugging Face tokenizer"
    )


class Bytes:
    """The byte tokenizer: a byte's id is its value, 0 to 255; ``eos`` is 256. ``decode`` writes U+FFFD for invalid UTF-8."""

    name = "bytes"
    vocab_size = 257
    eos = 256
    fingerprint = "bytes"

    def encode(self, text: str | bytes) -> Ids:
        return np.frombuffer(text.encode() if isinstance(text, str) else text, np.uint8)

    def encode_batch(self, texts: Sequence[bytes]) -> list[Ids]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int] | Ids) -> str:
        return bytes(i for i in np.asarray(ids).tolist() if i != self.eos).decode(errors="replace")


class Fast:
    """A tokenizer of the ``tokenizers`` library. Ids are those of its ``encode(text, add_special_tokens=False)``.

    Texts are neither truncated nor padded. Bytes that are not UTF-8 are read as U+FFFD.

    Args:
        name: for messages and ``Tokenizer.name``.
        backend: a ``tokenizers.Tokenizer``; its truncation and padding are switched off.
        eos: the id of the end-of-document token; None: a new id behind the vocabulary.
    """

    def __init__(self, name: str, backend: Any, eos: int | None) -> None:
        backend.no_truncation()
        backend.no_padding()
        self.name = name
        self._backend = backend
        ids = backend.get_vocab(with_added_tokens=True).values()
        self.eos, self.vocab_size = _end(eos, max(ids, default=-1) + 1)
        self.fingerprint = _hash(f"{self.eos} {backend.to_str()}")

    def encode(self, text: str | bytes) -> Ids:
        return self.encode_batch([text.encode() if isinstance(text, str) else text])[0]

    def encode_batch(self, texts: Sequence[bytes]) -> list[Ids]:
        read = [text.decode(errors="replace") for text in texts]
        encodings = self._backend.encode_batch_fast(read, add_special_tokens=False)
        return [np.array(encoding.ids, np.int64) for encoding in encodings]

    def decode(self, ids: Sequence[int] | Ids) -> str:
        return str(self._backend.decode([i for i in np.asarray(ids).tolist() if i != self.eos], skip_special_tokens=False))


class Slow:
    """A Hugging Face tokenizer that does not use the ``tokenizers`` library.

    No special tokens are added, no text is truncated or padded, and bytes that are not UTF-8 are read as U+FFFD.

    Args:
        name: for messages and ``Tokenizer.name``.
        backend: a slow PreTrainedTokenizer; if it has no ``eos_token_id``, ``eos`` is a new id behind its vocabulary.
    """

    def __init__(self, name: str, backend: Any) -> None:
        self.name = name
        self._backend = backend
        vocabulary = backend.get_vocab()
        self.eos, self.vocab_size = _end(backend.eos_token_id, max(vocabulary.values(), default=-1) + 1)
        self.fingerprint = _hash(f"{self.eos} {type(backend).__name__} {sorted(vocabulary.items())} {backend.init_kwargs}")

    def encode(self, text: str | bytes) -> Ids:
        read = text if isinstance(text, str) else text.decode(errors="replace")
        return np.array(self._backend.encode(read, add_special_tokens=False, verbose=False), np.int64)

    def encode_batch(self, texts: Sequence[bytes]) -> list[Ids]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int] | Ids) -> str:
        return str(self._backend.decode([i for i in np.asarray(ids).tolist() if i != self.eos]))


def _from_file(path: Path) -> Tokenizer:
    """The tokenizer of a ``tokenizers`` JSON file. Raises DataError if it holds something else."""
    try:
        import tokenizers
    except ImportError as error:
        raise DataError(
            f"the tokenizer '{path}' needs tokenizers, which is not installed; pip install '.[hf]' in a checkout"
        ) from error
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exceptions
        raise DataError(
            f"the tokenizer '{path}' is not a file of the tokenizers library: {_first_line(error)}; legal are 'bytes', such a "
            f"JSON file, and the folder of a Hugging Face tokenizer"
        ) from error
    known = (backend.token_to_id(end) for end in ENDS)
    return Fast(str(path), backend, next((i for i in known if i is not None), None))


def _from_folder(path: Path) -> Tokenizer:
    """The tokenizer of a Hugging Face folder, read from the disk only. Raises DataError if there is none."""
    try:
        import transformers
    except ImportError as error:
        raise DataError(
            f"the tokenizer '{path}' needs transformers, which is not installed; pip install '.[hf]' in a checkout"
        ) from error
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    except Exception as error:  # Transformers raises many kinds for a folder of something else
        raise DataError(
            f"the folder '{path}' holds no Hugging Face tokenizer: {_first_line(error)}; legal are 'bytes', a tokenizers JSON "
            f"file, and a folder that save_pretrained wrote"
        ) from error
    if tokenizer.is_fast:
        return Fast(str(path), tokenizer.backend_tokenizer, tokenizer.eos_token_id)
    return Slow(str(path), tokenizer)


def _end(eos: int | None, vocabulary: int) -> tuple[int, int]:
    """The end-of-document token of a tokenizer that has ids below ``vocabulary``.

    Args:
        eos: its id; None: it is the new id ``vocabulary``.
        vocabulary: the number of ids of the tokenizer itself.

    Returns:
        (the id, the size of the vocabulary with it).
    """
    return (vocabulary, vocabulary + 1) if eos is None else (eos, max(vocabulary, eos + 1))


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
