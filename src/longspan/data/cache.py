"""Folders that are whole or not there, each made once, by whoever comes first. Knows nothing of what is in them.

    ~/.cache/longspan/
        keys/KEY        who holds its lock may make what belongs to KEY; inside it, once known: NAME
        .draft-KEY/     being made; without a holder of its lock it is what a crash left, and goes
        NAME/           whole: renamed when all of it was on the disk

A KEY is cheap to know (paths, sizes, times), a NAME says what the content is. The kernel lets go of the lock of a process
that dies, so nobody waits for the dead.
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
    """The folder called ``name()`` in ``folder``; where it is not there, ``make`` fills a draft that is renamed to it.

    With ``settled`` the key always means this name: it is noted, and ``name`` is not asked again. Any number of processes
    may call it at once: one makes, the others wait for it.

    Raises DataError where the disk refuses (full, read-only), and what ``make`` raises; then nothing half-made stays.
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
    """A small file, on the disk when this returns."""
    with path.open("wb") as file:
        file.write(content)
        sync(file)


def sync(file: IO[bytes]) -> None:
    """Wait until what was written is on the disk: a rename must not overtake it."""
    file.flush()
    os.fsync(file.fileno())


def _make(draft: Path, path: Path, make: Callable[[Path], None]) -> None:
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    try:
        make(draft)
        os.rename(draft, path)
    except OSError:
        if not path.is_dir():  # else the same content under another key was faster
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _sweep(folder: Path) -> None:
    """Remove the drafts of the dead: those whose lock is free."""
    for draft in folder.glob(".draft-*"):
        with suppress(BlockingIOError), _locked(folder / "keys" / draft.name.removeprefix(".draft-"), fcntl.LOCK_NB):
            shutil.rmtree(draft, ignore_errors=True)


@contextmanager
def _locked(path: Path, how: int = 0) -> Iterator[IO[str]]:
    """The file at ``path``, which nobody else has open so; closing it lets go of the lock."""
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
