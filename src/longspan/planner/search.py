"""The best layout of a cluster for a model and a step: every legal one is priced, all at once in numpy.

    degrees of the five axes that multiply to the GPUs   x  micro-batch  x  options   ->  columns  ->  time and memory of all
                                                                                       ->  the fastest that fits, the runner-up

A layout fits if its memory with the error of that prediction added does. Times within 1% are a tie, which goes to the one that
needs less memory by more than that error, else to the one with fewer axes. The formulas are those of cost.py and
rank_memory.py: a strategy is a row, and a column for each field.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longspan.errors import LayoutError
from longspan.planner.cost import step_time
from longspan.planner.rank_memory import rank_memory
from longspan.planner.setting import Setting
from longspan.planner.strategy import AXES, Strategy, check, legal_tensor
from longspan.planner.uncertainty import memory_bound

TILE_TOKENS = 4096
"""The ``tile_tokens`` that is considered, as in AutoMemory."""
HEAD_CHUNKS = 4
"""The ``head_chunks`` that are considered beside 1."""
TIE = 0.01
"""Step times whose ratio is at most 1 + this count as equal."""
ROWS_AT_ONCE = 100_000
"""Layouts that are priced in one call, so that the arrays stay in the processor's cache."""

RECOMPUTED = (("none", 0), ("selective", 0), ("selective", 1), ("full", 0), ("full", 1))
"""Recomputation, and whether what is saved is offloaded."""
SHARDED = ((0, 0), (2, 0), (3, 0), (3, 1))
"""ZeRO stage, and whether parameters and optimizer states are offloaded. FSDP2 has no stage 1."""


class Columns:
    """Many strategies as one object: each field of ``Strategy`` is an array with an element for each of them.

    The formulas of cost.py and rank_memory.py take it in place of one. ``recompute`` is the two arrays ``full`` and
    ``selective``.

    Args:
        degrees: [layouts, 6]: the degrees in the order of AXES, and the micro-batch.
        options: [options, 7] in the order of OPTION_NAMES; every layout is combined with every option.
        first: the number of the first strategy among those of all blocks.
    """

    def __init__(self, degrees: NDArray[np.int64], options: NDArray[np.int64], first: int = 0) -> None:
        self.count, self.first = len(degrees) * len(options), first
        groups = np.unique(degrees[:, : len(AXES)], axis=0, return_inverse=True)[1].reshape(-1)
        self.group = np.repeat(groups, len(options))  # equal where all degrees are, whatever the micro-batch
        for index, name in enumerate((*AXES, "micro_batch")):
            setattr(self, name, np.repeat(degrees[:, index], len(options)))
        for index, name in enumerate(OPTION_NAMES):
            setattr(self, name, np.tile(options[:, index], len(degrees)))
        self.stages_per_rank = 1
        self.chunked_loss = True
        self.offload_optimizer = self.offload_parameters

    offload_parameters: NDArray[np.int64]

    @property
    def ranks(self) -> Any:
        """For each strategy, the number of ranks of its mesh."""
        return np.prod([getattr(self, axis) for axis in AXES], axis=0)

    def strategy(self, index: int) -> Strategy:
        """The strategy number ``index``, as a Strategy."""
        values: dict[str, Any] = {name: int(getattr(self, name)[index]) for name in (*AXES, "micro_batch", *OPTION_NAMES)}
        full, selective = values.pop("full"), values.pop("selective")
        flags = {name: bool(values.pop(name)) for name in ("offload_activations", "offload_parameters")}
        return Strategy(
            **values,
            **flags,
            offload_optimizer=flags["offload_parameters"],
            recompute="full" if full else "selective" if selective else "none",
        )


KIND = (*AXES, "zero")
"""What a runner-up has otherwise than the best layout: a degree, or the ZeRO stage."""
OPTION_NAMES = ("zero", "offload_parameters", "full", "selective", "offload_activations", "tile_tokens", "head_chunks")


@dataclass(frozen=True)
class Found:
    """A layout that ``search`` has priced.

    Attributes:
        strategy: its degrees and options.
        seconds: of one step.
        bytes, host_bytes: memory of the fullest rank, and of a node's host.
    """

    strategy: Strategy
    seconds: float
    bytes: float
    host_bytes: float


@dataclass(frozen=True)
class Ranking:
    """The result of a search.

    Attributes:
        best: the fastest layout that fits; of those within ``TIE`` the one that needs least memory beyond the error of that
            prediction, then the one with fewest axes.
        runner_up: likewise of those with other degrees or another ZeRO stage; None if there is none.
        legal, fitting: how many layouts are legal, and how many of them fit.
        smallest: the layout that needs least memory, its error added, which may not fit.
    """

    best: Found | None
    runner_up: Found | None
    legal: int
    fitting: int
    smallest: Found


def degree_rows(x: Setting, fixed: dict[str, int]) -> NDArray[np.int64]:
    """All legal degrees and micro-batches that fill the cluster: [layouts, 6] in the order of AXES, then the micro-batch.

    Legal: the degrees multiply to the number of GPUs; data divides the rows of a step, and the micro-batch the rows of a
    replica; pipeline is at most the layers, ulysses x tensor at most the heads, ring x ulysses x tensor at most the tokens of
    a row; the model can be cut by tensor (``legal_tensor``).

    Args:
        x: model, cluster and step.
        fixed: values that must hold, by name: a name of AXES, or "micro_batch". Other names do not limit the rows.

    Raises:
        LayoutError: none is legal; the message names what is.
    """
    shape, gpus, rows = x.shape, x.cluster.gpus, x.workload.rows
    tensors = [t for t in _divisors(gpus) if legal_tensor(shape, t)]
    found = []
    for tensor, pipeline in product(_allowed(tensors, fixed, "tensor"), _allowed(_divisors(gpus), fixed, "pipeline")):
        if gpus % (tensor * pipeline) or pipeline > (1 if "pipeline" in shape.whole else shape.layers):
            continue
        left = gpus // (tensor * pipeline)
        for ulysses in _allowed(_divisors(left), fixed, "ulysses"):
            if left % ulysses or ulysses > shape.heads // tensor:
                continue
            for ring in _allowed(_divisors(left // ulysses), fixed, "ring"):
                data = left // ulysses // ring if left % (ulysses * ring) == 0 else 0
                if not data or rows % data or fixed.get("data", data) != data:
                    continue
                if x.workload.tokens < ring * ulysses * tensor:
                    continue
                sizes = _allowed(_divisors(rows // data), fixed, "micro_batch")
                found += [(pipeline, data, ring, ulysses, tensor, size) for size in sizes if rows // data % size == 0]
    if not found:
        degrees = {name: value for name, value in fixed.items() if name in (*AXES, "micro_batch")}
        check(shape, x.workload, Strategy(**degrees), gpus if set(AXES) <= set(degrees) else None)  # type: ignore[arg-type]
        _refuse_what_does_not_divide({name: degrees[name] for name in AXES if degrees.get(name, 1) > 1}, gpus)
        raise LayoutError(
            f"no degrees fill {gpus} GPUs with {rows} rows of {x.workload.tokens:,} tokens of {shape.name}"
            f"{' with ' + ', '.join(f'{k}={v}' for k, v in fixed.items()) if fixed else ''}: data must divide the rows, "
            f"ulysses x tensor is at most {shape.heads} heads, pipeline at most {shape.layers} layers, and all degrees "
            f"multiply to {gpus}; change the rows of a step or the number of GPUs"
        )
    return np.array(found, dtype=np.int64)


def _refuse_what_does_not_divide(degrees: dict[str, int], gpus: int) -> None:
    """Raise LayoutError, with the legal values, if the ``degrees``, each above 1, or their product do not divide ``gpus``."""
    product = math.prod(degrees.values())
    if gpus % product == 0:
        return
    legal = [str(d) for d in _divisors(gpus)]
    listed = " or ".join([", ".join(legal[:-1]), legal[-1]] if len(legal) > 1 else legal)
    for name, degree in degrees.items():
        if gpus % degree:
            raise LayoutError(f"{name}={degree} does not divide {gpus} GPUs; use {listed}")
    named = " x ".join(f"{name}={degree}" for name, degree in degrees.items())
    raise LayoutError(
        f"{named} are {product} ranks, which do not divide {gpus} GPUs; use degrees whose product is {listed}, or "
        f"{product} GPUs"
    )


def _allowed(values: list[int], fixed: dict[str, int], name: str) -> list[int]:
    """Those of ``values`` that ``fixed`` allows for ``name``: all if it is not fixed, else its value, if that is among them."""
    return [fixed[name]] if name in fixed and fixed[name] in values else values if name not in fixed else []


def _divisors(number: int) -> list[int]:
    """All divisors of ``number``, sorted."""
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def option_rows(fixed: dict[str, int]) -> NDArray[np.int64]:
    """All combinations of memory options, [options, 7] in the order of OPTION_NAMES.

    ``fixed`` has values that must hold, by name; names that are no option do not limit the rows.
    """
    rows = []
    for (zero, moved), (recompute, offload), tile, chunks in product(SHARDED, RECOMPUTED, (0, TILE_TOKENS), (1, HEAD_CHUNKS)):
        row = (zero, moved, int(recompute == "full"), int(recompute == "selective"), offload, tile, chunks)
        named = dict(zip(OPTION_NAMES, row))
        if all(named[name] == value for name, value in fixed.items() if name in named):
            rows.append(row)
    if not rows:
        raise LayoutError(
            f"no memory options match {', '.join(f'{k}={v}' for k, v in fixed.items() if k in OPTION_NAMES)}; zero is 0, 2 "
            f"or 3, parameters are offloaded with zero=3 only, activations with recompute=full or selective only"
        )
    return np.array(rows, dtype=np.int64)


def search(x: Setting, fixed: dict[str, int] | None = None) -> Ranking:
    """Price every legal layout, and rank those that fit by the seconds of a step.

    Args:
        x: model, cluster, software, step and constants.
        fixed: degrees and options that must have these values (``recompute`` as ``full`` and ``selective``); None: all are
            free.

    Returns:
        A Ranking.

    Raises:
        LayoutError: no layout is legal.
    """
    fixed = fixed or {}
    degrees, options = degree_rows(x, fixed), option_rows(fixed)
    lines: list[NDArray[np.float64]] = []  # a line for each layout that may be the best or the runner-up
    smallest: Found | None = None
    least, legal, fitting = np.inf, 0, 0
    for columns in _blocks(degrees, options):
        seconds, needs = np.asarray(step_time(x, columns).total), rank_memory(x, columns)
        total, host = np.asarray(needs.total), np.asarray(needs.host) + np.zeros(columns.count)
        possible, bound = _is_possible(x, columns), total * memory_bound(columns)
        fits = possible & (bound <= x.cluster.accelerator.memory) & (host <= x.cluster.host_memory)
        legal, fitting = legal + int(possible.sum()), fitting + int(fits.sum())
        kept = _near_the_fastest_of_their_kind(columns, np.where(fits, seconds, np.inf))
        numbers = [columns.first + kept, seconds[kept], total[kept], host[kept], bound[kept]]
        lines.append(np.stack([*numbers, *(getattr(columns, name)[kept] for name in KIND)], axis=1))
        low = int(np.argmin(np.where(possible, bound, np.inf)))
        if possible[low] and bound[low] < least:
            smallest, least = Found(columns.strategy(low), float(seconds[low]), float(total[low]), float(host[low])), bound[low]
    if smallest is None:  # head_chunks or tile_tokens, where ``fixed`` has them
        check(x.shape, x.workload, Columns(degrees[:1], options[:1]).strategy(0))
        raise LayoutError(
            f"no layout of {x.shape.name} has {', '.join(f'{k}={v}' for k, v in fixed.items())}; give fewer values"
        )

    def found(line: NDArray[np.float64] | None) -> Found | None:
        if line is None:
            return None
        row, option = divmod(int(line[0]), len(options))
        return Found(Columns(degrees[row : row + 1], options[option : option + 1]).strategy(0), *map(float, line[1:4]))

    lines_of_all = np.concatenate(lines)
    best = _best(lines_of_all)
    others = lines_of_all if best is None else lines_of_all[(lines_of_all[:, 5:] != best[5:]).any(axis=1)]
    return Ranking(found(best), found(_best(others)), legal, fitting, smallest)


def _is_possible(x: Setting, columns: Columns) -> NDArray[np.bool_]:
    """For each strategy whether its options are legal beside its degrees, as in ``check``: chunks of heads, and tiles."""
    c: Any = columns
    return (c.head_chunks <= x.shape.heads // (c.ulysses * c.tensor)) & ((c.tile_tokens == 0) | (c.tensor == 1))  # type: ignore[no-any-return]


def _blocks(degrees: NDArray[np.int64], options: NDArray[np.int64]) -> Iterator[Columns]:
    """Yield all combinations of degrees and options in blocks of about ``ROWS_AT_ONCE`` strategies, which fit into memory."""
    size = max(1, ROWS_AT_ONCE // len(options))
    for start in range(0, len(degrees), size):
        yield Columns(degrees[start : start + size], options, first=start * len(options))


def _near_the_fastest_of_their_kind(columns: Columns, seconds: NDArray[np.float64]) -> NDArray[np.int64]:
    """The indices of the strategies that take at most ``TIE`` longer than the fastest with their degrees and ZeRO stage.

    Infinite ``seconds`` are no candidates. The best and the runner-up of all are among them.
    """
    kinds = 4 * columns.group + columns.zero  # type: ignore[attr-defined]
    fastest = np.full(int(kinds.max()) + 1, np.inf)
    np.minimum.at(fastest, kinds, seconds)
    return np.flatnonzero(np.isfinite(seconds) & (seconds <= (1 + TIE) * fastest[kinds]))


def _best(lines: NDArray[np.float64]) -> NDArray[np.float64] | None:
    """The line of the best layout: of those within ``TIE`` of the fastest, that with least memory, then with fewest axes.

    Memory is less where the largest that the error of its prediction allows is below the smallest of another.

    Args:
        lines: [layouts, 11]: a number, seconds, bytes, bytes of the host, bytes with their error, and what ``KIND`` names.

    Returns:
        A line, or None if there is none.
    """
    if not len(lines):
        return None
    near = lines[lines[:, 1] <= (1 + TIE) * lines[:, 1].min()]
    slim = near[2 * near[:, 2] - near[:, 4] <= near[:, 4].min()]
    axes = (slim[:, 5:-1] > 1).sum(axis=1)
    return slim[np.lexsort((slim[:, 1], axes))[0]]  # type: ignore[no-any-return]


def longest(x: Setting, fixed: dict[str, int] | None = None) -> int:
    """The most tokens of a row with which some legal layout fits, to within a thousandth; 0 if none fits.

    It is exact where all positions of the model fit, and at least the tokens of ``x`` where those fit.

    Args:
        x: model, cluster, software and step; the rows of a step stay as they are, and the model's positions limit the tokens.
        fixed: degrees and options that must have these values; None: all are free.
    """
    fixed, positions, planned = fixed or {}, x.shape.positions, x.workload.tokens
    if positions is not None and _any_fits(_with_tokens(x, positions), fixed):
        return positions
    fits, above = 0, 1 << 34 if positions is None else positions
    if planned < above:
        fits, above = (planned, above) if _any_fits(x, fixed) else (fits, planned)
    while above - fits > max(1, fits // 1000):
        middle = (fits + above) // 2
        fits, above = (middle, above) if _any_fits(_with_tokens(x, middle), fixed) else (fits, middle)
    return fits


def _any_fits(x: Setting, fixed: dict[str, int]) -> bool:
    """Whether some legal layout with the values ``fixed`` fits into the memory of devices and hosts."""
    try:
        degrees = degree_rows(x, {"micro_batch": 1} | fixed)
    except LayoutError:
        return False
    for columns in _blocks(degrees, option_rows(fixed)):
        needs = rank_memory(x, columns)
        fits = needs.total * memory_bound(columns) <= x.cluster.accelerator.memory
        if (_is_possible(x, columns) & fits & (needs.host <= x.cluster.host_memory)).any():
            return True
    return False


def _with_tokens(x: Setting, tokens: int) -> Setting:
    """A copy of ``x`` for rows of ``tokens`` tokens."""
    return replace(x, workload=replace(x.workload, tokens=tokens))
