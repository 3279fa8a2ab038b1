"""Guarantee 1: on every layout, the loss and gradients of one device. The reference runs beside each rank, with mesh=None."""

from collections.abc import Callable
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from longspan.batch.labels import IGNORE
from longspan.batch.shard import shard_batch, unshard
from longspan.distributed import grad_norm as gradients
from longspan.distributed.collectives import all_reduce_sum
from longspan.distributed.coordinate import MeshCoordinate
from longspan.distributed.mesh import ParallelMesh
from longspan.models.decoder import Decoder
from longspan.models.decoder_config import DecoderConfig
from longspan.parallelize import parallelize
from tests.helpers.ranks import Ranks

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
ROWS = 2  # of one data replica


@dataclass(frozen=True)
class Case:
    """One training step, and how it is laid out."""

    ulysses: int
    ring: int = 1
    zero: int = 0
    dtype: torch.dtype = torch.float64
    tokens: int = 13
    heads: tuple[int, int] = (4, 2)
    tied: bool = False
    micro_batches: int = 1
    without_labels: bool = False  # the last rank has no label
    without_rows: bool = False  # the last data replica has no row
    extras: tuple[str, ...] = ()
    checkpointed: bool = False
    padded: bool = False  # the first row on the left, the second on the right
    head_chunks: int = 1
    seed: int = 0


class Probed(Decoder):
    """A decoder with parameters for terms that are not per token: a pooled head, and a head that one rank alone uses."""

    def __init__(self, config: DecoderConfig, seed: int, head_chunks: int) -> None:
        super().__init__(config, seed=seed, head_chunks=head_chunks)
        self.pool = nn.Linear(config.vocab, 3)
        self.odd = nn.Linear(config.vocab, 2, bias=False)
        self.initialize(seed)

    def forward(self, *, extras=(), **batch):
        output = super().forward(**batch)
        return output.loss, output.logits, sum(extra(self, output.logits) for extra in extras)


def build(case: Case) -> Probed:
    heads, kv_heads = case.heads
    model = Probed(DecoderConfig(11, 2, 12, heads, kv_heads, 4, 16, tied=case.tied), case.seed, case.head_chunks)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.mul_(10)  # else attention is uniform and the loss that of a coin
            elif name == "pool.bias":
                parameter.copy_(torch.tensor([0.5, -0.25, 0.125]))
    if case.checkpointed:
        for block in model.blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    return model.to(case.dtype)


def whole_batches(case: Case, coordinate: MeshCoordinate) -> list[list[dict[str, torch.Tensor]]]:
    """[micro-batch][data replica] -> input_ids and labels, unequally many of them."""
    generator = torch.Generator().manual_seed(case.seed)
    batches = []
    for _ in range(case.micro_batches):
        replicas = []
        for data in range(coordinate.data):
            last = data == coordinate.data - 1
            rows = 0 if case.without_rows and last else ROWS
            ids = torch.randint(11, (rows, case.tokens), generator=generator)
            labels = ids.where(torch.rand(ids.shape, generator=generator) < (0.9, 0.3)[data % 2], IGNORE)
            if case.without_labels and last:
                for run in coordinate.layout(case.tokens).mine(coordinate.ring - 1, coordinate.ulysses - 1):
                    labels[:, run.start + 1 : run.stop + 1] = IGNORE
            replicas.append({"input_ids": ids, "labels": labels})
            if case.padded:
                replicas[-1]["attention_mask"] = padding(case, rows)
                labels[padding(case, rows) == 0] = IGNORE
                labels[0::ROWS, LEFT] = IGNORE  # the padding before it has nothing to predict it from
        batches.append(replicas)
    return batches


LEFT, RIGHT = 3, 2  # tokens of padding


def padding(case: Case, rows: int) -> torch.Tensor:
    real = torch.ones(rows, case.tokens, dtype=torch.long)
    real[0::ROWS, :LEFT] = 0
    real[1::ROWS, -RIGHT:] = 0
    return real


def without_padding(logits_of: Callable[[torch.Tensor], torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """Logits of rows of which each is computed alone, as if there were no padding; 0 at the padding."""
    cuts = [(LEFT, 0), (0, RIGHT)] * (len(ids) // ROWS)
    rows = [logits_of(row[left : len(row) - right].unsqueeze(0)) for row, (left, right) in zip(ids, cuts)]
    return torch.cat([F.pad(row, (0, 0, *cut)) for row, cut in zip(rows, cuts)])


def on_one_device(model: Probed, case: Case, coordinate: MeshCoordinate) -> float:
    batches = [
        {name: torch.cat([replica[name] for replica in replicas]) for name in replicas[0]}
        for replicas in whole_batches(case, coordinate)
    ]
    num_labels = sum(int((batch["labels"][:, 1:] != IGNORE).sum()) for batch in batches)
    extras = [EXTRAS[name](coordinate) for name in case.extras if name != "penalty"]
    total = 0.0
    for batch in batches:
        if case.padded:
            logits, extra = without_padding(lambda row: model(input_ids=row)[1], batch["input_ids"]), 0.0
        else:
            _, logits, extra = model(input_ids=batch["input_ids"], extras=extras)
        flat = logits[:, :-1].flatten(0, 1)
        exact = flat if flat.dtype == torch.float64 else flat.float()
        loss = F.cross_entropy(exact, batch["labels"][:, 1:].flatten(), reduction="sum") / max(num_labels, 1) + extra
        loss = loss + penalty(model) if "penalty" in case.extras else loss
        loss.backward()
        total += loss.item()
    return total


def on_the_mesh(model: Probed, case: Case, mesh: ParallelMesh) -> float:
    mine = [replicas[mesh.coordinate.data_rank] for replicas in whole_batches(case, mesh.coordinate)]
    parts = shard_batch(mine, mesh) if case.micro_batches > 1 else [shard_batch(mine[0], mesh)]
    extras = [EXTRAS[f"{name} on ranks"](mesh, case.tokens) for name in case.extras if name != "penalty"]
    total = 0.0
    for part in parts:
        loss, _, extra = model(**part, extras=extras)
        loss = loss + extra
        loss = loss + penalty(model) if "penalty" in case.extras else loss
        loss.backward()
        total += loss.item()
    return total


def penalty(model: nn.Module) -> torch.Tensor:
    """Of all weights, equal on every rank; under zero=3 those of the blocks are shards."""
    squares = [parameter.square().sum() for parameter in model.parameters()]
    return 0.01 * sum(square.full_tensor() if isinstance(square, DTensor) else square for square in squares)


def pooled(coordinate):
    return lambda model, logits: model.pool(logits.tanh().mean(1)).square().sum()


def pooled_on_ranks(mesh, tokens):
    def extra(model, logits):
        whole = unshard(logits, mesh, tokens=tokens)  # the ranks of a sequence all pool its rows
        mine = model.pool(whole.tanh().mean(1)).square().sum()
        return all_reduce_sum(mine, mesh.loss_group) / (mesh.coordinate.sequence_ranks)

    return extra


def balance(coordinate):
    return lambda model, logits: logits.softmax(-1).sum((0, 1)).square().sum() / 100


def balance_on_ranks(mesh, tokens):
    return lambda model, logits: all_reduce_sum(logits.softmax(-1).sum((0, 1)), mesh.loss_group).square().sum() / 100


def odd(coordinate):
    def extra(model, logits):
        (mine,) = coordinate.layout(logits.shape[1]).mine(0, 0)[:1]
        return model.odd(logits[:ROWS, mine.start : mine.stop]).tanh().sum() / 10

    return extra


def odd_on_ranks(mesh, tokens):
    def extra(model, logits):
        first = (mesh.coordinate.data_rank, mesh.coordinate.ring_rank, mesh.coordinate.ulysses_rank) == (0, 0, 0)
        (mine,) = mesh.coordinate.layout(tokens).mine(0, 0)[:1]
        found = model.odd(logits[:, : len(mine)]).tanh().sum() / 10 if first else logits.sum() * 0
        return all_reduce_sum(found, mesh.loss_group)

    return extra


EXTRAS = {
    "pooled": pooled,
    "pooled on ranks": pooled_on_ranks,
    "balance": balance,
    "balance on ranks": balance_on_ranks,
    "odd": odd,
    "odd on ranks": odd_on_ranks,
}


def whole_grads(model: nn.Module) -> dict[str, torch.Tensor | None]:
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in grads.items()}


def check(case: Case, mesh: ParallelMesh) -> tuple[float, str]:
    """Compare with one device; what is returned must be equal on all ranks: the loss, and a word for the gradients."""
    reference = build(case)
    model = parallelize(deepcopy(reference), mesh, zero=case.zero)
    expected, found = on_one_device(reference, case, mesh.coordinate), on_the_mesh(model, case, mesh)
    tolerance = TOLERANCE[case.dtype]
    assert abs(found - expected) <= tolerance * max(abs(expected), 1e-3), f"{case}: loss {found}, one device {expected}"

    norm, mine = gradients.grad_norm(reference.parameters()).item(), whole_grads(model)
    for name, parameter in reference.named_parameters():
        # FSDP2 gives zeros where no rank brought a gradient, or none at all.
        ref = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        grad = mine[name] if mine[name] is not None else torch.zeros_like(parameter)
        if case.zero == 0:
            assert (mine[name] is None) == (parameter.grad is None), f"{case}: {name}"
        error = (grad - ref).norm().item()
        bound = tolerance * max(ref.norm().item(), 1e-3 * norm)
        assert error <= bound, f"{case}: {name} is off by {error:.2e}, allowed {bound:.2e}, |ref| {ref.norm():.2e}"
    whole = gradients.grad_norm(model.parameters()).item()
    assert abs(whole - norm) <= tolerance * norm, f"{case}: norm {whole}, one device {norm}"
    return found, repr([(name, None if grad is None else grad.sum().item()) for name, grad in mine.items()])


def check_all(cases: list[Case]) -> list[tuple[float, str]]:
    mesh = ParallelMesh(ulysses=cases[0].ulysses, ring=cases[0].ring)
    return [check(case, mesh) for case in cases]


@pytest.fixture(scope="module")
def on_ranks(tmp_path_factory):
    """The same ranks for every test: what a process pays at its first step is paid once."""
    with ExitStack() as stack:
        pools = {ranks: stack.enter_context(Ranks(ranks, tmp_path_factory.mktemp("ranks"))) for ranks in (1, 2, 3, 4)}
        yield lambda ranks, body, *args: pools[ranks].run(body, *args)


STEPS = [
    {"tied": True},
    {"micro_batches": 3, "tied": True, "checkpointed": True},
    {"without_labels": True, "extras": ("penalty",)},
    {"without_rows": True, "extras": ("pooled", "balance"), "micro_batches": 3},
    {"checkpointed": True, "extras": ("pooled", "penalty"), "dtype": torch.float32},
    {"tokens": 8, "without_labels": True, "without_rows": True, "micro_batches": 3, "dtype": torch.float32},
]
ODD = [
    {"extras": ("odd",), "tied": True, "micro_batches": 3},
    {"extras": ("odd", "balance"), "checkpointed": True, "dtype": torch.float32},
]
UNEVEN = [
    {"heads": (3, 1), "tokens": 7},
    {"heads": (3, 3), "tokens": 11, "micro_batches": 3},
    {"heads": (6, 2), "tokens": 10, "checkpointed": True},
    {"heads": (4, 1), "tokens": 9, "dtype": torch.float32},
    {"tokens": 12, "padded": True},
]
CHUNKED = [
    {"heads": (6, 3), "head_chunks": 3},
    {"heads": (8, 4), "tokens": 12, "head_chunks": 2, "padded": True, "tied": True},
]


LAYOUTS = {  # (ranks, ulysses, ring): what is laid out so
    (1, 1, 1): STEPS,
    (2, 1, 1): STEPS + ODD,
    (2, 2, 1): STEPS + ODD + UNEVEN + CHUNKED,
    (2, 1, 2): STEPS[:2] + UNEVEN + CHUNKED,
    (3, 3, 1): ODD + UNEVEN,
    (4, 2, 1): STEPS + ODD + UNEVEN,
    (4, 4, 1): STEPS + ODD,
    (4, 2, 2): STEPS[1:4] + ODD + UNEVEN,
}


@pytest.mark.parametrize(
    ("ranks", "ulysses", "ring"),
    [pytest.param(*layout, marks=pytest.mark.long) if layout == (4, 4, 1) else layout for layout in LAYOUTS],
)
def test_loss_and_gradients_are_those_of_one_device(ranks, ulysses, ring, on_ranks):
    steps = LAYOUTS[ranks, ulysses, ring]
    # FSDP2 asks that every rank uses every parameter.
    laid_out = [(zero, step) for step in steps for zero in (0, 3) if zero == 0 or step in STEPS + CHUNKED]
    cases = [Case(ulysses, ring, zero, **step) for zero, step in laid_out]
    first, *others = on_ranks(ranks, check_all, cases)
    for other in others:
        for case, mine, theirs in zip(cases, first, other):
            assert mine == theirs, f"{case}: ranks differ"


SEEDS = range(8)
Grads = dict[str, torch.Tensor]


def bfloat16_case(ulysses: int, seed: int, head_chunks: int = 1) -> Case:
    return Case(ulysses, dtype=torch.bfloat16, tokens=32, heads=(4, 4), head_chunks=head_chunks, seed=seed)


@pytest.fixture(scope="module")
def exact() -> dict[int, tuple[list[Grads], float]]:
    """By the ulysses degree of four ranks: the fp64 gradients of each seed, and one device's squared error in bf16."""
    found = {}
    for ulysses in (1, 2, 4):
        coordinate, wides, error = MeshCoordinate(data=4 // ulysses, ulysses=ulysses), [], 0.0
        for seed in SEEDS:
            case = bfloat16_case(ulysses, seed)
            half = build(case)
            wide = deepcopy(half).double()
            on_one_device(half, case, coordinate)
            on_one_device(wide, replace(case, dtype=torch.float64), coordinate)
            wides.append(whole_grads(wide))
            error += squared_error(whole_grads(half), wides[-1])
        found[ulysses] = wides, error
    return found


BFLOAT16 = {(1, 1, 0), (1, 4, 3), (2, 2, 3), (4, 1, 0)}  # (ulysses, head_chunks, zero) of make test: each value of each


@pytest.mark.parametrize(
    ("ulysses", "head_chunks", "zero"),
    [
        pytest.param(*case, marks=() if case in BFLOAT16 else pytest.mark.long)
        for case in [(*heads, zero) for heads in ((1, 1), (1, 4), (2, 1), (2, 2), (4, 1)) for zero in (0, 3)]
    ],
)
def test_bfloat16_is_as_exact_as_on_one_device(ulysses, head_chunks, zero, on_ranks, exact):
    wides, error = exact[ulysses]
    for mine in on_ranks(4, bfloat16_error, ulysses, head_chunks, zero, wides):
        assert (mine / error) ** 0.5 <= 1.2


def bfloat16_error(ulysses: int, head_chunks: int, zero: int, wides: list[Grads]) -> float:
    mesh, error = ParallelMesh(ulysses=ulysses), 0.0
    for seed in SEEDS:
        case = bfloat16_case(ulysses, seed, head_chunks)
        model = parallelize(build(case), mesh, zero=zero)
        on_the_mesh(model, case, mesh)
        error += squared_error(whole_grads(model), wides[seed])
    return error


def squared_error(grads: Grads, wide: Grads) -> float:
    return sum((grads[name] - grad).square().sum().item() for name, grad in wide.items() if grad is not None)
