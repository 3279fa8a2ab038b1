"""Reads documents from files (text, JSON lines, Parquet), always in the same order. Independent of tokens.

    notes.txt  src/*.py                     a file is a document
    books.jsonl(.gz, .zst)                  a line is a document: {"text": "..."}          -->  Document, Document, ...
    wiki.parquet                            a row is a document: column "text"
    folder/                                 every such file below it, sorted by path
    (nothing)                               the source of Python's own standard library

A text file is returned as its bytes, without decoding, so text that is not UTF-8 is no error.
"""

import glob
import gzip
import io
import json
import os
import sysconfig
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from longspan.errors import DataError

STANDARD_LIBRARY = "the Python standard library"
"""The name of the default text, which exists on every machine: Python's own source files."""

NOT_LIBRARY = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})
"""Folders of the standard library that are left out: tests, and what others installed."""


@dataclass(frozen=True)
class Document:
    """One text, as ``documents`` yields it.

    Attributes:
        name: the file, and the line or row in it, for messages.
        text: its bytes.
        read: bytes on disk of all sources up to the end of this document, for a progress bar.
    """

    name: str
    text: bytes
    read: int


@dataclass(frozen=True)
class Source:
    """One ``--data`` argument and its files, as ``find`` returns it.

    Attributes:
        given: the argument: a file, folder or glob.
        files: its files in the order in which they are read.
        skipped: files of unknown kinds in the same folders, which are not read.
    """

    given: str
    files: tuple[Path, ...]
    skipped: tuple[Path, ...] = ()


def documents(sources: Sequence[str], text_field: str = "text") -> Iterator[Document]:
    """Read every document of ``sources``, in their order; the files of a folder or glob sorted by path.

    Empty texts (an empty file, ``""`` or ``null``) are left out. A file that is named, or that a glob matches, must be of a
    known kind; in a folder, hidden files and files of other kinds are skipped.

    Args:
        sources: files, folders and globs; empty: the Python standard library.
        text_field: the JSON field and Parquet column of the text.

    Yields:
        A Document for each file (.txt, .md, .rst, .py), line (JSON lines) or row (Parquet).

    Raises:
        DataError: a source does not exist, cannot be read or holds no text, or a line or row has no ``text_field``.
    """
    return documents_of(find(sources), text_field)


def documents_of(found: Sequence[Source], text_field: str) -> Iterator[Document]:
    """Read every document of the sources that ``find`` returned, in their order; empty texts are left out.

    Args:
        found: the sources.
        text_field: the JSON field and Parquet column of the text.

    Yields:
        A Document for each file, line (JSON lines) or row (Parquet).

    Raises:
        DataError: a file cannot be read, or a source holds no text, or a line or row has no ``text_field``.
    """
    behind = 0
    for source in found:
        empty = True
        for path in source.files:
            for document in _read(path, text_field):
                if document.text:
                    empty = False
                    yield Document(document.name, document.text, behind + document.read)
            behind += size(path)
        if empty:
            raise DataError(
                f"the data {source.given!r} holds no text: {_count(len(source.files), 'file')}, nothing in it; "
                f"name files that hold some"
            )


def size(path: Path) -> int:
    """The size of a file on the disk in bytes. Raises DataError if it cannot be read."""
    with readable(path):
        return path.stat().st_size


def find(sources: Sequence[str]) -> list[Source]:
    """The sources that the user has named, with their files; no file is opened.

    Args:
        sources: files, folders and globs; empty: the Python standard library.

    Returns:
        A Source for each of them.

    Raises:
        DataError: a source does not exist, holds no file of a known kind, or names a file of an unknown kind.
    """
    if not sources:
        return [_standard_library()]
    return [_find_one(source) for source in sources]


def _standard_library() -> Source:
    """The Python files of the standard library, as a Source; tests and other folders in ``NOT_LIBRARY`` are left out."""
    root = Path(sysconfig.get_path("stdlib"))
    files = tuple(path for path in _below(root, NOT_LIBRARY) if path.suffix == ".py")
    if not files:
        raise DataError(f"{STANDARD_LIBRARY} has no source in {root}, so there is no default text; name files with --data")
    return Source(STANDARD_LIBRARY, files)


def _find_one(given: str) -> Source:
    """The Source of one file, folder or glob, ``given`` by the user.

    Raises:
        DataError: it does not exist, or holds no file of a known kind.
    """
    path = Path(given).expanduser()
    if path.is_dir():
        return Source(given, *_texts_below(path))
    if path.is_file():
        return Source(given, (_known(path),))
    if not glob.has_magic(given):
        raise DataError(f"the data {given!r} does not exist; name a file, a folder or a glob of {_KINDS}")
    found: list[Path] = []
    skipped: list[Path] = []
    for match in map(Path, sorted(glob.glob(str(path), recursive=True))):
        texts, others = _texts_below(match) if match.is_dir() else ((_known(match),), ())
        found, skipped = [*found, *texts], [*skipped, *others]
    if not found:
        raise DataError(f"the glob {given!r} matches nothing; name a file, a folder or a glob of {_KINDS}")
    once = dict.fromkeys  # "**" meets a file once by itself and once in its folder
    return Source(given, tuple(once(found)), tuple(once(skipped)))


def _texts_below(folder: Path) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    """The files below a folder: (those of known kinds, the others), each sorted by path.

    Raises:
        DataError: there is none of a known kind.
    """
    below = _below(folder, frozenset())
    files = tuple(path for path in below if kind(path))
    if not files:
        raise DataError(f"the folder '{folder}' holds no file of {_KINDS}; name another one")
    return files, tuple(path for path in below if not kind(path))


def counts(paths: Iterable[Path]) -> dict[str, int]:
    """{ending: number of files with it}, the most frequent first; a file without an ending counts as "no ending"."""
    return dict(Counter(kind(path) or path.suffix.lower() or "no ending" for path in paths).most_common())


def _below(folder: Path, left_out: frozenset[str]) -> list[Path]:
    """All files below ``folder``, sorted by path, except hidden ones and those in folders named in ``left_out``.

    Raises:
        DataError: a folder cannot be listed.
    """
    paths = []
    with readable(folder):
        for parent, folders, names in os.walk(folder, onerror=_raise):
            folders[:] = [name for name in folders if name not in left_out and not name.startswith(".")]
            paths += [Path(parent, name) for name in names if not name.startswith(".")]
    return sorted(paths, key=lambda path: path.parts)


def _raise(error: OSError) -> None:
    raise error


def _known(path: Path) -> Path:
    """``path`` itself. Raises DataError if it is of an unknown kind."""
    if not kind(path):
        raise DataError(f"the file '{path}' is of an unknown kind; legal are {_KINDS}")
    return path


def kind(path: Path) -> str:
    """The ending by which a file of a known kind is read, in lower case, such as ".jsonl.gz"; "" for any other file."""
    return next((ending for ending in _READERS if path.name.lower().endswith(ending)), "")


def _read(path: Path, text_field: str) -> Iterator[Document]:
    """Yield the documents of the file ``path``, by the reader of its kind; ``text_field`` is the JSON field or column of the
    text."""
    with readable(path):
        yield from _READERS[kind(path)](path, text_field)


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Context manager: an error of reading or decompressing ``path`` in the block is raised as a DataError that names it."""
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"the data '{path}' cannot be read: {_first_line(error)}; repair it, or leave it out") from error


def _first_line(error: Exception) -> str:
    """The first line of the text of an error; of an OSError the system's text, and for an empty text the error's class."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return (text.splitlines() or [type(error).__name__])[0]


def _read_text(path: Path, text_field: str) -> Iterator[Document]:
    text = path.read_bytes()
    yield Document(str(path), text, len(text))


def _read_jsonl(path: Path, text_field: str) -> Iterator[Document]:
    with path.open("rb") as file:
        yield from _lines(path, file, file, text_field)


def _read_jsonl_gz(path: Path, text_field: str) -> Iterator[Document]:
    with path.open("rb") as file, gzip.GzipFile(fileobj=file) as lines:
        yield from _lines(path, file, lines, text_field)


def _read_jsonl_zst(path: Path, text_field: str) -> Iterator[Document]:
    pyarrow = _pyarrow(path)
    with path.open("rb") as file, pyarrow.CompressedInputStream(pyarrow.PythonFile(file), "zstd") as decompressed:
        yield from _lines(path, file, io.BufferedReader(decompressed), text_field)


def _lines(path: Path, file: IO[bytes], lines: Any, text_field: str) -> Iterator[Document]:
    """Yield a Document for each JSON line of ``lines``, except blank ones.

    Args:
        path: the file, for messages.
        file: the open file, which gives the position on the disk.
        lines: reads lines from ``file``, directly or through a decompressor.
        text_field: the JSON field of the text.
    """
    for number, line in enumerate(lines, 1):
        if line.isspace():
            continue
        where = f"{path}, line {number}"
        yield Document(where, _text_of_line(line, text_field, where), file.tell())


def _text_of_line(line: bytes, text_field: str, where: str) -> bytes:
    """The text in a JSON line; ``where`` names the line in the DataError of one that is no object with ``text_field``."""
    try:
        record = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where} is not valid JSON: {_first_line(error)}; repair the line, or remove it") from error
    if not isinstance(record, dict):
        raise DataError(f"{where} holds a JSON {type(record).__name__}; it must hold an object with the field {text_field!r}")
    if text_field not in record:
        raise _no_field(where, "field", text_field, record)
    return _as_bytes(record[text_field], where, text_field)


def _read_parquet(path: Path, text_field: str) -> Iterator[Document]:
    pyarrow = _pyarrow(path)
    from pyarrow import parquet

    size, row = path.stat().st_size, 0
    try:
        with parquet.ParquetFile(path) as file:
            if text_field not in file.schema_arrow.names:
                raise _no_field(str(path), "column", text_field, file.schema_arrow.names)
            for batch in file.iter_batches(batch_size=1024, columns=[text_field]):
                for text in batch.column(0).to_pylist():
                    row += 1
                    where = f"{path}, row {row}"
                    yield Document(where, _as_bytes(text, where, text_field), size * row // file.metadata.num_rows)
    except pyarrow.ArrowException as error:
        raise DataError(f"the data '{path}' cannot be read: {_first_line(error)}; repair it, or leave it out") from error


def _as_bytes(text: Any, where: str, text_field: str) -> bytes:
    """The text of a JSON field or Parquet cell in UTF-8; b"" for None. ``where`` names it in the DataError for anything
    else."""
    if text is None:
        return b""
    if not isinstance(text, str):
        raise DataError(
            f"{where} holds a {type(text).__name__} in {text_field!r}, not text; choose another one with --text-field"
        )
    return text.encode(errors="replace")  # JSON can escape half a surrogate pair, which UTF-8 cannot write


def _no_field(where: str, what: str, given: str, there: Sequence[str] | dict[str, Any]) -> DataError:
    """The error of a record without the field (or column) ``given``, which lists those that are ``there``."""
    listed = f"there are {', '.join(there)}" if there else "there is none"
    return DataError(f"{where} has no {what} {given!r}; {listed}: choose with --text-field")


def _pyarrow(path: Path) -> Any:
    """The module pyarrow, imported now. Raises DataError, naming ``path`` as what needs it, if it is not installed."""
    try:
        import pyarrow
    except ImportError as error:
        raise DataError(
            f"the data '{path}' needs pyarrow, which is not installed; pip install '.[data]' in a checkout"
        ) from error
    return pyarrow


def _count(number: int, what: str) -> str:
    """A number with its noun, in the singular or plural: "1 line", "1,000 lines"."""
    return f"{number:,} {what}{'s' * (number != 1)}"


_READERS: dict[str, Callable[[Path, str], Iterator[Document]]] = {
    ".txt": _read_text,
    ".md": _read_text,
    ".rst": _read_text,
    ".py": _read_text,
    ".jsonl": _read_jsonl,
    ".jsonl.gz": _read_jsonl_gz,
    ".jsonl.zst": _read_jsonl_zst,
    ".parquet": _read_parquet,
}

_KINDS = ", ".join(list(_READERS)[:-1]) + f" or {list(_READERS)[-1]}"
