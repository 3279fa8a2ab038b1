"""Records reach the tracker that is asked for; what is not installed, or fails, is one sentence. The clients are fakes."""

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from longspan.cli import trackers
from longspan.cli.config import Train
from longspan.cli.metrics import Journal
from longspan.errors import RunError


def _fake_client(name: str, calls: list[Any], fails: bool = False) -> types.ModuleType:
    client: Any = types.ModuleType(name)

    def log(metrics: dict[str, float], step: int) -> None:
        if fails and step == 2:
            raise ConnectionError("no server\nat all")
        calls.append((step, metrics))

    def init(**given: Any) -> Any:
        calls.append(given)
        return client

    client.init, client.log, client.finish = init, log, lambda: calls.append("finish")
    client.set_experiment = lambda project: calls.append(project)
    client.start_run = lambda run_name: calls.append(run_name)
    client.log_params, client.log_metrics, client.end_run = calls.append, log, lambda: calls.append("end")
    return client  # type: ignore[no-any-return]


def _recorded(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, fails: bool = False) -> tuple[list[Any], Journal]:
    calls: list[Any] = []
    monkeypatch.setitem(sys.modules, name, _fake_client(name, calls, fails))
    journal = Journal(folder, 0, lead=True, trackers=(name,), settings={"model": "tiny"})
    for step in (1, 2, 3):
        journal.write({"step": step, "loss": 1.0 / step})
    journal.close()
    return calls, journal


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_every_record_reaches_the_tracker(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, journal = _recorded(name, tmp_path, monkeypatch)
    opened = {"project": "longspan", "name": tmp_path.name, "config": {"model": "tiny"}}
    assert calls == [opened, (1, {"loss": 1.0}), (2, {"loss": 0.5}), (3, {"loss": 1 / 3}), "finish"]
    assert journal.fault is None


def test_mlflow_gets_settings_and_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, _ = _recorded("mlflow", tmp_path, monkeypatch)
    assert calls[:3] == ["longspan", tmp_path.name, {"model": "tiny"}]
    assert calls[3:] == [(1, {"loss": 1.0}), (2, {"loss": 0.5}), (3, {"loss": 1 / 3}), "end"]


def test_a_tracker_that_fails_is_kept_for_the_next_agreement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, journal = _recorded("wandb", tmp_path, monkeypatch, fails=True)
    assert str(journal.fault).startswith("wandb did not take the records of the run: no server; mend its settings")
    assert (2, {"loss": 0.5}) not in calls
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2]


def test_what_is_not_installed_or_unknown_is_refused_with_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(RunError, match="needs wandb, which is not installed; pip install wandb"):
        Train(log_to=("wandb",))
    with pytest.raises(RunError, match="log_to='tensorboard' is unknown; legal are wandb, trackio, mlflow"):
        Train(log_to=("tensorboard",))
