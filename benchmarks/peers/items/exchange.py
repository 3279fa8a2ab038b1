"""Work item a: q, k and v from tokens to heads and the output back, beside the bare all-to-all of the same bytes.

Every library moves the same tensors by its own function. The limit moves as many bytes into memory that is there already.
"""

from typing import Any

from benchmarks.figures import bars, by_row
from benchmarks.peers.contest import Entry, Outcome, hold, progress
from benchmarks.peers.page import Section, refusal_row, table
from benchmarks.peers.pairs import verdict

GOAL = 1.3
BARE, COPY, OURS = "bare all-to-all", "copy", "longspan"
SIZES: dict[str, tuple[tuple[int, int, int], ...]] = {  # tokens, query heads, key/value heads
    "quick": ((16384, 16, 16), (16384, 16, 4)),
    "full": ((4096, 16, 16), (65536, 16, 16)),
}


def run(scale: str) -> Section:
    """The tables, and a figure of the time over the bare all-to-all."""
    sections, drawn = [], {}
    for tokens, heads, kv_heads in SIZES[scale]:
        case = {"kind": "exchange", "tokens": tokens, "heads": heads, "kv_heads": kv_heads, "dim": 64}
        progress(f"  exchange of {tokens:,} tokens, {heads} and {kv_heads} heads")
        outcome = hold(entries(case), rounds=21, warm_ups=3)
        sections.append(_section(case, outcome))
        title = f"{tokens:,} tokens, {heads} and {kv_heads} heads"
        drawn[title] = {name: outcome.ratio(name, BARE).median for name in outcome.turns}
    return Section(text="\n\n".join(sections), figure=bars(by_row(drawn), x="time over the bare all-to-all", goal=GOAL))


def entries(case: dict[str, Any]) -> list[Entry]:
    return [
        Entry(name=OURS, side="ulysses", case=case),
        Entry(name="DeepSpeed, UlyssesSPAttentionHF", side="alst", case=case),
        Entry(name="DeepSpeed, DistributedAttention", side="alst", case=case | {"api": "distributed_attention"}),
        Entry(name="ringmaster", side="ringmaster", case=case),
        Entry(name="yunchang", side="yunchang_attention", case=case),
        Entry(name=BARE, side="one_device", case=case),
        Entry(name=COPY, side="one_device", case=case | {"kind": "copy"}),
    ]


def _section(case: dict[str, Any], outcome: Outcome) -> str:
    rows = [
        [name, f"{outcome.median(name) * 1e3:.1f} ms", str(outcome.ratio(name, BARE)), str(outcome.ratio(OURS, name))]
        for name in outcome.turns
    ]
    rows += [refusal_row(name, reason, 4) for name, reason in outcome.refused.items()]
    mib = case["tokens"] // 2 * (2 * case["heads"] + 2 * case["kv_heads"]) * case["dim"] * 4 / 2**20
    title = (
        f"{case['tokens']:,} tokens, {case['heads']} and {case['kv_heads']} heads x {case['dim']}, fp32, {mib:.0f} MiB a rank:"
    )
    held = verdict(outcome.ratio(OURS, BARE), GOAL)
    return (
        f"{title}\n\n{table(['', 'time', 'over the bare all-to-all', 'longspan over it'], rows)}\n\n"
        f"Goal: longspan at most {GOAL} x the bare all-to-all: {held}."
    )
