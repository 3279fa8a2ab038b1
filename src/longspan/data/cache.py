"""A cache of folders on disk, each made once by the first process that needs it. Knows nothing of their contents.

    ~/.cache/longspan/
        keys/KEY        a lock file: its holder may make the folder of KEY; its text, once known, is NAME
        .draft-KEY/     a folder that is being made; if nobody holds its lock, a crash left it and it is removed
        NAME/           complete: renamed from its draft when everything was on the disk

A KEY is cheap to compute (paths, sizes, times), a NAME is a hash of the content. The kernel releases the lock of a process
that dies, so nobody waits for it.
"""

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from longspan.errors import DataError


def default_folder() -> Path:
    """``$XDG_CACHE_HOME/longspan``, or ``~/.cache/longspan``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "longspan"


def kept(folder: Path, key: str, name: Callable[[], str], make: Callable[[Path], None], settled: bool) -> Path:
    """The folder ``folder / name()``; where it is missing, ``make`` fills a draft that is renamed to it.

    Any number of processes may call it at once: one makes the folder, the others wait for it.

    Args:
        folder: the cache.
        key: what is locked.
        name: computes the name of the content; called only where it is not recorded for ``key``.
        make: fills the draft.
        settled: record the name for ``key``, which will always mean it.

    Raises:
        DataError: the disk refuses (full, read-only); the draft is removed, as it is where ``make`` raises.
    """
    with _writable(folder):
        (folder / "keys").mkdir(parents=True, exist_ok=True)
        with _locked(folder / "keys" / key) as note:
            noted = note.read()
            if noted and (folder / noted).is_dir():
                return folder / noted
            path = folder / name()
            if not path.is_dir():
                _sweep(folder)
                _make(folder / f".draft-{key}", path, make)
            if settled:
                note.truncate(0)
                note.write(path.name)
            return path


def write(path: Path, content: bytes | memoryview) -> None:
    """Write a small file and wait until it is on the disk."""
    with path.open("wb") as file:
        file.write(content)
        sync(file)


def sync(file: IO[bytes]) -> None:
    """Wait until what was written is on the disk, so that a later rename cannot reach the disk first."""
    file.flush()
    os.fsync(file.fileno())


def _make(draft: Path, path: Path, make: Callable[[Path], None]) -> None:
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    try:
        make(draft)
        os.rename(draft, path)
    except OSError:
        if not path.is_dir():  # else another process made the same content under another key
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _sweep(folder: Path) -> None:
    """Remove the drafts whose lock is free: the process that made them has died."""
    for draft in folder.glob(".draft-*"):
        with suppress(BlockingIOError), _locked(folder / "keys" / draft.name.removeprefix(".draft-"), fcntl.LOCK_NB):
            shutil.rmtree(draft, ignore_errors=True)


@contextmanager
def _locked(path: Path, how: int = 0) -> Iterator[IO[str]]:
    """The file at ``path`` under an exclusive lock, which closing it releases."""
    with path.open("a+", encoding="ascii") as file:
        fcntl.flock(file, fcntl.LOCK_EX | how)
        file.seek(0)
        yield file


@contextmanager
def _writable(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"the token cache '{folder}' cannot be written: {error.strerror}; make room there, or put it on another disk "
            f"with XDG_CACHE_HOME=FOLDER"
        ) from error
