"""Work item f: who is right. Loss and gradients of each library on two ranks against one device in fp64.

    error of a gradient     ||g - ref|| / max(||ref||, 1e-3 x norm of the whole gradient), the worst over all parameters
    right                   at most 1e-5, the bound of guarantee 1 in fp32, for the loss too

Every library computes in fp32 and is used as its documentation says. What it refuses is no error, but cannot be trained so.
"""

import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.peers import given
from benchmarks.peers.contest import Entry, progress
from benchmarks.peers.contestant import Refused
from benchmarks.peers.page import Section, table

BOUND = 1e-5
SMALL = {"kind": "step", "tokens": 128, "vocab": 97, "hidden": 64, "ffn": 128, "layers": 2, "heads": 4, "kv_heads": 2}
CASES: dict[str, dict[str, Any]] = {
    "all labels": {},
    "unequal labels": {"labels": "unequal"},
    "a rank without labels": {"labels": "half"},
    "packed documents": {"document": 32},
    "window": {"window": 24},
    "MQA": {"kv_heads": 1},
    "odd length": {"tokens": 127},
}
EVERY_OPTION = {"zero": 3, "memory": {"recompute": "selective", "tile_tokens": 32, "head_chunks": 1, "chunked_loss": True}}
LIBRARIES: dict[str, tuple[str, dict[str, Any]]] = {
    "longspan, zero=0": ("ulysses", {}),
    "longspan, zero=3": ("ulysses", {"options": {"zero": 3}}),
    "longspan, every memory option": ("ulysses", {"options": EVERY_OPTION}),
    "DeepSpeed ALST, ZeRO-3": ("alst", {"stage": 3}),
    "DeepSpeed ALST, ZeRO-3, flex attention": ("alst", {"stage": 3, "core": "flex_attention"}),
    "DeepSpeed ALST, ZeRO-2": ("alst", {"stage": 2}),
    "DeepSpeed ALST, ZeRO-0": ("alst", {"stage": 0}),
    "DeepSpeed ALST, ZeRO-3, tiled MLP": ("alst", {"stage": 3, "tiled_mlp": True}),
    "DeepSpeed ALST, ZeRO-3, tiled loss": ("alst", {"stage": 3, "tiled_loss": True}),
    "ringmaster, quickstart, FSDP2": ("ringmaster", {}),
    "ringmaster, num_items_in_batch, FSDP2": ("ringmaster", {"api": "num_items_in_batch"}),
    "ringmaster, ring, FSDP2": ("ringmaster", {"api": "ring"}),
}


def run(scale: str) -> Section:
    """The table; equal in both scales. Several cells are computed at once: errors do not depend on the load."""
    entries = [
        Entry(name=name, side=side, case=SMALL | case | more)
        for name, (side, more) in LIBRARIES.items()
        for case in CASES.values()
    ]
    with ThreadPoolExecutor(4) as pool:
        cells = list(pool.map(cell, entries))
    rows = [[name, *cells[at : at + len(CASES)]] for name, at in zip(LIBRARIES, range(0, len(cells), len(CASES)))]
    return Section(text=table(["worst relative error of a gradient", *CASES], rows))


def cell(entry: Entry) -> str:
    """What a library's row has for one case: "right" with its worst error, the error alone, or its refusal."""
    found = _cell(entry)
    progress(f"  {entry.name}, {entry.case}: {found}")
    return found


def _cell(entry: Entry) -> str:
    try:
        loss, gradient = step_errors(entry)
    except Refused as error:
        return f"refused: {shortened(str(error))}"
    if max(loss, gradient) <= BOUND:  # False for NaN
        return f"right ({gradient:.0e})"
    return (
        "**NaN**"
        if gradient != gradient or loss != loss
        else f"**{gradient:.2g}**" + (f", loss {loss:.1g}" if loss > BOUND else "")
    )


def shortened(reason: str) -> str:
    """The beginning of an error, up to 90 characters."""
    flat = " ".join(reason.split())
    return flat if len(flat) <= 90 else flat[:87] + "..."


def step_errors(entry: Entry) -> tuple[float, float]:
    """The relative error of the loss and the worst of a gradient.

    Raises:
        Refused: the library's own error.
    """
    own = {name: value for name, value in entry.case.items() if name in SMALL or name in ("labels", "document", "window")}
    expected, (found, *_) = _reference(tuple(sorted(own.items()))), _results(entry)
    loss = abs(found["loss"] - expected["loss"]) / abs(expected["loss"])
    return loss, worst(found["gradients"], expected["gradients"])


@cache
def _reference(case: tuple[tuple[str, Any], ...]) -> dict[str, Any]:
    (expected,) = _results(Entry(name="reference", side="one_device", case=dict(case) | {"kind": "reference"}, ranks=1))
    return expected


def worst(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The worst relative error of a gradient; NaN if one of them is not a number, infinite if one is missing."""
    norms = {name: ref.double().norm().item() for name, ref in expected.items()}
    floor = 1e-3 * sum(norm**2 for norm in norms.values()) ** 0.5
    errors = [
        float("inf") if found.get(name) is None else (found[name].double() - ref).norm().item() / max(norms[name], floor)
        for name, ref in expected.items()
    ]
    return float("nan") if any(error != error for error in errors) else max(errors)


def layer_error(entry: Entry) -> float:
    """The worst relative error of the output and the gradients of one attention layer, at 128 tokens."""
    case = entry.case | {"tokens": 128} | {name: 32 for name in ("window", "document") if name in entry.case}
    results = _results(Entry(name=entry.name, side=entry.side, case=case, ranks=entry.ranks))
    mine = given.qkv(case, 64)
    q, k, v = (torch.cat([x.detach()] * 2, 1).double().transpose(1, 2).requires_grad_() for x in mine)
    dout = torch.cat([torch.randn(mine[0].shape, generator=torch.Generator().manual_seed(4))] * 2, 1).double()
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=dense_mask(case), enable_gqa=True).transpose(1, 2)
    grads = [x.transpose(1, 2) for x in torch.autograd.grad(out, (q, k, v), dout)]
    names = ("out", "dq", "dk", "dv")
    expected = dict(zip(names, [out.detach(), *grads]))
    return worst({name: torch.cat([result[name] for result in results], 1) for name in names}, expected)


def dense_mask(case: dict[str, Any]) -> Tensor:
    """Which key each query sees, [tokens, tokens]: causal, within ``window`` keys, within the documents."""
    positions = torch.arange(case["tokens"])
    distance = positions[:, None] - positions[None, :]
    seen = distance >= 0
    if case["mask"] == "window":
        seen &= distance < case["window"]
    if case["mask"] == "packed":
        document = torch.repeat_interleave(torch.tensor(given.documents(case)))
        seen &= document[:, None] == document[None, :]
    return seen


def _results(entry: Entry) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder, entry.start() as one:
        one.prepare()
        one.results(Path(folder) / "results")
        return [torch.load(Path(folder) / f"results.{rank}", weights_only=True) for rank in range(entry.ranks)]
