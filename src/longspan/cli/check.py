"""``longspan check``: compares loss, gradients, gradient norm and traffic of a layout with those of one device (guarantee 1).

    batch of random ids, rows with different numbers of labels
        |-- whole, on every rank, the model of one device --------->  loss, gradients, norm
        |-- in micro-batches, sharded over the ranks, the model
            parallelized ------------------------------------------>  loss, gradients, norm, traffic (decoder only)
                                                                          each line: found, expected, error, bound, verdict

Dropout is off, because the guarantee is stated at dropout 0. The loss of one device is ``cross_entropy`` of its logits: a
Hugging Face model would compute its own loss in fp32.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import reduce

import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from longspan.batch.context import Part
from longspan.batch.labels import IGNORE
from longspan.batch.shard import shard_batch
from longspan.cli import certificate, model_source
from longspan.cli.certificate import Line
from longspan.cli.config import Check
from longspan.cli.expected_traffic import by_axis
from longspan.cli.metrics import output
from longspan.cli.model_source import DecoderSource, ModelSource
from longspan.cli.summary import count, degrees
from longspan.distributed.collectives import CountingTransport, TorchTransport
from longspan.distributed.consensus import gather, raise_together, refuse_other_settings
from longspan.distributed.grad_norm import clip_grad_norm_
from longspan.distributed.layout import consecutive, split
from longspan.distributed.mesh import ParallelMesh
from longspan.distributed.traffic import Traffic
from longspan.loss import cross_entropy
from longspan.models.adapter import parallel_state
from longspan.parallelize import forward_backward, parallelize

TOLERANCE = {"fp64": 1e-10, "fp32": 1e-5}
FLOOR = 1e-3
"""A gradient's error is divided by max(its norm on one device, FLOOR * global gradient norm)."""
BF16_RATIO = 1.2
BF16_SEEDS = 8
Counted = dict[str, Traffic]
"""What a rank has sent, by axis."""


@dataclass(frozen=True)
class Outcome:
    """The result of one forward and backward, of one device or of a mesh.

    Attributes:
        loss: the loss.
        grads: {name of a parameter: its whole gradient in fp64}; zeros for one that is not used. On a pipeline those of this
            rank's stages, without the copy of a tied weight.
        norm: the 2-norm of all gradients together.
    """

    loss: float
    grads: dict[str, Tensor]
    norm: float


@dataclass(frozen=True)
class Sent:
    """What this rank has sent in one step.

    Attributes:
        forward, backward: the traffic in the forwards and in the backwards, by axis.
        layers: how many layers it computed.
    """

    forward: Counted
    backward: Counted
    layers: int


def work(config: Check) -> int:
    """Run the check on this rank and print the table on rank 0.

    Returns:
        The exit code, equal on every rank: 0 if every line holds, else 1.

    Raises:
        LongspanError: a layout or model that cannot run; raised on every rank with the same text.
    """
    transport = CountingTransport(TorchTransport())
    mesh = ParallelMesh(
        config.ulysses, config.ring, tensor=config.tensor, pipeline=config.pipeline, transport=transport, timeout=config.timeout
    )
    refuse_other_settings(config.common(), mesh.world_group)
    with raise_together(mesh.world_group):
        source = model_source.from_name(config.model, config.layers, config.heads, config.kv_heads)
    lines = _pooled(config, source, mesh) if config.dtype == "bf16" else _exact(config, source, mesh)
    lines = _worst_of_all_ranks(lines, mesh)
    with raise_together(mesh.world_group):
        if config.json is not None and dist.get_rank() == 0:
            certificate.write(config.json, config, source, mesh, lines)
    holds = all(line.holds for line in lines)
    if dist.get_rank() == 0:
        _print(config, source, mesh, lines, holds)
    return 0 if holds else 1


def _exact(config: Check, source: ModelSource, mesh: ParallelMesh) -> list[Line]:
    """The lines of the check's table for fp64 and fp32 on this rank: loss, worst gradient, gradient norm, traffic.

    Args:
        config, source, mesh: the settings, the model, and the ranks that are compared with one device.
    """
    dtype = torch.float64 if config.dtype == "fp64" else torch.float32
    ours, traffic = _parallel(config, source, config.seed, dtype, mesh)  # first, because it refuses illegal layouts
    one = _one_device(config, source, config.seed, dtype, mesh)
    worst = max(ours.grads, key=lambda name: _relative(ours.grads[name], one.grads[name], one.norm))
    bound = TOLERANCE[config.dtype]
    return [
        Line("loss", "loss", ours.loss, one.loss, abs(ours.loss - one.loss) / abs(one.loss), bound),
        Line(
            "gradients",
            f"worst gradient of {len(one.grads)}: {worst}",
            float(ours.grads[worst].norm()),
            float(one.grads[worst].norm()),
            _relative(ours.grads[worst], one.grads[worst], one.norm),
            bound,
        ),
        Line("norm", "norm of all gradients", ours.norm, one.norm, abs(ours.norm - one.norm) / one.norm, bound),
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
        ours_squared += _over_stages(_squared_error(ours, truth), mesh)
        one_squared += _squared_error(one, truth)
        loss_error = max(loss_error, abs(ours.loss - one.loss) / abs(one.loss))
    ratio = math.sqrt(ours_squared / one_squared)
    return [
        Line("loss", f"loss, worst of {BF16_SEEDS} seeds", ours.loss, one.loss, loss_error, 2.0**-8),
        Line(
            "gradients",
            "error of all gradients against fp64, beside that of one device",
            math.sqrt(ours_squared),
            math.sqrt(one_squared),
            ratio,
            BF16_RATIO,
        ),
        *_traffic_lines(config, source, mesh, traffic, torch.bfloat16.itemsize),
    ]


def _one_device(config: Check, source: ModelSource, seed: int, dtype: torch.dtype, mesh: ParallelMesh) -> Outcome:
    """Forward and backward of the whole batch of ``seed`` on this rank alone, with the model of ``source`` in ``dtype``."""
    model = _model(source, seed, dtype, mesh)
    batch = _batch(config, source, seed, mesh.device)
    labels = batch["labels"] if source.in_place else F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE)
    with _compute_in(dtype, mesh):
        loss = cross_entropy(model(input_ids=batch["input_ids"]).logits, labels)
    loss.backward()
    return _outcome(model, loss)


def _parallel(config: Check, source: ModelSource, seed: int, dtype: torch.dtype, mesh: ParallelMesh) -> tuple[Outcome, Sent]:
    """Forward and backward of the batch of ``seed`` over the mesh, with the model in ``dtype``.

    A first forward, without gradients, tells what the forward alone sends.

    Returns:
        (the outcome, what this rank sent).
    """
    model = _model(source, seed, dtype, mesh)
    model = parallelize(model, mesh, zero=config.zero, memory=config.memory, pipeline=config.stages)
    whole = _batch(config, source, seed, mesh.device)
    micro_batches = []
    for of_step in consecutive(split(config.rows, config.micro_batches)):
        mine = consecutive(split(len(of_step), mesh.coordinate.data))[mesh.coordinate.data_rank]
        rows = slice(of_step.start + mine.start, of_step.start + mine.stop)
        micro_batches.append({name: tensor[rows] for name, tensor in whole.items()})
    parts = shard_batch(micro_batches, mesh, shift=not source.in_place)
    before = _counted(mesh)
    with _compute_in(dtype, mesh), torch.no_grad():
        _step(model, parts, mesh)
    between = _counted(mesh)
    with _compute_in(dtype, mesh):
        loss = _step(model, parts, mesh)
    forward = _between(between, before)
    backward = _between(_between(_counted(mesh), between), forward)
    return _outcome(model, loss), Sent(forward, backward, _layers(model, source))


def _step(model: nn.Module, parts: list[Part], mesh: ParallelMesh) -> Tensor:
    """The loss of ``parts``, the mean over the labels of all ranks, and, unless under ``no_grad``, its gradients in ``.grad``.

    By ``forward_backward``; for a model whose own loss is not supported, by longspan's ``cross_entropy`` of its logits.
    """
    state = parallel_state(model)
    if state is not None and (state.pipeline is not None or state.adapter.computes_loss()):
        return forward_backward(model, parts)
    total = torch.zeros((), device=mesh.device)
    for part in parts:
        labels = part["shift_labels" if "shift_labels" in part else "labels"]
        inputs = {name: value for name, value in part.items() if "labels" not in name}
        loss = cross_entropy(model(**inputs).logits, labels, mesh=mesh, num_labels=part["longspan"].num_labels)
        if torch.is_grad_enabled():
            loss.backward()
        total = total + loss.detach()
    return total


def _layers(model: nn.Module, source: ModelSource) -> int:
    """The layers of this rank's pipeline stages; without a pipeline all."""
    state = parallel_state(model)
    if state is not None and state.pipeline is not None:
        return state.pipeline.layers
    return source.config.layers if isinstance(source, DecoderSource) else 0


def _model(source: ModelSource, seed: int, dtype: torch.dtype, mesh: ParallelMesh) -> nn.Module:
    """The model on the mesh's device in eval mode, with fp64 parameters if ``dtype`` is fp64, else fp32.

    bf16 is the compute dtype of autocast, as in training.
    """
    model = source.build(seed, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    return model.to(mesh.device).eval()


def _compute_in(dtype: torch.dtype, mesh: ParallelMesh) -> AbstractContextManager[object]:
    """Context manager: autocast to bf16 for bf16, nothing for other dtypes."""
    return torch.autocast(mesh.device.type, dtype) if dtype == torch.bfloat16 else nullcontext()


def _batch(config: Check, source: ModelSource, seed: int, device: torch.device) -> dict[str, Tensor]:
    """A random batch of the vocabulary of ``source``, equal for equal seeds: ``input_ids`` and ``labels`` [rows, tokens].

    Row i of R rows keeps about (i + 1) / R of its labels, the others are -100; the last row has none in its second half. Token
    1 of row 0 always has a label, so that the loss is defined.
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
    """Loss, whole gradients and their norm of a model after its backward."""
    state, grads = parallel_state(model), {}
    copies = {} if state is None or state.pipeline is None else state.pipeline.copy_names
    for name, parameter in model.named_parameters():
        if name in copies:
            continue
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad  # BERT's pooler is not used
        grads[name] = (grad.full_tensor() if isinstance(grad, DTensor) else grad).double()
    return Outcome(loss.item(), grads, clip_grad_norm_(model, math.inf).item())


def _relative(found: Tensor, expected: Tensor, norm: float) -> float:
    """The error of one gradient: the norm of the difference over that of ``expected``, or over ``FLOOR`` x ``norm`` if it is
    tiny."""
    return float((found - expected).norm() / max(float(expected.norm()), FLOOR * norm))


def _squared_error(found: Outcome, truth: Outcome) -> float:
    """The sum over the parameters of ``found`` of the squared differences between its gradients and those of ``truth``."""
    return sum(float((grad - truth.grads[name]).square().sum()) for name, grad in found.grads.items())


def _over_stages(error: float, mesh: ParallelMesh) -> float:
    """The sum of ``error`` over the pipeline's ranks, which have different parameters. Every rank must call it."""
    everyone = gather((mesh.coordinate.pipeline_rank, error), mesh.world_group)
    return sum(dict(everyone).values())


def _counted(mesh: ParallelMesh) -> Counted:
    """{axis: what this rank has sent on it so far}, for each axis of degree above 1, and "none of these" for any other
    group."""
    assert isinstance(mesh.transport, CountingTransport)
    groups = {
        "pipeline": mesh.pipeline_group, "ring": mesh.ring_group, "ulysses": mesh.ulysses_group, "tensor": mesh.tensor_group
    }  # fmt: skip
    sent = {axis: mesh.transport.sent_over(group) for axis, group in groups.items() if group.size() > 1}
    total = mesh.transport.traffic
    return sent | {"none of these": reduce(_minus, sent.values(), total)}


def _minus(after: Traffic, before: Traffic) -> Traffic:
    """The traffic between two counts: ``after`` less ``before``."""
    return Traffic(after.collectives - before.collectives, after.bytes - before.bytes)


def _between(after: Counted, before: Counted) -> Counted:
    """{axis: what was sent between the counts ``before`` and ``after``}."""
    return {axis: _minus(after[axis], before[axis]) for axis in after}


def _traffic_lines(config: Check, source: ModelSource, mesh: ParallelMesh, found: Sent, itemsize: int) -> list[Line]:
    """The lines of the check's table that compare this rank's counted traffic with the closed form: by axis, in each pass.

    Args:
        config: the settings of the check.
        source: the model; the result is empty for a Hugging Face model, because the closed form is for layers that are all
            causal and of one shape.
        mesh: the ranks.
        found: what was counted.
        itemsize: bytes of an element of the compute dtype.
    """
    if not isinstance(source, DecoderSource):
        return []
    formula = by_axis(config, source.config, mesh.coordinate, itemsize, found.layers)
    counts = (found.forward, found.backward)
    lines = [
        _traffic_line(f"{axis}: {what}, {way}", getattr(counted[axis], what), getattr(expected, what))
        for axis, passes in formula.items()
        for way, counted, expected in zip(("forward", "backward"), counts, passes)
        for what in ("collectives", "bytes")
    ]
    others = sum(counted[axis].collectives for counted in counts for axis in counted if axis not in formula)
    return [*lines, _traffic_line("other axes: collectives", others, 0)]


def _traffic_line(what: str, found: int, expected: int) -> Line:
    """The line ``what`` of the table, whose values must be equal; its error is their difference."""
    return Line("traffic", what, found, expected, abs(found - expected), 0)


def _worst_of_all_ranks(lines: list[Line], mesh: ParallelMesh) -> list[Line]:
    """For each line of the table, that of the rank with the largest error, and of these with the largest number.

    NaN counts as infinite. Every rank must call it.
    """
    everyone = gather(lines, mesh.world_group)

    def error_then_size(line: Line) -> tuple[float, float]:
        return math.inf if math.isnan(line.error) else line.error, line.found

    return [max(same, key=error_then_size) for same in zip(*everyone)]


def _print(config: Check, source: ModelSource, mesh: ParallelMesh, lines: list[Line], holds: bool) -> None:
    """Print the table with a verdict for each line, and whether guarantee 1 holds."""
    table = Table("", "found", "expected", "error", "bound", "verdict", box=None, pad_edge=False)
    for line in lines:
        verdict = "[green]holds[/]" if line.holds else "[red]FAILS[/]"
        shown = (f"{x:,}" if isinstance(x, int) else f"{x:.12g}" for x in (line.found, line.expected))
        table.add_row(line.what, *shown, f"{line.error:.2g}", f"{line.bound:.2g}", verdict)
    console = output(140)
    console.print(
        f"{count(mesh.world_group.size(), 'rank')} = {degrees(mesh.coordinate)}, zero={config.zero}, {config.dtype}: "
        f"{count(config.rows, 'row')} of {config.tokens:,} tokens in {count(config.micro_batches, 'micro-batch')}, "
        f"{source.summary}\n{mesh.rank_map}",
        highlight=False,
    )
    console.print(table, highlight=False)
    console.print("[green]Guarantee 1 holds.[/]" if holds else "[red]Guarantee 1 FAILS on this machine.[/]", highlight=False)
