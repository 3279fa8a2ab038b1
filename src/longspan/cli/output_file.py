"""The file that a command writes its result to, looked at before the work begins."""

from pathlib import Path

from longspan.errors import RunError


def refuse_no_file(name: str, path: str | None) -> None:
    """Raise RunError if the setting ``name`` is a folder or a file in a folder that does not exist; None names no file."""
    if path is None:
        return
    if not Path(path).parent.is_dir():
        raise RunError(f"{name}={path!r} is in a folder that does not exist; make it first, or name another file")
    if Path(path).is_dir():
        raise RunError(f"{name}={path!r} is a folder; name a file in it")
