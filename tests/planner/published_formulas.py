"""Closed forms of published papers with which the formulas of a plan are compared; the plan itself uses none of them.

Each function is a formula of one paper. N: tokens of a row, h: hidden size, P: degree, L: layers, s: tokens, b: rows, a: heads,
t: tensor degree.
"""

from fractions import Fraction


def loongtrain_kv_elements(tokens: int, hidden: int, heads: int, kv_heads: int, ulysses: int, ranks: int) -> Fraction:
    """Elements of keys and values for one layer, replicated where ranks exceed heads: max(Hkv, d_hp)/H · 4·S·D/d_sp.

    Args:
        tokens, hidden: S and D.
        heads, kv_heads: H and Hkv.
        ulysses: d_hp, the degree of head parallelism.
        ranks: d_sp, the ranks of a sequence. Source: LoongTrain, arXiv:2406.18485.
    """
    return Fraction(max(kv_heads, ulysses) * 4 * tokens * hidden, heads * ranks)


USP_TABLE = {
    "ulysses": (12, 0, 8),
    "ring": (12, 4, 0),
    "data": (12, 0, 0),
    "zero1": (12, 0, 0),
    "usp_zero3": (18, 4, 0),
    "tensor": (0, 8, 0),
    "tensor_sequence": (0, 10, 0),
}
"""Table 2 of USP (arXiv:2405.07719): elements of a block, forward and backward, before the factors of the algorithms: of
parameters in d², of activations in bs·L·d, and of activations in bs·L·d/N. "usp_zero3" is an upper bound of its activations."""


def usp_elements(strategy: str, *, hidden: int, tokens: int, rows: int, ranks: int) -> tuple[int, Fraction]:
    """What one block exchanges in forward and backward with a strategy of ``USP_TABLE``.

    Args:
        strategy: a row of the table, such as "tensor".
        hidden, tokens, rows: d, L and bs.
        ranks: N.

    Returns:
        (elements of parameters, elements of activations).
    """
    parameters, constant, divided = USP_TABLE[strategy]
    return parameters * hidden * hidden, (constant + Fraction(divided, ranks)) * rows * tokens * hidden


def usp_grouped_ulysses(*, hidden: int, tokens: int, rows: int, ranks: int, groups: int) -> Fraction:
    """Elements of Ulysses' activations of one block with G query heads a key/value head: (4/N)(1+1/G)·bs·L·d (USP).

    Args:
        hidden, tokens, rows: d, L and bs.
        ranks, groups: N and G.
    """
    return Fraction(4, ranks) * (1 + Fraction(1, groups)) * rows * tokens * hidden


def korthikanti_bytes(method: str, *, tokens: int, rows: int, hidden: int, heads: int, tensor: int = 1) -> Fraction:
    """Bytes of activations of one layer, fp16, dropout, unfused attention, 4h feed-forward (arXiv:2205.05198, table 2).

    Args:
        method: "none", "tensor", "tensor+sequence", "tensor+selective", "tensor+sequence+selective" or "full".
        tokens, rows, hidden, heads: s, b, h and a.
        tensor: t.
    """
    sbh, scores = tokens * rows * hidden, Fraction(5 * heads * tokens, hidden)
    factor = {
        "none": 34 + scores,
        "tensor": 10 + Fraction(24, tensor) + scores / tensor,
        "tensor+sequence": Fraction(34, tensor) + scores / tensor,
        "tensor+selective": 10 + Fraction(24, tensor),
        "tensor+sequence+selective": Fraction(34, tensor),
        "full": Fraction(2),
    }[method]
    return sbh * factor


def alst_checkpoint_bytes(*, layers: int, tokens: int, ranks: int, hidden: int) -> Fraction:
    """Bytes of the inputs of all blocks on one rank with full recomputation: layers · s/SP · h · 2, with SP ``ranks``.

    Source: ALST, arXiv:2506.13996.
    """
    return Fraction(2 * layers * tokens * hidden, ranks)


def alst_logit_bytes(*, tokens: int, ranks: int, vocab: int) -> Fraction:
    """Bytes of one fp32 copy of the logits on one rank: 4 · s/SP · V, with SP ``ranks`` (ALST, arXiv:2506.13996)."""
    return Fraction(4 * tokens * vocab, ranks)


ALST_STATE_BYTES = 2 + 4 + 12
"""Bytes of a parameter in ALST: bf16 weight, fp32 gradient, master weight and two moments in fp32."""
