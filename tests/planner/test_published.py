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


def _printed(tmp_path: Path, rows: list[dict[str, str]], *, without: tuple[str, ...] = (), delimiter: str = ",") -> str:
    path = tmp_path / "rows.csv"
    with path.open("w", newline="", encoding="utf-8-sig" if without else "utf-8") as file:
        writer = csv.DictWriter(file, [c for c in LLAMA if c not in without], extrasaction="ignore", delimiter=delimiter)
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


ODD: dict[str, dict[str, str]] = {
    "a value that is no positive number": {"value": "OOM"},
    "a metric of no run": {"metric": "loss"},
    "hardware without figures: TPU v5p": {"gpu": "TPU v5p"},
    "length of a sequence not given": {"seq_len": "0"},
    "sizes of the model not given": {"hidden": "4k?"},
    "no possible run: Llama-3.1-8B: hidden=4096 is not a multiple of heads=7": {"heads": "7"},
    "degrees multiply to 24, not to 8 GPUs": {"tp": "3"},
    "ZeRO stage unknown: 9": {"zero": "9"},
    "fewer rows of a step than replicas": {"ulysses": "", "dp": "8"},
    "4-bit or integer products": {"precision": "nvfp4"},
    "a rate whose convention of counting operations is not known": {
        "metric": "mfu",
        "flop_convention": "ours",
        "seq_len": "65536",
    },
    "set aside: context": {"suggested_split": "context"},
    "set aside: completeness C": {"completeness": "C"},
}


def test_every_row_that_is_not_compared_is_counted_by_its_reason(tmp_path: Path) -> None:
    run = {"metric": "iter_time", "value": "20", "unit": "s"}
    text = _printed(tmp_path, [run, *(run | odd for odd in ODD.values())])
    for reason in ODD:
        assert f"- 1 rows: {reason}" in text, reason
    assert "| a report | 1 |" in text
    assert "step time: median over sources" in text.splitlines()[-1]


def test_cells_are_read_as_people_write_them_and_columns_may_be_missing(tmp_path: Path) -> None:
    plain = {"metric": "iter_time", "value": "20", "unit": "s"}
    written = plain | {"source": "another", "gpu": "NVIDIA h100 80GB HBM3", "seq_len": "128K", "value": "~20,000", "unit": "ms",
                       "zero": "stage 3", "hidden": " 4,096"}  # fmt: skip
    text = _printed(tmp_path, [plain, written], without=("notes", "table", "flop_convention", "offload"), delimiter=";")
    found = [line.split("|")[2:6] for line in text.splitlines() if line.startswith(("| a report", "| another"))]
    assert found[0] == found[1]
    assert "step time: median over sources" in _printed(tmp_path, []).splitlines()[-1]


def test_a_source_s_own_convention_holds_where_a_row_states_none(tmp_path: Path) -> None:
    run = {"metric": "tflops_per_gpu", "value": "400"}
    stated = run | {"flop_convention": "8 * N + 16 L h s", "source": "a report"}
    text = _printed(tmp_path, [stated, run | {"source": "ALST again"}, run | {"source": "another"}])
    found = [line.split("|")[5] for line in text.splitlines() if line.startswith(("| a report", "| ALST again"))]
    assert len(found) == 2
    assert found[0] == found[1]
    assert "- 1 rows: a rate whose convention" in text


def test_a_longest_sequence_that_is_a_power_of_two_is_an_interval(tmp_path: Path) -> None:
    """What 8 H100 hold here, about 1.1 million tokens, is within 1.25 x 2^20 and more than 1.25 x 2^19."""
    run = {"metric": "max_seq_len", "seq_len": "", "tiled": "loss+mlp"}
    for tokens, near in ((1 << 19, 1), ((1 << 19) + 1, 0)):
        assert _printed(tmp_path, [run | {"value": str(tokens)}]).endswith(f"longest sequence within 1.25 x: {near} of 1\n")
