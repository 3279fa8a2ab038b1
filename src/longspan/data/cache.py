"""A cache of folders on disk, each made once by the first process that needs it. Independent of what the folders hold.

    ~/.cache/longspan/
        keys/KEY        a lock file: the process that locks it may make the folder of KEY; its text, if any, is NAME
        .draft-KEY/     a folder that is being made; if no process holds the lock of KEY, a crash left it and it is removed
        NAME/           a complete folder: renamed from its draft after every file was synced to the disk

A KEY is cheap to compute (paths, sizes, times), a NAME is a hash of the content. The operating system releases the lock of
a process that dies, so no other process waits for it.
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
    """The path ``$XDG_CACHE_HOME/longspan``; ``~/.cache/longspan`` if the variable is unset or empty. Creates nothing."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "longspan"


def kept(folder: Path, key: str, name: Callable[[], str], make: Callable[[Path], None], settled: bool) -> Path:
    """Return the cached folder of ``key``; if it does not exist yet, make it first.

    Any number of processes may call it at once with the same key: one makes the folder, the others wait for it.

    Args:
        folder: the cache; created if missing.
        key: the name of the lock file, and of the record of the content's name.
        name: computes the name of the content. Not called if a name is recorded for ``key`` and that folder exists.
        make: writes the content into the empty draft folder that it is given; the draft is then renamed to the result.
        settled: True records the name for ``key``, so that later calls with ``key`` do not call ``name``.

    Returns:
        ``folder / NAME``, where NAME is the recorded name, or else ``name()``.

    Raises:
        DataError: an OSError (disk full, read-only). An error of ``make`` that is no OSError is raised unchanged. In both cases
            the draft is removed.
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
    """Write ``content`` to ``path``, replacing a file that exists, and return once it is on the disk (fsync)."""
    with path.open("wb") as file:
        file.write(content)
        sync(file)


def sync(file: IO[bytes]) -> None:
    """Flush and fsync ``file``: on return its content is on the disk, so a later rename cannot reach the disk before it."""
    file.flush()
    os.fsync(file.fileno())


def _make(draft: Path, path: Path, make: Callable[[Path], None]) -> None:
    """Make the folder ``path``: call ``make`` with the empty folder ``draft``, then rename that; the draft is removed in any
    case."""
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
    """Remove the draft folders whose lock no process holds: the process that was making them has died."""
    for draft in folder.glob(".draft-*"):
        with suppress(BlockingIOError), _locked(folder / "keys" / draft.name.removeprefix(".draft-"), fcntl.LOCK_NB):
            shutil.rmtree(draft, ignore_errors=True)


@contextmanager
def _locked(path: Path, how: int = 0) -> Iterator[IO[str]]:
    """Context manager: open (or create) the file ``path``, lock it exclusively (flock) and yield it at position 0.

    It waits for another process that holds the lock; with ``how=fcntl.LOCK_NB`` it raises BlockingIOError instead. On exit the
    lock is released.
    """
    with path.open("a+", encoding="ascii") as file:
        fcntl.flock(file, fcntl.LOCK_EX | how)
        file.seek(0)
        yield file


@contextmanager
def _writable(folder: Path) -> Iterator[None]:
    """Context manager: an OSError in the block is raised as a DataError that names the cache ``folder``."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"the token cache '{folder}' cannot be written: {error.strerror}; make room there, or put it on another disk "
            f"with XDG_CACHE_HOME=FOLDER"
        ) from error
