"""Closed forms of published papers that a plan uses: traffic of sequence parallelism, activations of interleaved stages.

Each function is a formula of one paper, so that tests compare it with the paper by ``==``; cost.py, rank_memory.py and
explain.py use them. N: tokens of a row, h: hidden size, P: degree. Other papers' formulas: tests/planner/published_formulas.py.
"""

from fractions import Fraction
from typing import Any

Number = Any
"""An int, a Fraction, a float, or a numpy array of them: a formula serves one layout, or all layouts of a search."""


def ulysses_elements(tokens: int, hidden: int, ranks: int) -> Fraction:
    """Elements of Ulysses on each link for one layer and pass, over P ``ranks``: 4·N·h/P (arXiv:2309.14509, for large P)."""
    return Fraction(4 * tokens * hidden, ranks)


def all_to_all_sent(elements: Number, ranks: Number) -> Number:
    """What one of P ``ranks`` sends of its ``elements`` to the others in an all-to-all: elements · (P-1)/P.

    With elements = M/P, of a tensor of M elements over all ranks, that is M·(P-1)/P².
    """
    return elements * (ranks - 1) / ranks


def megatron_elements(tokens: int, hidden: int) -> int:
    """Elements of Megatron sequence parallelism for one layer and pass: 2 all-gathers and 2 reduce-scatters of N·h, whatever
    P."""
    return 4 * tokens * hidden


def interleaved_factor(pipeline: Number, stages_per_rank: Number) -> Number:
    """How many times the first stage's activations grow by interleaving: 1 + (p-1)/(p·m), for p stages and m
    ``stages_per_rank``.

    Source: arXiv:2205.05198.
    """
    return 1 + (pipeline - 1) / (pipeline * stages_per_rank)
