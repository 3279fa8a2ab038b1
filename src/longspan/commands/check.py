"""Law 1 on this machine: the loss, every gradient, the norm and the traffic of a layout, beside those of one device.

    batch of random ids, unequally labelled
        |-- whole, on every rank, one device's decoder ------------>  loss, gradients, norm
        |-- cut, over the ranks, the same decoder parallelized ---->  loss, gradients, norm, traffic
                                                                          each line: found, expected, error, bound, verdict
"""

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.distributed.tensor import DTensor

from longspan import masks
from longspan.batch import IGNORE, Part, shard
from longspan.collectives import CountingTransport, TorchTransport
from longspan.config import Check
from longspan.gradients import norm
from longspan.layout import Heads, Traffic, attention_traffic, consecutive, ring_traffic, split
from longspan.masks import Causal
from longspan.mesh import ParallelMesh
from longspan.models.decoder import PRESETS, Decoder, DecoderConfig
from longspan.ring import plan_hops
from longspan.sharding import parallelize

TOLERANCE = {"fp64": 1e-10, "fp32": 1e-5}
FLOOR = 1e-3
"""A gradient is compared with its own size, or with this share of all gradients' norm where that is larger."""
BF16_RATIO = 1.2
BF16_SEEDS = 8


class Line(NamedTuple):
    """One line of the verdict: what was compared, what was found and expected, and how far off it may be."""

    what: str
    found: str
    expected: str
    error: float
    bound: float

    @property
    def holds(self) -> bool:
        """NaN holds nothing."""
        return self.error <= self.bound


@dataclass(frozen=True)
class Outcome:
    """What one forward and backward gave on this rank."""

    loss: float
    grads: dict[str, Tensor]
    norm: float


def work(config: Check) -> int:
    """Print the verdict on the lead rank; 0 where the law holds, 1 where it does not."""
    mesh = ParallelMesh(config.ulysses, config.ring, transport=CountingTransport(TorchTransport()))
    shape = _shape(config)
    lines = _pooled(config, shape, mesh) if config.dtype == "bf16" else _exact(config, shape, mesh)
    lines = _of_the_worst_rank(lines, mesh)
    holds = all(line.holds for line in lines)
    if dist.get_rank() == 0:
        _print(config, shape, mesh, lines, holds)
    return 0 if holds else 1


def _shape(config: Check) -> DecoderConfig:
    preset = PRESETS[config.preset]
    return replace(
        preset,
        layers=config.layers or preset.layers,
        heads=config.heads or preset.heads,
        kv_heads=config.kv_heads or config.heads or preset.kv_heads,
    )


def _exact(config: Check, shape: DecoderConfig, mesh: ParallelMesh) -> list[Line]:
    dtype = torch.float64 if config.dtype == "fp64" else torch.float32
    one = _one_device(config, shape, config.seed, dtype, mesh)
    ours, traffic = _parallel(config, shape, config.seed, dtype, mesh)
    worst = max(ours.grads, key=lambda name: _relative(ours.grads[name], one.grads[name], one.norm))
    bound = TOLERANCE[config.dtype]
    return [
        Line("loss", f"{ours.loss:.12g}", f"{one.loss:.12g}", abs(ours.loss - one.loss) / abs(one.loss), bound),
        Line(
            f"worst gradient of {len(one.grads)}: {worst}",
            f"{float(ours.grads[worst].norm()):.12g}",
            f"{float(one.grads[worst].norm()):.12g}",
            _relative(ours.grads[worst], one.grads[worst], one.norm),
            bound,
        ),
        Line("norm of all gradients", f"{ours.norm:.12g}", f"{one.norm:.12g}", abs(ours.norm - one.norm) / one.norm, bound),
        *_traffic_lines(config, shape, mesh, traffic, dtype.itemsize),
    ]


def _pooled(config: Check, shape: DecoderConfig, mesh: ParallelMesh) -> list[Line]:
    """The error against fp64 of this layout in bf16 and of one device in bf16, over all parameters and seeds."""
    ours_squared = one_squared = 0.0
    loss_error = 0.0
    for seed in range(config.seed, config.seed + BF16_SEEDS):
        truth = _one_device(config, shape, seed, torch.float64, mesh)
        one = _one_device(config, shape, seed, torch.bfloat16, mesh)
        ours, traffic = _parallel(config, shape, seed, torch.bfloat16, mesh)
        ours_squared += _squared_error(ours, truth)
        one_squared += _squared_error(one, truth)
        loss_error = max(loss_error, abs(ours.loss - one.loss) / abs(one.loss))
    ratio = math.sqrt(ours_squared / one_squared)
    return [
        Line(f"loss, worst of {BF16_SEEDS} seeds", f"{ours.loss:.7g}", f"{one.loss:.7g}", loss_error, 2.0**-8),
        Line(
            "error of all gradients against fp64, beside that of one device",
            f"{math.sqrt(ours_squared):.4g}",
            f"{math.sqrt(one_squared):.4g}",
            ratio,
            BF16_RATIO,
        ),
        *_traffic_lines(config, shape, mesh, traffic, torch.bfloat16.itemsize),
    ]


def _one_device(config: Check, shape: DecoderConfig, seed: int, dtype: torch.dtype, mesh: ParallelMesh) -> Outcome:
    model = _decoder(shape, seed, dtype, mesh)
    batch = _batch(config, shape, seed, mesh.device)
    with _compute_in(dtype, mesh):
        loss = model(**batch).loss
    loss.backward()
    return _outcome(model, loss)


def _parallel(
    config: Check, shape: DecoderConfig, seed: int, dtype: torch.dtype, mesh: ParallelMesh
) -> tuple[Outcome, tuple[Traffic, Traffic]]:
    assert isinstance(mesh.transport, CountingTransport)
    model = parallelize(_decoder(shape, seed, dtype, mesh), mesh, config.zero)
    mine = consecutive(split(config.rows, mesh.place.data))[mesh.place.data_rank]
    whole = _batch(config, shape, seed, mesh.device)
    part: Part = shard({name: rows[mine.start : mine.stop] for name, rows in whole.items()}, mesh)
    before = mesh.transport.traffic
    with _compute_in(dtype, mesh):
        loss = model(**part).loss
    between = mesh.transport.traffic
    loss.backward()
    after = mesh.transport.traffic
    return _outcome(model, loss), (_minus(between, before), _minus(after, between))


def _decoder(shape: DecoderConfig, seed: int, dtype: torch.dtype, mesh: ParallelMesh) -> Decoder:
    """Parameters are fp64 for fp64, else fp32: bf16 is what the forward and backward compute in, as in training."""
    return Decoder(shape, seed=seed).to(mesh.device, torch.float64 if dtype == torch.float64 else torch.float32)


def _compute_in(dtype: torch.dtype, mesh: ParallelMesh) -> AbstractContextManager[object]:
    return torch.autocast(mesh.device.type, dtype) if dtype == torch.bfloat16 else nullcontext()


def _batch(config: Check, shape: DecoderConfig, seed: int, device: torch.device) -> dict[str, Tensor]:
    """Random ids, of which each row has another share labelled, the last row none in its second half, and one always."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(shape.vocab, (config.rows, config.tokens), generator=random)
    share = (1 + torch.arange(config.rows)[:, None]) / config.rows
    labels = ids.where(torch.rand(ids.shape, generator=random) < share, IGNORE)
    labels[-1, (config.tokens + 1) // 2 :] = IGNORE
    labels[0, 1] = ids[0, 1]
    return {"input_ids": ids.to(device), "labels": labels.to(device)}


def _outcome(model: Decoder, loss: Tensor) -> Outcome:
    grads = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        grads[name] = (parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad).double()
    return Outcome(loss.item(), grads, norm(model.parameters()).item())


def _relative(found: Tensor, expected: Tensor, norm: float) -> float:
    return float((found - expected).norm() / max(float(expected.norm()), FLOOR * norm))


def _squared_error(found: Outcome, truth: Outcome) -> float:
    return sum(float((found.grads[name] - truth.grads[name]).square().sum()) for name in truth.grads)


def _minus(after: Traffic, before: Traffic) -> Traffic:
    return Traffic(after.collectives - before.collectives, after.bytes - before.bytes)


def _traffic_lines(
    config: Check, shape: DecoderConfig, mesh: ParallelMesh, found: tuple[Traffic, Traffic], itemsize: int
) -> list[Line]:
    place, layout = mesh.place, mesh.place.layout(config.tokens)
    heads, rows = Heads(shape.heads, shape.kv_heads, place.ulysses), split(config.rows, place.data)[place.data_rank]
    sizes, dim = layout.sizes(place.ring_rank), shape.head_dim
    exchanged = attention_traffic(
        heads, sizes, sizes, place.ulysses_rank, rows=rows, qk_dim=dim, v_dim=dim, itemsize=itemsize
    )
    held = [layout.batch_runs(rank, rows) for rank in range(place.ring)]
    bands = masks.rows(Causal(), rows, config.tokens, config.tokens)
    hops = plan_hops(bands, held, held, place.ring_rank)[1:]
    leaving, arriving = ([sum(map(len, getattr(hop, keys))) for hop in hops] for keys in ("leaving", "arriving"))
    width = 2 * dim * len(heads.kv_of(place.ulysses_rank))
    passed = ring_traffic(leaving, arriving, width, itemsize=itemsize, grad_itemsize=max(itemsize, 4))
    lines = []
    for way, counted, formula in zip(("forward", "backward"), found, (exchanged[0] + passed[0], exchanged[1] + passed[1])):
        for what in ("collectives", "bytes"):
            a_layer, law = getattr(counted, what) / shape.layers, getattr(formula, what)
            lines.append(Line(f"{what} a layer, {way}", f"{a_layer:,.10g}", f"{law:,}", abs(a_layer - law), 0.0))
    return lines


def _of_the_worst_rank(lines: list[Line], mesh: ParallelMesh) -> list[Line]:
    """Each line as the rank meets it that is furthest off; every rank gives the same verdict."""
    everyone: list[list[Line]] = [lines] * mesh.degree
    if mesh.degree > 1:
        dist.all_gather_object(everyone, lines, group=mesh.agreement_group)
    return [max(same, key=lambda line: math.inf if math.isnan(line.error) else line.error) for same in zip(*everyone)]


def _print(config: Check, shape: DecoderConfig, mesh: ParallelMesh, lines: list[Line], holds: bool) -> None:
    place = mesh.place
    table = Table("", "found", "expected", "error", "bound", "verdict", box=None, pad_edge=False)
    for line in lines:
        verdict = "[green]holds[/]" if line.holds else "[red]FAILS[/]"
        table.add_row(line.what, line.found, line.expected, f"{line.error:.2g}", f"{line.bound:.2g}", verdict)
    console = Console(width=None if Console().is_terminal else 140)
    console.print(
        f"{mesh.degree} ranks = data {place.data} x ring {place.ring} x ulysses {place.ulysses}, zero={config.zero}, "
        f"{config.dtype}: "
        f"{config.rows} rows of {config.tokens:,} tokens, {shape.layers} layers, {shape.heads} query and {shape.kv_heads} "
        f"key/value heads of {shape.head_dim}, {shape.parameters:,} parameters",
        highlight=False,
    )
    console.print(table, highlight=False)
    console.print("[green]The law holds.[/]" if holds else "[red]The law FAILS on this machine.[/]", highlight=False)
