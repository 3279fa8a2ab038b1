"""Rows of published measurements as cases of the planner: model, cluster, software, step, strategy, and what was measured.

A CSV has one metric a row; ``runs`` joins the metrics of one run. ``case`` reads what a row states and infers the rest by rules
that hold for every source; a row that it cannot read is returned with the reason. Rules for software: Megatron and NeMo keep
2 + 4 + 12 bytes a parameter and run fused kernels; DeepSpeed keeps the same without them; FSDP keeps 4 + 4 + 8.
"""

import csv
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from longspan.errors import LongspanError
from longspan.planner.hardware import CLUSTERS, GIGA, H100_500W, MICRO, NVLINK4_H800, Cluster, Link
from longspan.planner.model import ModelShape, dense
from longspan.planner.strategy import Recipe, Strategy, Workload

Row = dict[str, str]
CONFIG = (
    "source", "table", "model", "layers", "hidden", "heads", "gpu", "gpus", "strategy", "ulysses", "ring", "tp", "pp", "dp",
    "zero", "act_ckpt", "offload", "tiled", "seq_len", "global_batch", "micro_batch", "precision",
)  # fmt: skip
"""Columns that say which run a row belongs to."""
OTHERS = ("kv_heads", "ffn", "vocab", "gpus_per_node", "metric", "value", "unit", "flop_convention", "completeness",
          "suggested_split", "notes")  # fmt: skip
"""The other columns that are read; one that a file lacks is as one without entries."""

STEP = ("iter_time", "tokens_per_s_per_gpu", "tokens_per_s_total", "tflops_per_gpu", "mfu", "layer_time_combined")
"""Metrics of which a step time follows, the most direct first."""
ATTENTION = ("attn_fwd_iter_per_s", "attn_iter_per_s fwd", "attn_iter_per_s fwd+bwd", "attn_tflops_per_gpu fwd",
             "attn_tflops_per_gpu bwd")  # fmt: skip
MEMORY = ("peak_mem", "peak_mem_allocated", "peak_mem_reserved", "peak_mem_nvsmi")


@dataclass(frozen=True)
class Case:
    """One published run that the planner can compute."""

    rows: tuple[Row, ...]
    shape: ModelShape
    cluster: Cluster
    recipe: Recipe
    workload: Workload
    strategy: Strategy

    @property
    def source(self) -> str:
        """The source of the run."""
        return self.rows[0]["source"]

    def metric(self, *names: str) -> tuple[str, float] | None:
        """The first of these metrics that was published: (its name, its value)."""
        values = {row["metric"]: number(row["value"]) or 0.0 for row in self.rows}
        return next(((name, values[name]) for name in names if name in values), None)


def runs(path: str | Path) -> list[tuple[Row, ...]]:
    """The rows of a CSV by run; two values of one metric with one configuration are two runs.

    A row without a value, or of a metric that no run has, stands alone, so that it is counted.
    """
    found: list[tuple[tuple[str, ...], list[Row]]] = []
    latest: dict[tuple[str, ...], list[Row]] = {}
    text = Path(path).read_text(encoding="utf-8-sig")
    first = text.partition("\n")[0]
    delimiter = max(",;\t", key=first.count)
    for line in csv.DictReader(text.splitlines(keepends=True), delimiter=delimiter):
        named = {str(name).strip().lower(): cell.strip() for name, cell in line.items() if isinstance(cell, str)}
        row = dict.fromkeys((*CONFIG, *OTHERS), "") | named
        key = tuple(row[column] for column in CONFIG)
        if not number(row["value"]) or row["metric"] not in (*STEP, *ATTENTION, *MEMORY, "max_seq_len"):
            found.append((key, [row]))
            continue
        if key not in latest or row["metric"] in {other["metric"] for other in latest[key]}:
            latest[key] = []
            found.append((key, latest[key]))
        latest[key].append(row)
    return [tuple(rows) for _, rows in found]


def number(text: str) -> float | None:
    """The positive number that a cell holds ("5,762", "~57", "32K" with K = 1,024), None for anything else."""
    found = re.fullmatch(r"[~<>=≈ ]*(\d[\d,]*\.?\d*(?:e[+-]?\d+)?) ?([KM]?)", text.strip(), re.IGNORECASE)
    if found is None:
        return None
    value = float(found[1].replace(",", "")) * {"": 1, "K": 1024, "M": 1024**2}[found[2].upper()]
    return value if 0 < value < float("inf") else None


def case(rows: tuple[Row, ...]) -> Case | str:
    """The case of a run, or the reason why the planner does not model it."""
    try:
        return _case(rows)
    except LongspanError as error:
        return f"no possible run: {error}"


def _case(rows: tuple[Row, ...]) -> Case | str:
    row = rows[0]
    metrics = {r["metric"] for r in rows}
    if not metrics & {*STEP, *ATTENTION, *MEMORY, "max_seq_len"}:
        return "a fact of hardware or a closed form, not a run" if row["suggested_split"] == "calib" else "a metric of no run"
    if number(row["value"]) is None:
        return "a value that is no positive number"
    cluster = _cluster(row)
    if cluster is None:
        return f"hardware without figures: {row['gpu'] or 'not given'}"
    if re.search(r"fp4|int[48]|nf4", row["precision"].lower()):
        return "4-bit or integer products, for which no rate was measured"
    shape = _shape(row, bool(metrics & set(ATTENTION)))
    if shape is None:
        return "sizes of the model not given"
    tokens = _int(row, "seq_len") or (_int(row, "value") if row["metric"] == "max_seq_len" else None)
    if not tokens:
        return "length of a sequence not given"
    recipe = _recipe(row, cluster)
    strategy = _strategy(row, cluster, recipe)
    if isinstance(strategy, str):
        return strategy
    rows_a_step = _int(row, "global_batch") or strategy.data * strategy.micro_batch
    if rows_a_step < strategy.data:
        return "fewer rows of a step than replicas"
    if rows_a_step % (strategy.data * strategy.micro_batch):
        strategy = replace(strategy, micro_batch=max(1, rows_a_step // strategy.data))
    found = Case(rows, shape, cluster, recipe, Workload(tokens=tokens, rows=rows_a_step), strategy)
    if metrics <= set(STEP) and measured_seconds(found) is None:
        return "a rate whose convention of counting operations is not known"
    return found


GPUS = (
    ("A100-40", "a100-40gb"), ("A100", "a100-80gb"), ("A800", "a100-80gb"), ("H100", "h100"), ("H800", "h100"),
    ("H200", "h200"),
    ("GB200", "gb200"), ("GB300", "gb300"), ("B200", "b200"), ("MI300X", "mi300x"), ("L20", "l20"),
)  # fmt: skip
"""Beginnings of the names of devices in the data set, and the clusters of planner/hardware.py that have them."""


def _int(row: Row, column: str) -> int | None:
    found = number(row[column])
    return None if found is None else int(found)


def _cluster(row: Row) -> Cluster | None:
    gpu, gpus = re.sub(r"^(NVIDIA|AMD|INSTINCT|TESLA)[ -]+", "", row["gpu"].upper()), _int(row, "gpus") or 1
    key = next((name for start, name in GPUS if gpu.startswith(start)), None)
    if key is None:
        return None
    if key == "h100" and row["model"].startswith("nanotron"):
        key = "h100-efa"
    found = CLUSTERS[key]
    if "500W" in gpu:
        found = replace(found, accelerator=H100_500W)
    if gpu.startswith("H800"):
        found = replace(found, inside=NVLINK4_H800)
    node = _int(row, "gpus_per_node") or found.gpus_per_node
    network = _network(row["table"] + " " + row["notes"], node)
    if network is not None:
        found = replace(found, between=network)
    return replace(found, gpus=gpus, gpus_per_node=max(1, min(node, gpus)))


def _network(text: str, gpus_per_node: int) -> Link | None:
    """The network that a source states, in Gbit/s of a node."""
    several = re.search(r"(\d+)x(\d+) ?Gb", text)
    whole = re.search(r"(\d+) ?(?:Gbps node|Gbit/s between nodes)", text)
    gbit = int(several[1]) * int(several[2]) if several else int(whole[1]) if whole else 0
    if not gbit:
        return None
    return Link(f"{gbit} Gbit/s a node", 0.97 * gbit / 8 * GIGA / gpus_per_node, 12 * MICRO, "stated by the source")


def _shape(row: Row, attention_only: bool) -> ModelShape | None:
    if attention_only:
        heads, kv, dim = (re.search(pattern, row["model"]) for pattern in (r"hn?(\d+) ?", r"kv ?(\d+)", r"d(\d+)$"))
        sizes = [int(m[1]) for m in (heads, kv, dim) if m]
        if len(sizes) < 3:
            if not (row["heads"] and row["hidden"]):
                return None
            sizes = [int(row["heads"]), int(row["kv_heads"]), int(row["hidden"]) // int(row["heads"])]
        return dense(row["model"], layers=1, hidden=sizes[0] * sizes[2], heads=sizes[0], kv_heads=sizes[1], ffn=1, vocab=1)
    sizes = [_int(row, column) for column in ("layers", "hidden", "heads", "ffn", "vocab")]
    if None in sizes:
        return None
    layers, hidden, heads, ffn, vocab = (int(size or 0) for size in sizes)
    old = row["model"].startswith(("GPT", "MPT", "Nemotron")) and row["model"] != "GPT3-5B"
    tied = row["model"].startswith(("GPT", "MPT", "Qwen3-4B", "Llama-3.2")) or (row["model"] in TIED_ALONE and row["pp"] == "1")
    dim = 128 if row["model"].startswith("Qwen3") else None
    kv = _int(row, "kv_heads") or heads
    return dense(row["model"], layers=layers, hidden=hidden, heads=heads, kv_heads=kv, ffn=ffn, vocab=vocab, head_dim=dim,
                 gated=not old, tied=tied)  # fmt: skip


TIED_ALONE = ("nanotron-1B", "nanotron-3B")
"""Models whose head is tied without a pipeline only."""


def _recipe(row: Row, cluster: Cluster) -> Recipe:
    text, strategy = f"{row['table']} {row['notes']}".lower(), row["strategy"].lower()
    fp8 = "fp8" in row["precision"]
    dtype: Any = "fp8" if fp8 else "fp32" if row["precision"].lower() == "fp32" else "bf16"
    recipe = Recipe(dtype=dtype, chunked_products=3)  # Liger, ALST and torchtitan form a chunk's gradients in the forward
    old = row["precision"] == "fp16" or "no flash" in text
    nanotron = row["model"].startswith("nanotron")
    fsdp = strategy.startswith("fsdp")
    megatron = not fsdp and (
        "megatron" in strategy or "tp-sp+" in strategy or strategy in ("tp", "tp+sp") or "zero1" in strategy
    )
    native = (megatron and not nanotron and not old) or "megatron-bridge" in row["source"].lower()
    deepspeed = "zero3" in strategy
    if megatron or native or deepspeed or nanotron:
        recipe = replace(recipe, parameter_bytes=2, gradient_bytes=4, optimizer_bytes=12)
    if native and not strategy.startswith("zero1"):
        recipe = replace(recipe, compiled=True, attention="fused", overlapped_tensor=True, saves_gathered=False)
    if nanotron:  # gradients of the compute dtype stay in the reducer's buckets; the loss keeps shifted logits in fp32
        recipe = replace(recipe, bucket_bytes=2, logit_bytes=10)
    elif not fsdp:
        recipe = replace(recipe, balanced_stages=False)
    if "compile" in row["strategy"] or ("cumulative" in text and "chunked" in strategy):
        recipe = replace(recipe, compiled=True, logit_bytes=14 if fsdp else 10)  # torchtitan compiles its blocks, not its loss
    if fsdp and (_int(row, "tp") or 1) > 1:  # a loss over a sharded vocabulary (DTensor) has one more fp32 copy
        recipe = replace(recipe, logit_bytes=18)
    if old:
        sharded = "sp" in strategy.replace("tp+sp", "sp") and "no sequence parallel" not in strategy
        recipe = replace(recipe, attention="unfused", sharded_norms=sharded, selective="attention", reduced_bytes=2,
                         saves_gathered=False)  # fmt: skip
    if "async" in strategy:
        recipe = replace(recipe, overlapped_tensor=True)
    if "pure" in row["precision"]:
        recipe = replace(recipe, parameter_bytes=2, gradient_bytes=2, optimizer_bytes=4)
    if "sel-op" in row["act_ckpt"]:
        recipe = replace(recipe, selective="operators")
    if cluster.accelerator.name.startswith(("B200", "GB")):
        recipe = replace(recipe, attention="fused")
    if row["metric"] in ATTENTION and "fa3" in text:
        recipe = replace(recipe, attention="fused")
    if strategy == "fsdp":
        recipe = replace(recipe, reduced_bytes=2)
    return recipe


def _strategy(row: Row, cluster: Cluster, recipe: Recipe) -> Strategy | str:
    stage = re.search(r"\d", row["zero"])
    if stage is not None and int(stage[0]) > 3:
        return f"ZeRO stage unknown: {row['zero']}"
    degree = {axis: _int(row, column) or 1 for axis, column in
              (("ulysses", "ulysses"), ("ring", "ring"), ("tensor", "tp"), ("pipeline", "pp"))}  # fmt: skip
    product = degree["ulysses"] * degree["ring"] * degree["tensor"] * degree["pipeline"]
    if product == 1 and not row["dp"] and cluster.gpus > 1:
        return "degrees not given"
    data = _int(row, "dp") or max(1, cluster.gpus // product)
    if product * data != cluster.gpus:
        return f"degrees multiply to {product * data}, not to {cluster.gpus} GPUs"
    act, stages = row["act_ckpt"], re.search(r"VP=(\d+)", row["notes"])
    recompute: Any = "full" if act == "full" else "selective" if act.startswith("selective") else "none"
    chunked = row["tiled"] not in ("", "none") or "chunked CE" in row["strategy"]
    interleaved = int(stages[1]) if stages and degree["pipeline"] > 1 else 1
    return Strategy(
        **degree,
        data=data,
        zero=int(stage[0]) if stage else 0,
        recompute=recompute,
        micro_batch=_int(row, "micro_batch") or 1,
        stages_per_rank=interleaved,
        chunked_loss=chunked,
        offload_optimizer="optimizer" in row["offload"] and "not stated" not in row["offload"],
        offload_parameters="weights" in row["offload"] or "params" in row["offload"],
    )


def measured_memory(c: Case, others: Iterable[Case]) -> tuple[str, float] | None:
    """What a run measured of memory, and its bytes: "allocated", "reserved" (by the allocator) or "device" (nvidia-smi).

    A source that says "reserved" anywhere means it everywhere, and torchtitan logs it; ``others`` are the runs of all sources.
    """
    found = c.metric(*MEMORY)
    if found is None:
        return None
    name, value = found
    unit = next(row["unit"] for row in c.rows if row["metric"] == name)
    what = {"peak_mem_nvsmi": "device", "peak_mem_reserved": "reserved"}.get(name, "allocated")
    notes = (row["notes"].lower() for other in others if other.source == c.source for row in other.rows)
    if name == "peak_mem" and ("torchtitan" in c.source.lower() or any("reserved" in note for note in notes)):
        what = "reserved"
    return what, value * {"gib": 2.0**30, "mib": 2.0**20, "mb": 1e6, "tb": 1e12}.get(unit.lower().split("/")[0], 1e9)


CONVENTIONS = (
    ("8n'+8", "8n'+8"), ("6(n-emb_in)+6", "6(n-emb_in)+6"), ("6(n-emb_in)+12", "6(n-emb_in)+12"), ("8n+16", "8n+16"),
    ("6n+12", "6n+12"), ("6n+6", "6n+6"), ("v/12", "72bslh^2"), ("96bslh", "96bslh^2"), ("72bslh", "96bslh^2"),
    ("megatron", "96bslh^2"),
)  # fmt: skip
"""Parts of a stated convention in small letters without spaces, and the convention that they mean, the first that is found."""
OF_SOURCES = (
    ("alst", "8n+16"), ("ulysses", "8n+16"), ("korthikanti", "72bslh^2"), ("nemo", "6(n-emb_in)+12"),
    ("bridge", "6(n-emb_in)+6"), ("playbook", "6n+12"), ("nanotron", "6n+12"), ("foundry", "6n+12"),
    ("veomni", "6(n-emb_in)+12"), ("xtuner", "8n'+8"), ("internevo", "96bslh^2"),
)  # fmt: skip
"""Parts of the names of sources, and the convention that they use where a row states none."""


def flops_per_token(c: Case) -> float | None:
    """Operations of a token in forward and backward by the convention that the source states, for its TFLOP/s and MFU."""
    row, s, tokens = c.rows[0], c.shape, c.workload.tokens
    stated = next((r["flop_convention"] for r in c.rows if r["metric"] in ("tflops_per_gpu", "mfu")), "")
    text = re.sub(r"[\s*x]", "", stated.lower())
    found = next((name for part, name in CONVENTIONS if part in text), None)
    if not text:
        found = next((name for part, name in OF_SOURCES if part in row["source"].lower()), None)
    lhs, square = s.layers * s.hidden * tokens, s.layers * s.hidden**2
    inner = s.parameters - (0 if s.tied else s.embedding_parameters)
    as_if_multi_head = s.parameters + s.layers * s.hidden * (2 * s.heads * s.qk_dim - s.kv_width)
    return {
        "6(n-emb_in)+6": 6 * inner + 6 * lhs,
        "6(n-emb_in)+12": 6 * inner + 12 * lhs,
        "6n+12": (6 * inner if "NeMo" in row["source"] else 6 * s.parameters) + 12 * lhs,
        "6n+6": 6 * s.parameters + 6 * lhs,
        "8n+16": 8 * s.parameters + 16 * lhs,
        "8n'+8": 8 * as_if_multi_head + 8 * lhs,
        "72bslh^2": 72 * square + 12 * lhs + 6 * s.hidden * s.vocab,
        "96bslh^2": (96 * square + 16 * lhs + 6 * s.hidden * s.vocab) * (1 if c.strategy.recompute == "full" else 0.75),
        None: None,
    }[found]


def measured_seconds(c: Case) -> float | None:
    """The step time that follows from the most direct metric of a run, None where there is none."""
    found = c.metric(*STEP)
    if found is None:
        return None
    name, value = found
    tokens = c.workload.tokens * c.workload.rows
    flops = flops_per_token(c)
    peak = c.cluster.accelerator.peak.get("bf16", 1.0)
    unit = next(row["unit"].lower() for row in c.rows if row["metric"] == name)
    if name == "iter_time":
        return value * (1e-3 if unit.startswith("ms") else 1)
    if name == "layer_time_combined":
        return value * 1e-3
    if name == "tokens_per_s_total":
        return tokens / value
    if name == "tokens_per_s_per_gpu":
        return tokens / (value * c.cluster.gpus)
    if flops is None:
        return None
    return tokens * flops / (value * 1e12 if name == "tflops_per_gpu" else value / 100 * peak) / c.cluster.gpus
