"""``longspan check``: compares loss, gradients, gradient norm and traffic of a layout with those of one device (guarantee 1).

    batch of random ids, rows with different numbers of labels
        |-- whole, on every rank, the model of one device --------->  loss, gradients, norm
        |-- sharded over the ranks, the model parallelized -------->  loss, gradients, norm, traffic (decoder only)
                                                                          each line: found, expected, error, bound, verdict

Dropout is off, because the guarantee is stated at dropout 0. The loss of one device is ``cross_entropy`` of its logits: a
Hugging Face model would compute its own loss in fp32.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from longspan.attention.ring import plan_hops
from longspan.batch.context import Part
from longspan.batch.labels import IGNORE
from longspan.batch.shard import shard_batch
from longspan.cli import model_source
from longspan.cli.config import Check
from longspan.cli.metrics import output
from longspan.cli.model_source import DecoderSource, ModelSource
from longspan.cli.report import count
from longspan.distributed.collectives import CountingTransport, TorchTransport
from longspan.distributed.consensus import gather, raise_together
from longspan.distributed.grad_sync import grad_norm
from longspan.distributed.layout import Heads, consecutive, split
from longspan.distributed.mesh import ParallelMesh
from longspan.distributed.traffic import Traffic, attention_traffic, recomputable_attention_traffic, ring_traffic
from longspan.loss import cross_entropy
from longspan.masks import constructors as masks
from longspan.masks.constructors import Causal
from longspan.models.adapter import parallel_state
from longspan.models.decoder_config import DecoderConfig
from longspan.parallelize import parallelize

TOLERANCE = {"fp64": 1e-10, "fp32": 1e-5}
FLOOR = 1e-3
"""A gradient's error is divided by max(its norm on one device, FLOOR * global gradient norm)."""
BF16_RATIO = 1.2
BF16_SEEDS = 8


class Line(NamedTuple):
    """One line of the table: what is compared, its value over the mesh and on one device, the error and the largest legal one.

    The traffic lines compare with the closed form instead of one device.
    """

    what: str
    found: str
    expected: str
    error: float
    bound: float

    @property
    def holds(self) -> bool:
        """Whether ``error <= bound``; False if the error is NaN."""
        return self.error <= self.bound


@dataclass(frozen=True)
class Outcome:
    """The result of one forward and backward: the loss, every parameter's whole gradient in fp64 by name, their global norm."""

    loss: float
    grads: dict[str, Tensor]
    norm: float


def work(config: Check) -> int:
    """Run the check on this rank and print the table on rank 0.

    Returns:
        The exit code, equal on every rank: 0 if every line holds, else 1.

    Raises:
        LongspanError: a layout or model that cannot run; raised on every rank with the same text.
    """
    mesh = ParallelMesh(config.ulysses, config.ring, transport=CountingTransport(TorchTransport()), timeout=config.timeout)
    with raise_together(mesh.world_group):
        source = model_source.from_name(config.model, config.layers, config.heads, config.kv_heads)
    lines = _pooled(config, source, mesh) if config.dtype == "bf16" else _exact(config, source, mesh)
    lines = _worst_of_all_ranks(lines, mesh)
    holds = all(line.holds for line in lines)
    if dist.get_rank() == 0:
        _print(config, source, mesh, lines, holds)
    return 0 if holds else 1


def _exact(config: Check, source: ModelSource, mesh: ParallelMesh) -> list[Line]:
    """The lines of the check's table for fp64 and fp32 on this rank: loss, worst gradient, gradient norm, traffic."""
    dtype = torch.float64 if config.dtype == "fp64" else torch.float32
    ours, traffic = _parallel(config, source, config.seed, dtype, mesh)  # first, because it refuses illegal layouts
    one = _one_device(config, source, config.seed, dtype, mesh)
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
        *_traffic_lines(config, source, mesh, traffic, dtype.itemsize),
    ]


def _pooled(config: Check, source: ModelSource, mesh: ParallelMesh) -> list[Line]:
    """The lines of the check's table for bf16 on this rank: the loss, the error of the gradients over 8 seeds, traffic.

    The error is sqrt(sum of the squared differences from the fp64 gradients of one device), over all parameters and seeds. Its
    bound is on the ratio of this layout's error to that of one device in bf16.
    """
    ours_squared = one_squared = 0.0
    loss_error = 0.0
    for seed in range(config.seed, config.seed + BF16_SEEDS):
        truth = _one_device(config, source, seed, torch.float64, mesh)
        one = _one_device(config, source, seed, torch.bfloat16, mesh)
        ours, traffic = _parallel(config, source, seed, torch.bfloat16, mesh)
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
        *_traffic_lines(config, source, mesh, traffic, torch.bfloat16.itemsize),
    ]


def _one_device(config: Check, source: ModelSource, seed: int, dtype: torch.dtype, mesh: ParallelMesh) -> Outcome:
    model = _model(source, seed, dtype, mesh)
    batch = _batch(config, source, seed, mesh.device)
    labels = batch["labels"] if source.in_place else F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE)
    with _compute_in(dtype, mesh):
        loss = cross_entropy(model(input_ids=batch["input_ids"]).logits, labels)
    loss.backward()
    return _outcome(model, loss)


def _parallel(
    config: Check, source: ModelSource, seed: int, dtype: torch.dtype, mesh: ParallelMesh
) -> tuple[Outcome, tuple[Traffic, Traffic]]:
    assert isinstance(mesh.transport, CountingTransport)
    model = parallelize(_model(source, seed, dtype, mesh), mesh, zero=config.zero, memory=config.memory)
    mine = consecutive(split(config.rows, mesh.coordinate.data))[mesh.coordinate.data_rank]
    whole = _batch(config, source, seed, mesh.device)
    rows = {name: tensor[mine.start : mine.stop] for name, tensor in whole.items()}
    part: Part = shard_batch(rows, mesh, shift=not source.in_place)
    before = mesh.transport.traffic
    with _compute_in(dtype, mesh):
        loss = _loss(model, part, mesh)
    between = mesh.transport.traffic
    loss.backward()
    after = mesh.transport.traffic
    return _outcome(model, loss), (_minus(between, before), _minus(after, between))


def _loss(model: Any, part: Part, mesh: ParallelMesh) -> Tensor:
    """The loss over all ranks: the model's own, or ``cross_entropy`` of its logits if its own loss is not supported."""
    state = parallel_state(model)
    if state is not None and state.adapter.computes_loss():
        loss: Tensor = model(**part).loss
        return loss
    labels = part["shift_labels" if "shift_labels" in part else "labels"]
    inputs = {name: value for name, value in part.items() if "labels" not in name}
    return cross_entropy(model(**inputs).logits, labels, mesh=mesh, num_labels=part["longspan"].num_labels)


def _model(source: ModelSource, seed: int, dtype: torch.dtype, mesh: ParallelMesh) -> nn.Module:
    """The model on the mesh's device in eval mode, with fp64 parameters if ``dtype`` is fp64, else fp32.

    bf16 is the compute dtype of autocast, as in training.
    """
    model = source.build(seed, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    return model.to(mesh.device).eval()


def _compute_in(dtype: torch.dtype, mesh: ParallelMesh) -> AbstractContextManager[object]:
    return torch.autocast(mesh.device.type, dtype) if dtype == torch.bfloat16 else nullcontext()


def _batch(config: Check, source: ModelSource, seed: int, device: torch.device) -> dict[str, Tensor]:
    """``input_ids`` and ``labels`` [rows, tokens], random but equal for equal seeds.

    Row i of R rows keeps about (i + 1) / R of its labels, the others are -100; the last row has none in its second half.
    Token 1 of row 0 always has a label, so that the loss is defined.
    """
    random = torch.Generator("cpu").manual_seed(seed)
    plain = torch.tensor([token for token in range(source.vocab) if token not in source.special], device="cpu")
    ids = plain[torch.randint(len(plain), (config.rows, config.tokens), generator=random, device="cpu")]
    labelled_fraction = (1 + torch.arange(config.rows, device="cpu")[:, None]) / config.rows
    labels = ids.where(torch.rand(ids.shape, generator=random, device="cpu") < labelled_fraction, IGNORE)
    labels[-1, (config.tokens + 1) // 2 :] = IGNORE
    labels[0, 1] = ids[0, 1]
    return {"input_ids": ids.to(device), "labels": labels.to(device)}


def _outcome(model: nn.Module, loss: Tensor) -> Outcome:
    grads = {}
    for name, parameter in model.named_parameters():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad  # BERT's pooler is not used
        grads[name] = (grad.full_tensor() if isinstance(grad, DTensor) else grad).double()
    return Outcome(loss.item(), grads, grad_norm(model.parameters()).item())


def _relative(found: Tensor, expected: Tensor, norm: float) -> float:
    return float((found - expected).norm() / max(float(expected.norm()), FLOOR * norm))


def _squared_error(found: Outcome, truth: Outcome) -> float:
    return sum(float((found.grads[name] - truth.grads[name]).square().sum()) for name in truth.grads)


def _minus(after: Traffic, before: Traffic) -> Traffic:
    return Traffic(after.collectives - before.collectives, after.bytes - before.bytes)


def _traffic_lines(
    config: Check, source: ModelSource, mesh: ParallelMesh, found: tuple[Traffic, Traffic], itemsize: int
) -> list[Line]:
    """The lines of the check's table that compare counted traffic per layer with the closed form, forward and backward.

    Empty for a Hugging Face model, because the closed form is for layers that are all causal and of one shape.
    """
    return _decoder_traffic(config, source.config, mesh, found, itemsize) if isinstance(source, DecoderSource) else []


def _decoder_traffic(
    config: Check, shape: DecoderConfig, mesh: ParallelMesh, found: tuple[Traffic, Traffic], itemsize: int
) -> list[Line]:
    coordinate, layout = mesh.coordinate, mesh.coordinate.layout(config.tokens)
    sizes, dim, rows = (
        layout.sizes(coordinate.ring_rank),
        shape.head_dim,
        split(config.rows, coordinate.data)[coordinate.data_rank],
    )
    chunked = Heads(shape.heads, shape.kv_heads, config.head_chunks)
    once = config.recompute == "selective" or config.head_chunks > 1
    exchange = recomputable_attention_traffic if once else attention_traffic
    held = [layout.batch_runs(rank, rows) for rank in range(coordinate.ring)]
    bands = masks.rows(Causal(), rows, config.tokens, config.tokens)
    hops = plan_hops(bands, held, held, coordinate.ring_rank)[1:]
    leaving, arriving = ([sum(map(len, getattr(hop, keys))) for hop in hops] for keys in ("leaving", "arriving"))
    forward = backward = Traffic()
    for chunk in range(config.head_chunks):
        heads = Heads(len(chunked.query_of(chunk)), len(chunked.kv_of(chunk)), coordinate.ulysses)
        exchanged = exchange(heads, sizes, sizes, coordinate.ulysses_rank, rows=rows, qk_dim=dim, v_dim=dim, itemsize=itemsize)
        width = 2 * dim * len(heads.kv_of(coordinate.ulysses_rank))
        passed = ring_traffic(leaving, arriving, width, itemsize=itemsize, grad_itemsize=max(itemsize, 4))
        forward, backward = forward + exchanged[0] + passed[0], backward + exchanged[1] + passed[1]
    if config.recompute == "full":
        backward = forward + backward  # attention is computed again
    lines = []
    for way, counted, formula in zip(("forward", "backward"), found, (forward, backward)):
        for what in ("collectives", "bytes"):
            a_layer, expected = getattr(counted, what) / shape.layers, getattr(formula, what)
            lines.append(Line(f"{what} a layer, {way}", f"{a_layer:,.10g}", f"{expected:,}", abs(a_layer - expected), 0.0))
    return lines


def _worst_of_all_ranks(lines: list[Line], mesh: ParallelMesh) -> list[Line]:
    """For each line of the table, the version of the rank with the largest error; NaN counts as infinite. A collective."""
    everyone = gather(lines, mesh.world_group)
    return [max(same, key=lambda line: math.inf if math.isnan(line.error) else line.error) for same in zip(*everyone)]


def _print(config: Check, source: ModelSource, mesh: ParallelMesh, lines: list[Line], holds: bool) -> None:
    coordinate = mesh.coordinate
    table = Table("", "found", "expected", "error", "bound", "verdict", box=None, pad_edge=False)
    for line in lines:
        verdict = "[green]holds[/]" if line.holds else "[red]FAILS[/]"
        table.add_row(line.what, line.found, line.expected, f"{line.error:.2g}", f"{line.bound:.2g}", verdict)
    console = output(140)
    console.print(
        f"{count(mesh.world_group.size(), 'rank')} = data {coordinate.data} x "
        f"ring {coordinate.ring} x ulysses {coordinate.ulysses}, zero={config.zero}, "
        f"{config.dtype}: "
        f"{count(config.rows, 'row')} of {config.tokens:,} tokens, {source.summary}",
        highlight=False,
    )
    console.print(table, highlight=False)
    console.print("[green]Guarantee 1 holds.[/]" if holds else "[red]Guarantee 1 FAILS on this machine.[/]", highlight=False)
