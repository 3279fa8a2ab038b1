"""``longspan probe``: what two ranks measure is a file that a plan reads; a file that lacks figures is refused."""

import json
from pathlib import Path

import pytest

from longspan.cli.main import main
from longspan.cli.measure import half_rate_keys


@pytest.mark.usefixtures("launcher")
def test_a_probe_of_two_ranks_is_hardware_of_a_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "hardware.json"
    assert main(["probe", "--ranks", "2", "--largest-mib", "1", "--repeats", "2", "--out", str(path)]) == 0
    found = json.loads(path.read_text())
    assert found["ranks"] == 2
    assert set(found["links"]) == {"all-to-all", "all-gather", "reduce-scatter", "point-to-point"}
    assert all(rate > 0 for rates in found["matmul"].values() for rate in rates.values())
    assert {"matmul fp32 512", "copy", "all-gather, small"} <= set(found["spread"])
    assert all(found["spread"][f"attention, {which}"] > 0 for which in ("forward", "backward"))
    plan = ["plan", "--model", "tiny", "--gpus", "2", "--tokens", "8192", "--rows", "2", "--json", "--hardware", str(path)]
    assert main(plan) == 0
    assert json.loads(capsys.readouterr().out)["hardware"] == found["name"]


def test_a_file_without_figures_and_an_impossible_size_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.json").write_text('{"name": "x"}')
    assert main(["plan", "--hardware", str(tmp_path / "a.json")]) == 2
    assert "lacks ranks, memory" in capsys.readouterr().err
    assert main(["plan", "--hardware", str(tmp_path / "b.json")]) == 2
    assert "longspan probe wrote" in capsys.readouterr().err
    assert main(["probe", "--repeats", "0"]) == 2
    assert "repeats=0 must be at least 1" in capsys.readouterr().err


def test_the_keys_of_half_the_rate_follow_from_two_lengths() -> None:
    rate = {keys: 100.0 * keys / (keys + 64) for keys in (512.0, 2048.0)}
    assert half_rate_keys((512.0, rate[512.0]), (2048.0, rate[2048.0])) == pytest.approx(64)
    assert half_rate_keys((512.0, 50.0), (2048.0, 40.0)) == 0
