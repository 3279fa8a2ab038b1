"""Converts the flat option tables of tests to keywords of ``parallelize``."""

from dataclasses import fields
from typing import Any

from longspan import MemoryOptions


def keywords(flat: dict[str, Any]) -> dict[str, Any]:
    """Move the fields of MemoryOptions into ``memory``; other names stay.

    {"zero": 3, "recompute": "full"} -> {"zero": 3, "memory": MemoryOptions(recompute="full")}
    """
    names = {option.name for option in fields(MemoryOptions)}
    memory = MemoryOptions(**{name: value for name, value in flat.items() if name in names})
    return {name: value for name, value in flat.items() if name not in names} | {"memory": memory}
