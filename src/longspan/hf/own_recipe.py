"""What the terms of an attention in a model's own code mean, read off in a proof: scale, mask, ALiBi or softcap.

    scores / 8                     "scale"     also a tensor without a dim of keys, which then multiplies the queries
    scores + m, m of 0 and -inf    "mask"      as the code of a model builds it, or a MaskFunction that it was handed
    scores + b, b linear in keys   "bias"      ALiBi: a slope a head, and a mask where b is -inf
    scores * g, g of 0 and 1       "gate"      beside a mask that hides what g sets to 0
    c tanh(scores / c)             "cap"

Everything else is refused by name. Independent of layers and meshes.

H heads   S queries   T keys   D head dim
Source: ALiBi, arXiv:2108.12409.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from longspan._compat import base_of_view
from longspan.errors import ModelError
from longspan.hf.mask_functions import AllOf, DenseMask, MaskFunction
from longspan.hf.names import block_fields, reach_fields
from longspan.hf.own_scores import Attention, Term

HIDDEN = -1e4
"""A score of this or less has the probability 0; models add it where a query does not see a key."""
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}
"""The tolerance of ALiBi by dtype, relative to its largest value; other dtypes get ``COARSE``."""
COARSE = 2e-2


@dataclass(frozen=True)
class Recipe:
    """How a module computes attention in its own code, as a test forward showed it; ``attend_in_step`` computes by it.

    Attributes:
        heads: the number of query heads.
        kv_heads: the number of key/value heads.
        roles: the meaning of each term of its scores, in order: "scale", "mask", "bias", "gate" or "cap".
        slopes: the slopes [heads] of ALiBi, or None without it.
    """

    heads: int
    kv_heads: int
    roles: tuple[str, ...]
    slopes: Tensor | None

    def is_like(self, other: "Recipe") -> bool:
        """Whether ``other`` describes the same computation: all fields are equal, slopes by their values."""
        mine, theirs = self.slopes, other.slopes
        alike = mine is theirs if mine is None or theirs is None else torch.equal(mine, theirs)
        return alike and replace(self, slopes=None) == replace(other, slopes=None)

    def operands(self, attention: Attention) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v of ``attention`` as [batch, tokens, heads, dim]; q is multiplied by every scale that is a tensor.

        All have the widest of their dtypes, because some modules compute scores in fp32 and have values of another dtype.
        """
        q = attention.q
        for term in attention.terms:
            if term.kind == "scale" and isinstance(term.value, Tensor) and not _has_keys(term.value):
                q = _times(q, term.value, term.shape)
        shaped = ((q, self.heads), (attention.k, self.kv_heads), (attention.v, self.kv_heads))
        dtype = torch.promote_types(torch.promote_types(q.dtype, attention.k.dtype), attention.v.dtype)
        q, k, v = (x.reshape(-1, heads, *x.shape[-2:]).transpose(1, 2).to(dtype) for x, heads in shaped)
        return q, k, v

    def scale_and_softcap(self, terms: Sequence[Term]) -> tuple[float, float | None]:
        """The factor of the scores and their softcap, read from the recorded operations ``terms``.

        Returns:
            (product of all numeric scales, the softcap or None without one).
        """
        before, after, capped = 1.0, 1.0, False
        for term in terms:
            capped |= term.kind == "cap"
            if term.kind == "scale" and not isinstance(term.value, Tensor):
                before, after = (before, after * term.value) if capped else (before * term.value, after)
        return (before * after, after) if capped else (before, None)


def mask_of(module: nn.Module, q_BSHD: Tensor, k_BSKD: Tensor, value: Any, configs: Sequence[Any]) -> Any:
    """The attention mask that a model passes to Transformers' registry, as a MaskFunction.

    Args:
        module: the attention module.
        q_BSHD: its queries.
        k_BSKD: its keys.
        value: the mask: a tensor of booleans or of numbers to add, which is read by its values; or any other object.
        configs: those of the model.

    Returns:
        A MaskFunction; full attention for None if ``module.is_causal`` is False. ``value`` unchanged if it is no tensor, or a
        tensor that also holds ALiBi.

    Raises:
        ModelError: the tensor is neither a mask nor ALiBi.
    """
    if value is None and getattr(module, "is_causal", True) is False:
        return AllOf([], q_BSHD.device)
    if not isinstance(value, Tensor):
        return value
    shape = torch.Size((1, q_BSHD.shape[2], q_BSHD.shape[1], k_BSKD.shape[1]))
    q, k = (x.transpose(1, 2) for x in (q_BSHD, k_BSKD))
    term = Term("show" if value.dtype == torch.bool else "add", value, shape)
    recipe, mask = read_recipe(module, Attention(q, k, k, (term,), shape, 0.0), configs)
    return mask if recipe.slopes is None else value


def shape_like(out_BSHV: Tensor, attention: Attention) -> Tensor:
    """``out_BSHV``, [batch, tokens, heads, dim], with the shape [..., S, V] and dtype that the model's code expects of
    ``attention``."""
    return out_BSHV.transpose(1, 2).reshape(*attention.shape[:-1], out_BSHV.shape[-1]).to(attention.v.dtype)


def read_recipe(module: nn.Module, attention: Attention, configs: Sequence[Any]) -> tuple[Recipe, MaskFunction]:
    """Read the meaning of every term of one attention, recorded in a test forward with one row.

    Args:
        module: the attention module.
        attention: the recorded attention.
        configs: the configs of its model.

    Returns:
        (the Recipe, the mask of all terms together).

    Raises:
        ModelError: a term is none of those in the table of this file, or the numbers of heads do not fit.
    """
    reader = _Reader(module, attention, configs)
    blocks = block_fields(configs)
    if blocks:
        reader.refuse(f"has config.{blocks[0]}, by which it attends otherwise on longer rows")
    for term in attention.terms:
        reader.read(term)
    mask, slopes = reader.mask_and_slopes()
    heads, kv_heads = (x.shape[:-2].numel() for x in (attention.q, attention.k))
    if attention.v.shape[:-2].numel() != kv_heads or heads % kv_heads:
        reader.refuse(f"has {heads} heads of queries, {kv_heads} of keys and {attention.v.shape[:-2].numel()} of values")
    return Recipe(heads, kv_heads, tuple(reader.roles), slopes), mask


class _Reader:
    """Finds the meaning of the operations of one recorded attention: call ``read`` for each of them, in order.

    Afterwards ``roles`` has the meaning of each, and ``mask_and_slopes()`` returns what they add up to.

    Args:
        module: the attention module, for messages.
        attention: the recorded attention.
        configs: the configs of its model, which may limit how far a query sees.
    """

    def __init__(self, module: nn.Module, attention: Attention, configs: Sequence[Any]) -> None:
        self.module, self.attention, self.configs = module, attention, configs
        self.roles: list[str] = []
        self._shape = attention.shape  # of the term that is read
        self._bias: tuple[Tensor, float] | None = None  # [heads, S, T], and its factor
        self._masks: list[MaskFunction] = []
        self._gates: list[Tensor] = []

    def refuse(self, what: str) -> None:
        """Raise ModelError: the module attends in its own code and does ``what``, which is not supported."""
        raise ModelError(
            f"{type(self.module).__name__} attends in its own code and {what}, which over a part of the tokens is not what it "
            f"is over all of them; such a layer is not supported"
        )

    def read(self, term: Term) -> None:
        """Append the role of ``term`` to ``roles``. Raises ModelError for a term without a role."""
        value, self._shape = term.value, term.shape
        if term.kind == "cap":
            self._read_cap()
        elif term.kind == "scale":
            self._read_scale(value)
        elif isinstance(value, MaskFunction):
            self._note("mask", value)
        elif term.kind == "add":
            self._read_addition(value)
        else:
            shows = term.kind == "show"
            self._note("mask", self._dense(value.bool() if shows else ~value.bool(), base_of_view(value) if shows else None))

    def mask_and_slopes(self) -> tuple[MaskFunction, Tensor | None]:
        """What the terms that were read add up to.

        Returns:
            (the mask of all terms together, the slopes [heads] of ALiBi or None without it).

        Raises:
            ModelError: scores of a visible key are multiplied by 0, or the bias is not linear in the key.
        """
        whole = AllOf(self._masks, self.attention.q.device)
        shown = whole.shown(*self.attention.shape[-2:])
        if any(bool((shown & (gate == 0)).any()) for gate in self._gates):
            self.refuse("multiplies scores of keys that it sees by 0")
        return whole, None if self._bias is None else self._fitted(*self._bias, shown)

    def _note(self, role: str, mask: MaskFunction | None = None) -> None:
        """Append ``role`` to ``roles``, and ``mask``, if there is one, to the masks of the terms."""
        self.roles.append(role)
        if mask is not None:
            self._masks.append(mask)

    def _read_cap(self) -> None:
        """Note a softcap. Raises ModelError if the scores have a mask or a bias already."""
        if set(self.roles) - {"scale"} or any(
            isinstance(term.value, Tensor) for term in self.attention.terms[: len(self.roles)]
        ):
            self.refuse("caps scores that have a mask or a bias already")
        self._note("cap")

    def _read_scale(self, value: Any) -> None:
        """Note a multiplication of the scores by ``value``: a scale, or a gate of 0 and 1. Raises ModelError for any other."""
        if not isinstance(value, Tensor):
            self._bias = None if self._bias is None else (self._bias[0], self._bias[1] * value)
            return self._note("scale")
        if _has_keys(value):
            gate = value.expand(self._shape).flatten(0, -3)
            if bool(((gate != 0) & (gate != 1)).any()) or bool((gate != gate[:1]).any()):
                self.refuse(f"multiplies its scores by a tensor of shape {list(value.shape)}")
            self._gates.append(gate[0])
            return self._note("gate")
        if self._bias is not None or "cap" in self.roles:
            self.refuse("multiplies scores that have a bias or a cap by a tensor")
        return self._note("scale")

    def _read_addition(self, value: Any) -> None:
        """Note an addition of ``value`` to the scores: a mask of 0 and -inf, or a bias. Raises ModelError for any other."""
        if not isinstance(value, Tensor):
            return self.refuse(f"adds {value!r} to its scores")
        sees = value > HIDDEN
        if value.dtype == torch.bool or not bool(value.isfinite().logical_or(~sees).all()):
            self.refuse(f"adds a tensor of {value.dtype} to its scores")
        if not bool((value * sees).nan_to_num().any()):
            return self._note("mask", self._dense(sees))
        if self._bias is not None or "cap" in self.roles:
            self.refuse("adds several terms to its scores")
        self._bias = value.expand(self._shape).flatten(0, -3), 1.0
        return self._note("bias", None if bool(sees.all()) else self._dense(sees))

    def _dense(self, sees: Tensor, base: Tensor | None = None) -> MaskFunction:
        """The mask in which query q sees key k if ``sees[q, k]``.

        Args:
            sees: boolean, [..., queries, keys], equal for all heads.
            base: the larger square buffer of which ``sees`` is a slice, which is used in its place; None if there is none.

        Raises:
            ModelError: heads differ, or a config field may hide further keys on longer rows.
        """
        every = sees.expand(self._shape).flatten(0, -3)
        if bool((every != every[:1]).any()):
            self.refuse("hides other keys in one head than in another")
        if base is not None and _contains(base, every[0]):
            return DenseMask(base.reshape(base.shape[-2:]).bool())
        limits = reach_fields(self.configs)
        if limits:
            self.refuse(f"builds its mask itself under config.{limits[0]}, which may hide keys on longer rows")
        return DenseMask(every[0])

    def _fitted(self, value_HST: Tensor, factor: float, shown_ST: Tensor) -> Tensor:
        """The slopes [heads] of a bias that is linear in the key, as in ALiBi.

        Args:
            value_HST: the bias [heads, queries, keys].
            factor: a number by which the scores were multiplied later; the slopes are too.
            shown_ST: True where a query sees a key.

        Raises:
            ModelError: among the keys that a query sees, the bias is not linear.
        """
        bias_HST = value_HST.double()
        first_S = shown_ST.int().argmax(-1)
        run_ST = torch.arange(shown_ST.shape[-1], device=bias_HST.device) - first_S.unsqueeze(-1)
        reach_S = run_ST.where(shown_ST, 0).amax(-1)
        query = reach_S.argmax()
        first, last = first_S[query], first_S[query] + reach_S[query]
        slopes_H = (bias_HST[:, query, last] - bias_HST[:, query, first]) / reach_S[query].clamp(min=1)
        rise_HST = bias_HST - bias_HST.gather(-1, first_S[None, :, None].expand(len(bias_HST), -1, 1))
        apart = (rise_HST - slopes_H[:, None, None] * run_ST).where(shown_ST, 0).abs().max()
        if float(apart) > TOLERANCE.get(value_HST.dtype, COARSE) * float(rise_HST.where(shown_ST, 0).abs().max()):
            self.refuse(f"adds a bias of shape {list(value_HST.shape)} to its scores that is no slope times the distance")
        return (slopes_H * factor).to(torch.promote_types(value_HST.dtype, torch.float32))


def _has_keys(factor: Tensor) -> bool:
    """Whether a factor of the scores [..., queries, keys] has a dim of keys, rather than one value for each query."""
    return factor.ndim > 0 and factor.shape[-1] > 1


def _times(q: Tensor, factor: Tensor, shape: torch.Size) -> Tensor:
    """The queries ``q`` [..., S, D] multiplied by a factor of their scores, so that the scores get the same factor.

    Args:
        q: the queries.
        factor: [..., S or 1, 1]: one value for all keys.
        shape: the shape [..., S, T] of the scores.
    """
    if factor.numel() == 1:
        return q * factor.reshape(()).to(q.dtype)
    return (q.reshape(*shape[:-1], q.shape[-1]) * factor.to(q.dtype)).reshape(q.shape)


def _contains(base: Tensor, part: Tensor) -> bool:
    """Whether ``part`` [S, T] equals the upper left corner of ``base``, a larger square mask without dims of rows and heads.

    Models keep such a square for their longest row, and slice it. Values are compared as booleans.
    """
    rows, keys = base.shape[-2:] if base.ndim >= 2 else (0, 0)
    if rows != keys or rows <= part.shape[0] or base.numel() != rows * keys:
        return False
    return torch.equal(base.reshape(rows, keys)[: part.shape[0], : part.shape[1]].bool(), part)
