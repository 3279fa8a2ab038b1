"""A measured machine as a cluster: what was measured is what the formulas use."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from longspan.errors import LayoutError
from longspan.planner.cost import attention_time
from longspan.planner.model import dense
from longspan.planner.probed import read_cluster, read_constants
from longspan.planner.setting import Constants, Setting
from longspan.planner.strategy import Recipe, Strategy, Workload

MEASURED = {
    "name": "a machine", "ranks": 4, "memory": 8e9, "host_memory": 32e9, "bandwidth": 1e10, "to_host": 5e9,
    "matmul": {"fp32": {"256": 1e11, "512": 2e11}, "bf16": {"256": 4e11}}, "attention": {"forward": 5e10, "backward": 4e10},
    "links": {"all-to-all": {"bandwidth": 3e9, "latency": 1e-4}, "all-gather": {"bandwidth": 2e9, "latency": 3e-4}},
}  # fmt: skip


def test_the_measured_rates_are_what_the_formulas_use(tmp_path: Path) -> None:
    path = tmp_path / "hardware.json"
    path.write_text(json.dumps(MEASURED))
    found = read_cluster(path, gpus=16, price=1.0)
    assert (found.gpus, found.gpus_per_node, found.price) == (16, 4, 1.0)
    assert found.accelerator.matmul == {"fp32": 2e11, "bf16": 4e11}
    assert (found.inside.bandwidth, found.between.latency) == (2e9, 3e-4)
    shape = dense("x", layers=1, hidden=64, heads=4, ffn=64, vocab=10)
    x = Setting(shape, found, Recipe(dtype="fp32"), Workload(tokens=4096), Constants(attention_keys=1e-9))
    forward, backward = attention_time(x, Strategy())
    assert float(forward) == pytest.approx(shape.attention_flops(4096) / 5e10)
    assert float(backward) == pytest.approx(2.5 * shape.attention_flops(4096) / 4e10)


def test_a_file_that_is_not_a_measurement_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(LayoutError, match="cannot be read"):
        read_cluster(tmp_path / "a.json")
    (tmp_path / "a.json").write_text('{"name": "x", "ranks": 1}')
    with pytest.raises(LayoutError, match="lacks memory"):
        read_cluster(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (None, "lacks name, ranks"),
        ({"bandwidth": 0}, "bandwidth = 0, which must be a number above 0; probe this machine again"),
        ({"memory": math.nan}, "memory = nan"),
        ({"matmul": {"fp32": {"256": 1e11}, "bf16": {"256": -4e11}}}, "matmul bf16 256 = -4"),
        ({"matmul": {"fp32": {"256": 1e11}}}, "is not as longspan probe writes it .KeyError: 'bf16'"),
        ({"attention": {"forward": "fast", "backward": 1.0}}, "attention forward = 'fast'"),
        ({"links": None}, "is not as longspan probe writes it .AttributeError"),
        ({"ranks": True}, "ranks = True"),
    ],
)
def test_figures_that_are_none_are_refused_by_name(change: dict[str, Any] | None, text: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(None if change is None else MEASURED | change))
    for read in (read_cluster, read_constants):
        with pytest.raises(LayoutError, match=text):
            read(tmp_path / "a.json")


def test_what_a_probe_measures_replaces_the_fitted_constants(tmp_path: Path) -> None:
    path = tmp_path / "hardware.json"
    path.write_text(json.dumps(MEASURED))
    assert read_constants(path) == Constants(reserve=0.0)  # a file of an earlier version
    newer = MEASURED | {
        "attention": {"forward": 5e10, "backward": 4e10, "keys": 32.0}, "dispatch": 3e-6,
        "training": {"matmul_share": {"fp32": 0.9}, "elementwise": 2e9},
    }  # fmt: skip
    path.write_text(json.dumps(newer))
    found = read_constants(path)
    assert (found.matmul, found.attention_keys, found.dispatch, found.reserve) == (0.9, 32.0, 3e-6, 0.0)
    assert read_cluster(path).accelerator.elementwise == 2e9
