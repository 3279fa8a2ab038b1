"""The comparison with published measurements: rows become runs, conventions become seconds, what is not modelled is counted."""

import csv
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
LLAMA = {
    "source": "a report", "table": "", "model": "Llama-3.1-8B", "layers": "32", "hidden": "4096", "heads": "32",
    "kv_heads": "8", "ffn": "14336", "vocab": "128256", "gpu": "H100-80GB", "gpus": "8", "gpus_per_node": "8",
    "strategy": "ulysses+zero3", "ulysses": "8", "ring": "", "tp": "", "pp": "", "dp": "1", "zero": "3", "act_ckpt": "full",
    "offload": "", "tiled": "loss", "seq_len": "131072", "global_batch": "1", "metric": "", "value": "", "unit": "",
    "micro_batch": "1", "precision": "bf16", "flop_convention": "", "completeness": "A", "suggested_split": "dev", "notes": "",
}  # fmt: skip
"""One row of the file: its columns, with the values of a run on 8 GPUs."""


def _printed(tmp_path: Path, rows: list[dict[str, str]]) -> str:
    path = tmp_path / "rows.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(LLAMA))
        writer.writeheader()
        writer.writerows(LLAMA | row for row in rows)
    command = [sys.executable, str(ROOT / "benchmarks" / "validate_planner.py"), str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_metrics_of_one_run_are_one_row_and_every_row_left_out_is_counted(tmp_path: Path) -> None:
    seconds = 131_072 / (1800 * 8)
    convention = "6N+12Lhs per token"
    rate = 131_072 * (6 * 8_030_261_248 + 12 * 32 * 4096 * 131_072) / 8 / seconds / 1e12
    text = _printed(
        tmp_path,
        [{"metric": "tokens_per_s_per_gpu", "value": "1800"},
         {"metric": "tflops_per_gpu", "value": f"{rate}", "flop_convention": convention},
         {"metric": "tflops_per_gpu", "value": f"{rate}", "flop_convention": convention, "source": "another"},
         {"metric": "peak_mem", "value": "30", "unit": "GB", "gpu": "abacus"}],
    )  # fmt: skip
    found = [line.split("|")[2:6] for line in text.splitlines() if line.startswith(("| a report", "| another"))]
    assert [float(cells[0]) for cells in found] == [1, 1]
    assert found[0][3] == found[1][3], "one step time follows from tokens a second and from the convention"
    assert "1 rows: hardware without figures: abacus" in text
    assert "1 of 4 rows of completeness A" in text
    assert "step time: median over sources" in text.splitlines()[-1]


def test_the_time_of_a_layer_is_compared_with_one_layer(tmp_path: Path) -> None:
    """A layer of 32 and a step are far apart: the prediction for the layer is that of a layer."""
    text = _printed(tmp_path, [{"metric": "layer_time_combined", "value": "100"}, {"metric": "iter_time", "value": "1",
                                                                                  "source": "another"}])  # fmt: skip
    found = [line.split("|")[5] for line in text.splitlines() if line.startswith(("| a report", "| another"))]
    layer, step = (float(cell) for cell in found)
    assert 25 < step / (layer * 0.1) < 40
