"""Settings in files: a config of the user's, and the record that every run leaves; with proposals for names that are wrong.

    FILE.toml, FILE.json                      --read_file-->  {name: value}  --known-->  the same, if every name is a setting
    runs/NAME/config.json  <--as_json-- settings of the run  --settings_of_run-->  (NAME, {name: value})

Independent of which settings there are; imports no torch.
"""

import json
import re
import tomllib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, fields
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from typing import Any

from longspan.errors import RunError
from longspan.planner.model import PRESETS

OTHER_NAMES = {
    "batch_size": "rows_per_step", "global_batch_size": "rows_per_step", "gradient_accumulation_steps": "micro_batches",
    "nproc_per_node": "ranks", "gpus": "ranks", "world_size": "ranks", "sequence_parallel": "ulysses",
    "tp": "tensor", "tp_size": "tensor", "tensor_parallel": "tensor", "tensor_model_parallel_size": "tensor",
    "pp": "pipeline", "pp_size": "pipeline", "pipeline_parallel": "pipeline", "pipeline_model_parallel_size": "pipeline",
    "pipeline_schedule": "schedule", "virtual_pipeline_model_parallel_size": "stages_per_rank",
    "context_parallel": "ring", "stage": "zero", "gradient_checkpointing": "recompute", "bf16": "dtype",
    "lr": "learning_rate", "max_steps": "steps", "num_train_epochs": "epochs", "max_grad_norm": "clip_norm",
    "seq_len": "tokens", "seq_length": "tokens", "max_length": "tokens", "context_length": "tokens",
    "output_dir": "runs_folder", "name": "run",
}  # fmt: skip
"""Names of settings in other tools, each with the name of the setting here; for "did you mean" in messages."""

LATEST = "latest"
"""The name that ``--resume`` and ``evaluate`` use if no run is named; also the file that holds the name of the latest run."""


def read_file(path: str) -> dict[str, Any]:
    """Read the settings in the JSON file ``path``, or in a TOML file (its name ends in .toml).

    Returns:
        {name: value or list}, with ``-`` in names replaced by ``_``; ``known`` checks the names later.

    Raises:
        RunError: the file cannot be read, is not valid JSON or TOML, holds no names with values, or has a table.
    """
    if path.lower().endswith((".yaml", ".yml")):
        raise RunError(
            f"the config {path} is YAML; write the settings as TOML (name = value) into a file whose name ends in .toml"
        )
    is_toml = path.endswith(".toml")
    try:
        text = Path(path).read_text(encoding="utf-8")
        values = tomllib.loads(text) if is_toml else json.loads(text)
    except OSError as error:
        raise RunError(f"the config {path} cannot be read: {error.strerror}; name a JSON or TOML file that exists") from error
    except ValueError as error:  # also bytes that are no text
        advice = "" if is_toml or path.endswith(".json") else "; where it is TOML, end its name in .toml"
        raise RunError(f"the config {path} is not valid {'TOML' if is_toml else 'JSON'}: {error}{advice}") from error
    if not isinstance(values, dict):
        raise RunError(f"the config {path} holds a {type(values).__name__}; it must hold names and values")
    if tables := [name for name, value in values.items() if isinstance(value, dict)]:
        raise RunError(
            f"the config {path} has the table {tables[0]}; every setting is one value or a list: write the settings at the top "
            f"level, without tables"
        )
    return {name.replace("-", "_"): value for name, value in values.items()}


def settings_of_run(runs_folder: str, name: str) -> tuple[str, dict[str, Any]]:
    """Read the settings with which a run was started.

    Args:
        runs_folder: the folder of all runs.
        name: the name of the run, or ``latest`` for the one started last.

    Returns:
        (the run's name, its settings by name).

    Raises:
        RunError: there is no such run (the message lists those that exist), or its settings cannot be read.
    """
    legal_folder(runs_folder)
    folder = Path(runs_folder)
    with suppress(OSError, ValueError):  # nor bytes that are no text
        name = (folder / LATEST).read_text().strip() if name == LATEST else name
    config = folder / name / "config.json"
    if config.is_file():
        return name, read_file(str(config))
    there = sorted(path.parent.name for path in folder.glob("*/config.json"))
    which = f"there are {', '.join(there)}" if there else "there is none; start one with: longspan train"
    raise RunError(f"no run {name!r} in the folder {runs_folder}: {which}")


def known(kind: type[Any], values: dict[str, Any], where: str) -> dict[str, Any]:
    """``values`` unchanged, if all its names are fields of the settings class ``kind`` and its switches are true or false.

    Raises:
        RunError: some names are no fields; the message lists them, begins with ``where`` and suggests the nearest field. Or a
            switch has another value, or a field that is no switch is true or false (but ``resume``, which is then the latest).
    """
    names = [field.name for field in fields(kind)]
    if strange := sorted(set(values) - set(names)):
        near = "".join(f" (did you mean {name}?)" for name in close(strange[0], names))
        raise RunError(
            f"{where} sets {', '.join(strange)}, unknown to {kind.__name__.lower()}{near}; legal are {', '.join(names)}"
        )
    switches = {field.name for field in fields(kind) if field.type is bool}
    for name, value in values.items():
        if isinstance(value, bool) != (name in switches) and (name, value) != ("resume", True):
            legal = "is a switch: write true or false, without quotes" if name in switches else "is no switch: write its value"
            raise RunError(f"{where} sets {name} to {json.dumps(value, default=str)}, but {name} {legal}")
    return values


def suggest_config(sentence: str) -> str:
    """``sentence``, a parser's error; with a suggestion, if the word that it names last looks like a file of settings."""
    word = sentence.rpartition(" ")[2]
    if sentence.startswith("Unrecognized options") and (word in PRESETS or word.startswith("hf:")):
        return f"{sentence} (did you mean --model {word}?)"
    meant = sentence.startswith("Unrecognized options") and word.endswith((".toml", ".json"))
    return f"{sentence} (did you mean --config {word}?)" if meant else sentence


def refuse_units(kind: type[Any], flags: Sequence[str]) -> None:
    """Raise RunError for a whole number that one of ``flags`` writes with a unit, as in ``--tokens 128k``; it names the number.

    k is 1024 and m is 1024²; ``kind`` is the class of the settings.
    """
    numbers = {f"--{field.name.replace('_', '-')}" for field in fields(kind) if "int" in re.findall(r"\w+", str(field.type))}
    words = [word for flag in flags for word in (flag.split("=", 1) if flag.startswith("--") else [flag])]
    for flag, word in pairwise(words):
        found = re.fullmatch(r"(\d+(?:\.\d+)?)([kKmM])", word)
        if flag in numbers and found:
            value = float(found[1]) * 1024 ** (1 + (found[2] in "mM"))
            raise RunError(f"{flag} takes a whole number, not {word!r}: {value:.0f}")


def close(word: str, names: Sequence[str]) -> list[str]:
    """The name in ``names`` that a wrong ``word`` most likely means, as a list of one; [] if none is near.

    It is the name that OTHER_NAMES gives for ``word``, else the nearest spelling.
    """
    other = OTHER_NAMES.get(word, "")
    return [other] if other in names else get_close_matches(word, names, 1)


def as_json(config: Any) -> str:
    """All settings as JSON text, which ``read_file`` can read; config.json in a run's folder holds it."""
    return json.dumps(asdict(config), indent=2) + "\n"


def legal_folder(runs_folder: str) -> None:
    """Raise RunError if ``runs_folder`` is a file."""
    path = Path(runs_folder)
    if path.exists() and not path.is_dir():
        raise RunError(f"runs_folder='{runs_folder}' is a file; name a folder, which is made where it does not exist")
