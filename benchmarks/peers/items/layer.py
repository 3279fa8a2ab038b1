"""Work item b: one attention layer, forward and backward, under a causal mask, GQA, packed documents and a window.

A library that has no packed documents is given a user's loop over them, inside the exchange; one that masks by itself does so.
"right" compares output and gradients with one device in fp64 at 128 tokens, on the same path.
"""

from dataclasses import dataclass
from typing import Any

from benchmarks.figures import bars, by_row
from benchmarks.peers.contest import Entry, Outcome, hold, progress
from benchmarks.peers.items.truth import layer_error
from benchmarks.peers.page import Section, refusal_row, table

OURS = "longspan"
BOUND = 1e-4
"""Largest relative error of a layer in fp32 that counts as right."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One table: its title, the work, and how many rounds are measured."""

    title: str
    case: dict[str, Any]
    rounds: int
    goals: str


def _layer(mask: str, tokens: int, heads: int, kv_heads: int, **more: Any) -> dict[str, Any]:
    return {"kind": "layer", "mask": mask, "tokens": tokens, "heads": heads, "kv_heads": kv_heads, "dim": 64, **more}


CASES = {
    "quick": (
        Case(title="causal, 4,096 tokens, 8 heads", case=_layer("causal", 4096, 8, 8), rounds=11,
             goals="at most 1.00 of the best peer"),
        Case(title="causal, 4,096 tokens, GQA 8 and 2 heads", case=_layer("causal", 4096, 8, 2), rounds=11,
             goals="at most 1.00 of the best peer"),
        Case(title="packed documents of 2,048 in the mean, 8,192 tokens, 8 heads",
             case=_layer("packed", 8192, 8, 8, document=2048), rounds=7,
             goals="at most 1.00 of a user's loop, 0.25 of the best peer that masks by itself"),
        Case(title="window of 1,024, 32,768 tokens, 4 heads", case=_layer("window", 32768, 4, 4, window=1024), rounds=3,
             goals="at most 0.25 of the best peer"),
    ),
    "full": (
        Case(title="causal, 16,384 tokens, 8 heads", case=_layer("causal", 16384, 8, 8), rounds=5,
             goals="at most 1.00 of the best peer"),
        Case(title="packed documents of 2,048 in the mean, 32,768 tokens, 4 heads",
             case=_layer("packed", 32768, 4, 4, document=2048), rounds=3,
             goals="at most 1.00 of a user's loop, 0.25 of the best peer that masks by itself"),
    ),
}  # fmt: skip


def run(scale: str) -> Section:
    """The tables, and a figure of the time over that of longspan."""
    sections, drawn = [], {}
    for one in CASES[scale]:
        progress(f"  layer: {one.title}")
        outcome = hold(entries(one.case), one.rounds)
        sections.append(_section(one, outcome))
        drawn[one.title] = {name: outcome.ratio(name, OURS).median for name in outcome.turns}
    return Section(text="\n\n".join(sections), figure=bars(by_row(drawn), x="time over that of longspan", goal=1.0))


def entries(case: dict[str, Any]) -> list[Entry]:
    peers = [
        Entry(name="DeepSpeed, UlyssesSPAttentionHF", side="alst", case=case),
        Entry(name="ringmaster, Ulysses", side="ringmaster", case=case),
        Entry(name="ringmaster, ring", side="ringmaster", case=case | {"api": "ring"}),
        Entry(name="yunchang, UlyssesAttention", side="yunchang_attention", case=case),
        Entry(name="yunchang, LongContextAttention (ring)", side="yunchang_attention", case=case | {"api": "ring"}),
        Entry(name="PyTorch, context_parallel", side="torch_context_parallel", case=case),
    ]
    if case["mask"] == "packed":
        peers.insert(1, Entry(name="DeepSpeed, a user's loop over documents", side="alst", case=case | {"api": "loop"}))
    if case["mask"] == "window":  # last, because its mask takes 4 GiB a rank at 32,768 tokens
        peers.append(Entry(name="DeepSpeed, a user's dense mask", side="alst", case=case | {"api": "dense"}))
    limits = (
        []
        if case["mask"] == "window"
        else [Entry(name="fused attention, no exchange", side="one_device", case=case | {"ranks": 2})]
    )
    return [Entry(name=OURS, side="ulysses", case=case), *peers, *limits]


def _section(one: Case, outcome: Outcome) -> str:
    by_name = {entry.name: entry for entry in entries(one.case)}
    rows = []
    for name in outcome.turns:
        right = "" if name.startswith("fused") else _right(by_name[name])
        rows.append([name, f"{outcome.median(name):.3f} s", str(outcome.ratio(OURS, name)), right])
    rows += [refusal_row(name, reason, 4) for name, reason in outcome.refused.items()]
    return f"**{one.title}** ({one.goals})\n\n{table(['', 'time', 'longspan over it', 'right'], rows)}"


def _right(entry: Entry) -> str:
    error = layer_error(entry)
    return f"yes ({error:.0e})" if error <= BOUND else f"no ({error:.1e})"
