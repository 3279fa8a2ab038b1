"""Work item c: a training step of a Hugging Face Llama: batch, forward, loss, backward, AdamW.

speed-up    one rank's time over two ranks', beside what two independent processes of the bare step get over one
limit       both ranks' compute with every exchange left out, plus the bytes over the throughput of the bare collectives
peak        the FLOPs that the causal mask needs over the step's time, beside the measured GEMM peak of two ranks
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.figures import bars, by_row
from benchmarks.peers.contest import Entry, Outcome, hold, progress
from benchmarks.peers.items.truth import CASES, SMALL, cell
from benchmarks.peers.page import Section, refusal_row, table
from benchmarks.peers.pairs import paired_ratio, spread, verdict

OURS, SHARDED, ALONE = "longspan, zero=0", "longspan, zero=3", "longspan, no exchange"
COLLECTIVES = "its collectives alone"
ONE, BARE, TWINS = "longspan, one rank", "bare model, one rank", "bare model, two independent processes"


@dataclass(frozen=True, kw_only=True)
class Case:
    """One table.

    Attributes:
        title: its heading.
        case: the work.
        entries: makes the contestants of the work; all of them are in memory at once.
        rounds: how many rounds are measured.
        goal: longspan's time over that of the best peer that is right.
    """

    title: str
    case: dict[str, Any]
    entries: Callable[[dict[str, Any]], list[Entry]]
    rounds: int
    goal: float = 1.0


def llama(tokens: int, layers: int, vocab: int = 32000, hidden: int = 512, heads: int = 8, ffn: int = 1408) -> dict[str, Any]:
    """The case of a Llama with heads of 64 (hidden 512) or wider, half as many key/value heads."""
    return {
        "kind": "step", "tokens": tokens, "layers": layers, "vocab": vocab, "hidden": hidden, "heads": heads,
        "kv_heads": heads // 2, "ffn": ffn,
    }  # fmt: skip


WIDE = {"hidden": 1024, "heads": 8, "ffn": 2816}
"""Heads of 128, for the fraction of the GEMM peak."""


def beside_peers(case: dict[str, Any]) -> list[Entry]:
    """longspan, the peers, and the limit of longspan at zero=0."""
    ours = [
        Entry(name=OURS, side="ulysses", case=case),
        Entry(name=SHARDED, side="ulysses", case=case | {"options": {"zero": 3}}),
        Entry(name=ALONE, side="ulysses", case=case | {"alone": True}),
    ]
    peers = [
        Entry(name="DeepSpeed ALST, ZeRO-3", side="alst", case=case | {"stage": 3}),
        Entry(name="ringmaster, FSDP2", side="ringmaster", case=case | {"api": "num_items_in_batch"}),
        Entry(name="yunchang", side="yunchang_attention", case=case),
    ]
    if case["tokens"] > 16384:
        ours.pop(1)  # zero=3: the others' logits and all models at once would not fit into 24 GiB
    return [*ours, *peers, Entry(name=COLLECTIVES, side="one_device", case=bytes_of(case))]


def beside_alst(case: dict[str, Any]) -> list[Entry]:
    """One of longspan and one peer, where all of them at once would not fit into 24 GiB."""
    return [
        Entry(name=SHARDED, side="ulysses", case=case | {"options": {"zero": 3}}),
        Entry(name="DeepSpeed ALST, ZeRO-3", side="alst", case=case | {"stage": 3}),
    ]


def beside_one_rank(case: dict[str, Any]) -> list[Entry]:
    """Two ranks, one rank, and the bare model in one process and in two that know nothing of each other."""
    return [
        Entry(name=SHARDED, side="ulysses", case=case | {"options": {"zero": 3}}),
        Entry(name=ONE, side="ulysses", case=case, ranks=1),
        Entry(name=BARE, side="one_device", case=case, ranks=1),
        Entry(name=TWINS, side="one_device", case=case, ranks=1, worlds=2),
    ]


CASES_OF_SCALE = {
    "quick": (
        Case(title="8,192 tokens, 4 layers x 512, 32,000 words", case=llama(8192, 4), entries=beside_peers, rounds=7),
        Case(title="8,192 tokens, one rank and two", case=llama(8192, 4), entries=beside_one_rank, rounds=7),
    ),
    "full": (
        Case(title="32,768 tokens, 2 layers x 512, 32,000 words", case=llama(32768, 2), entries=beside_peers, rounds=3),
        Case(
            title="8,192 tokens, 4 layers x 512, 128,256 words",
            case=llama(8192, 4, 128256),
            entries=beside_alst,
            rounds=5,
            goal=0.95,
        ),
        Case(
            title="8,192 tokens, 4 layers x 1024, heads of 128",
            case=llama(8192, 4, 8192, **WIDE),
            entries=beside_peers,
            rounds=3,
        ),
        Case(
            title="32,768 tokens, 1 layer x 1024, heads of 128",
            case=llama(32768, 1, 8192, **WIDE),
            entries=beside_peers,
            rounds=3,
        ),
    ),
}


def run(scale: str) -> Section:
    """The tables, and a figure of the seconds of a step on two ranks."""
    sections, drawn = [], {}
    for one in CASES_OF_SCALE[scale]:
        progress(f"  step: {one.title}")
        outcome = hold(one.entries(one.case), one.rounds)
        sections.append(_section(one, outcome, gemm_peak()))
        drawn[one.title] = {name: outcome.median(name) for name in outcome.turns if name not in (ONE, BARE, TWINS, COLLECTIVES)}
    return Section(text="\n\n".join(sections), figure=bars(by_row(drawn), x="seconds of a step on two ranks"))


def bytes_of(case: dict[str, Any]) -> dict[str, Any]:
    """The collectives of a step at zero=0: q, k, v there and the output back, forward and backward, and the gradients."""
    parameters = case["vocab"] * case["hidden"] * 2 + case["layers"] * (
        case["hidden"] ** 2 * 2 + 2 * case["hidden"] ** 2 * case["kv_heads"] // case["heads"] + 3 * case["hidden"] * case["ffn"]
    )
    dim = case["hidden"] // case["heads"]
    return {
        "kind": "collectives", "tokens": case["tokens"], "heads": case["heads"], "kv_heads": case["kv_heads"], "dim": dim,
        "times": 2 * case["layers"], "elements": parameters,
    }  # fmt: skip


def flops_of(case: dict[str, Any]) -> float:
    """FLOPs of a step that the causal mask needs, nothing computed twice: three times the forward's."""
    tokens, hidden, kv = case["tokens"], case["hidden"], case["hidden"] * case["kv_heads"] // case["heads"]
    products = case["layers"] * (2 * hidden**2 + 2 * hidden * kv + 3 * hidden * case["ffn"]) + hidden * case["vocab"]
    attention = case["layers"] * 2 * hidden * (tokens + 1) / 2
    return 3 * 2 * tokens * (products + attention)


def gemm_peak() -> float:
    """FLOP a second of two ranks at once, the best over a sweep of sizes."""
    with tempfile.TemporaryDirectory() as folder, Entry(name="GEMM", side="one_device", case={"kind": "gemm"}).start() as one:
        one.prepare()
        for _ in range(3):
            one.turn()
        one.results(Path(folder) / "rate")
        return float(sum(torch.load(f"{folder}/rate.{rank}")["rate"] for rank in range(2)))


def _section(one: Case, outcome: Outcome, peak: float) -> str:
    best = min((name for name in outcome.turns if name in (OURS, SHARDED)), key=outcome.median)
    rights = {entry.name: right(entry) for entry in one.entries(one.case) if is_peer(entry) and entry.name in outcome.turns}
    rows = [
        [name, f"{outcome.median(name):.2f} s", str(outcome.ratio(best, name)), rights.get(name, "")] for name in outcome.turns
    ]
    rows += [refusal_row(name, reason, 4) for name, reason in outcome.refused.items()]
    return "\n\n".join(
        [
            f"**{one.title}**",
            table(["", "time", f"{best} over it", "right, unequal labels"], rows),
            *_findings(one, outcome, best, rights, peak),
        ]
    )


def is_peer(entry: Entry) -> bool:
    return entry.side not in ("ulysses", "one_device")


def right(entry: Entry) -> str:
    """The cell of "who is right" for this peer with unequal labels, at 128 tokens."""
    extra = {name: value for name, value in entry.case.items() if name in ("stage", "api", "core")}
    return cell(Entry(name=entry.name, side=entry.side, case=SMALL | CASES["unequal labels"] | extra))


def _findings(one: Case, outcome: Outcome, best: str, rights: dict[str, str], peak: float) -> list[str]:
    lines = []
    correct = [name for name, found in rights.items() if found.startswith("right")]
    if correct:
        peer = min(correct, key=outcome.median)
        ratio = outcome.ratio(best, peer)
        lines.append(f"- Best peer that is right: {peer}. {best} over it {ratio}; goal {one.goal}: {verdict(ratio, one.goal)}.")
    if ALONE in outcome.turns:
        limit = [a + b for a, b in zip(outcome.seconds(ALONE), outcome.seconds(COLLECTIVES))]
        ratio = paired_ratio(outcome.seconds(OURS), limit)
        lines.append(
            f"- {OURS} over its limit (no exchange, plus its collectives alone) {ratio}; goal 1.10: {verdict(ratio, 1.10)}."
        )
    rate = flops_of(one.case) / outcome.median(best)
    lines.append(
        f"- {rate / 1e9:.0f} GFLOP/s; the GEMM of two ranks {peak / 1e9:.0f}: {rate / peak:.0%}; goal 54% at heads of 128."
    )
    if {ONE, BARE} <= outcome.turns.keys():
        overhead = outcome.ratio(ONE, BARE)
        lines.append(f"- One rank over the bare model {overhead}; goal 1.02: {verdict(overhead, 1.02, widest=0.02)}.")
    if {ONE, BARE, TWINS} <= outcome.turns.keys():
        independent = [2 * a / b for a, b in zip(outcome.seconds(BARE), outcome.seconds(TWINS))]
        ours = [a / b for a, b in zip(outcome.seconds(ONE), outcome.seconds(best))]
        share = paired_ratio(ours, independent)
        lines.append(
            f"- Speed-up over one rank {spread(ours)}, of two independent processes {spread(independent)}: {share}; goal 0.95: "
            f"{'holds' if share.median >= 0.95 else 'misses'}."
        )
    return ["\n".join(lines)]
