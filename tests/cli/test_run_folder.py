"""Two commands that make the folder of a run at the same time."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from longspan.cli import run_folder
from longspan.cli.config import Train
from longspan.cli.run_folder import open_run
from longspan.distributed.mesh import ParallelMesh
from longspan.errors import RunError
from tests.helpers.ranks import Ranks


def _another_command_is_faster(runs: Path, name: str) -> None:
    """Let a folder of this name appear after the command has looked for it, with the settings of another one."""
    write = run_folder.as_json

    def later(config: Train) -> str:
        if config.run == name:
            (runs / name).mkdir()
            (runs / name / "config.json").write_text(json.dumps({"steps": 7}))
        return write(config)

    run_folder.as_json = later


def _open(folder: str, asked: str) -> str:
    _another_command_is_faster(Path(folder), asked or "train-001")
    try:
        return open_run(Train(runs_folder=folder, run=asked), ParallelMesh(2)).name
    except RunError as error:
        return str(error)


@pytest.mark.parametrize(("asked", "found"), [("", "train-002"), ("mine", "exists; go on with --resume mine")])
def test_each_of_two_commands_has_its_own_folder(asked: str, found: str, pool: Callable[[int], Ranks], tmp_path: Path) -> None:
    for answer in pool(2).run(_open, str(tmp_path), asked):
        assert found in answer
    assert json.loads((tmp_path / (asked or "train-001") / "config.json").read_text()) == {"steps": 7}
    if not asked:
        assert json.loads((tmp_path / "train-002" / "config.json").read_text())["run"] == "train-002"
    assert not list(tmp_path.glob(".*"))
