"""The best layout of a cluster for a model and a step: every legal one is priced, all at once in numpy.

    degrees of the five axes that multiply to the GPUs   x  micro-batch  x  options   ->  columns  ->  time and memory of all
                                                                                       ->  the fastest that fits, the runner-up

The formulas are those of cost.py and rank_memory.py: their strategy is a row here, and a column for each field.
"""

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

TILE_TOKENS = 4096
"""The ``tile_tokens`` that is considered, as in AutoMemory."""
HEAD_CHUNKS = 4
"""The ``head_chunks`` that are considered beside 1."""
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
    """

    def __init__(self, degrees: NDArray[np.int64], options: NDArray[np.int64]) -> None:
        self.count = len(degrees) * len(options)
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
        best: the fastest layout that fits.
        runner_up: the fastest one with other degrees or another ZeRO stage; None if there is none.
        legal, fitting: how many layouts are legal, and how many of them fit.
        smallest: the layout that needs least memory, which may not fit.
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
        if gpus % (tensor * pipeline) or pipeline > shape.layers:
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
        raise LayoutError(
            f"no degrees fill {gpus} GPUs with {rows} rows of {x.workload.tokens:,} tokens of {shape.name}"
            f"{' with ' + ', '.join(f'{k}={v}' for k, v in fixed.items()) if fixed else ''}: data must divide the rows, "
            f"ulysses x tensor is at most {shape.heads} heads, pipeline at most {shape.layers} layers, and all degrees "
            f"multiply to {gpus}; change the rows of a step or the number of GPUs"
        )
    return np.array(found, dtype=np.int64)


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
    kept: list[Found] = []
    smallest: Found | None = None
    legal = fitting = 0
    for columns in _blocks(x, degrees, options):
        seconds, needs = np.asarray(step_time(x, columns).total), rank_memory(x, columns)
        total, host = np.asarray(needs.total), np.asarray(needs.host) + np.zeros(columns.count)
        possible = columns.head_chunks <= x.shape.heads // (columns.ulysses * columns.tensor)  # type: ignore[attr-defined]
        fits = possible & (total <= x.cluster.accelerator.memory) & (host <= x.cluster.host_memory)
        legal, fitting = legal + int(possible.sum()), fitting + int(fits.sum())

        def found(index: int, c: Columns = columns, s: Any = seconds, total: Any = total, host: Any = host) -> Found:
            return Found(c.strategy(index), float(s[index]), float(total[index]), float(host[index]))

        kept += [found(int(i)) for i in _best_of_each(columns, np.where(fits, seconds, np.inf))]
        least = found(int(np.argmin(np.where(possible, total, np.inf))))
        smallest = least if smallest is None or least.bytes < smallest.bytes else smallest
    assert smallest is not None
    kept.sort(key=lambda f: f.seconds)
    best = kept[0] if kept else None
    other = next((f for f in kept if best is not None and _kind(f.strategy) != _kind(best.strategy)), None)
    return Ranking(best, other, legal, fitting, smallest)


def _blocks(x: Setting, degrees: NDArray[np.int64], options: NDArray[np.int64]) -> Iterator[Columns]:
    """Yield all combinations of degrees and options in blocks of about ``ROWS_AT_ONCE`` strategies, which fit into memory."""
    size = max(1, ROWS_AT_ONCE // len(options))
    for start in range(0, len(degrees), size):
        yield Columns(degrees[start : start + size], options)


def _best_of_each(columns: Columns, seconds: NDArray[np.float64]) -> list[int]:
    """The indices of the fastest strategy, and of the fastest one that has other degrees or another ZeRO stage.

    Infinite ``seconds`` are no candidates, so the list may have one index or none.
    """
    first = int(np.argmin(seconds))
    if not np.isfinite(seconds[first]):
        return []
    same = np.ones(columns.count, dtype=bool)
    for name in (*AXES, "zero"):
        values = getattr(columns, name)
        same &= values == values[first]
    second = int(np.argmin(np.where(same, np.inf, seconds)))
    return [first] + ([second] if np.isfinite(seconds[second]) and not same[second] else [])


def _kind(strategy: Strategy) -> tuple[int, ...]:
    """The degrees and the ZeRO stage of a strategy: a runner-up has another one."""
    return (*(getattr(strategy, axis) for axis in AXES), strategy.zero)


def longest(x: Setting, fixed: dict[str, int] | None = None) -> int:
    """The most tokens of a row with which some legal layout fits, to within a thousandth; 0 if none fits.

    Args:
        x: model, cluster, software and step; the rows of a step stay as they are, and the model's positions limit the tokens.
        fixed: degrees and options that must have these values; None: all are free.
    """
    fixed = fixed or {}
    fits, above = 0, 1 << 34 if x.shape.positions is None else x.shape.positions + 1
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
    for columns in _blocks(x, degrees, option_rows(fixed)):
        needs = rank_memory(x, columns)
        if ((needs.total <= x.cluster.accelerator.memory) & (needs.host <= x.cluster.host_memory)).any():
            return True
    return False


def _with_tokens(x: Setting, tokens: int) -> Setting:
    """A copy of ``x`` for rows of ``tokens`` tokens."""
    return replace(x, workload=replace(x.workload, tokens=tokens))
