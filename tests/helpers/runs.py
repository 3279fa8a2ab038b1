"""Short training runs of the command line, and what they have recorded."""

import json
import random
from pathlib import Path
from typing import Any

from longspan.cli import launch
from longspan.cli.config import Train

WORDS = ["def", "return", "self", "import", "class", "for", "in", "not", "None", "True", "yield", "lambda", "while", "with"]


def write_text(path: Path) -> str:
    """Write 40 documents of words that repeat, 24 kB, as JSON lines; returns the path."""
    choose = random.Random(0)
    documents = [" ".join(choose.choices(WORDS, k=120)) for _ in range(40)]
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    return str(path)


def small(text: str, folder: Path, **settings: Any) -> Train:
    defaults: dict[str, Any] = {"tokens": 64, "steps": 4, "eval_rows": 2, "learning_rate": 1e-3, "warmup_steps": 2}
    return Train(data=(text,), runs_folder=str(folder), **{**defaults, **settings})


def run(config: Train, work: str = "longspan.cli.train:work") -> list[dict[str, float]]:
    """The training records of a run."""
    assert launch.run(work, config, config.local_ranks) == 0
    return records(config)


def records(config: Train) -> list[dict[str, float]]:
    lines = Path(config.runs_folder, config.run or "train-001", "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if "loss" in record]


def column(records: list[dict[str, float]], name: str) -> list[float]:
    return [record[name] for record in records]
