"""The scores of an attention that a model computes in its own code, recorded instead of computed.

    scores = q @ k.transpose(-1, -2)             ->  Scores, of a queries' and a keys' tensor, without a [queries, keys] tensor
    scores = scores / 8 + mask; where(...); ...  ->  the same Scores with a term more
    softmax(scores, -1) @ v                      ->  ``finish(Attention)``: q, k, v and all terms, in place of the product

``RecordScores`` does this to every batched product of a module's forward while it is entered. A use that is no term of
scaled dot-product attention raises ModelError. Independent of masks of models, steps and meshes.

S queries   T keys   D head dim
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from longspan.errors import ModelError

PRODUCTS = frozenset({"matmul", "bmm", "baddbmm"})
SAME = frozenset({"to", "float", "double", "half", "bfloat16", "type", "type_as", "contiguous", "clone", "nan_to_num"})
"""Functions of scores or probabilities that change no value but by rounding."""
SHAPES = frozenset({"view", "reshape", "expand", "squeeze", "unsqueeze", "view_as", "flatten", "unflatten"})
LIKE: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "expand_as": lambda x, symbol: x.expand(symbol.shape), "view_as": lambda x, symbol: x.view(symbol.shape),
    "type_as": lambda x, symbol: x.to(symbol.dtype), "to": lambda x, symbol: x.to(symbol.device, symbol.dtype),
}  # fmt: skip
"""Functions that make a tensor like another one, here like a symbol."""
DESCRIBES = frozenset({"size", "dim", "is_floating_point", "numel"})


@dataclass(frozen=True)
class Term:
    """One operation on scores that was recorded.

    Attributes:
        kind: "scale" (times ``value``), "add" (plus ``value``), "hide" (probability 0 where ``value`` is true), "show"
            (probability 0 where ``value`` is false) or "cap" (tanh).
        value: a number, a tensor, or the object that the model uses as its mask; None for "cap".
        shape: the shape [..., S, T] of the scores when the operation was recorded.
    """

    kind: str
    value: Any
    shape: torch.Size


@dataclass(frozen=True)
class Attention:
    """One softmax attention that a module's own code computes, as ``RecordScores`` recorded it.

    Attributes:
        q, k, v: the model's own tensors [..., S, D], [..., T, D] and [..., T, V], for S queries, T keys and head dims D and V.
        terms: the operations on the scores, in order.
        shape: [..., S, T] of the probabilities when they were multiplied by ``v``.
        dropout: the rate of dropout on the probabilities.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    terms: tuple[Term, ...]
    shape: torch.Size
    dropout: float


class Symbol:
    """A placeholder for a tensor [..., S, T] that is never computed: it has shape, dtype and device, and records operations.

    Args:
        q, k: the queries and keys of which it is the product.
        record: the mode that made it, which ends the recording.
    """

    __hash__ = object.__hash__

    def __init__(self, q: Tensor, k: Tensor, record: "RecordScores") -> None:
        self.q, self.k, self.record, self.terms = q, k, record, ()
        batch = torch.broadcast_shapes(q.shape[:-2], k.shape[:-2])
        self.shape = torch.Size((*batch, q.shape[-2], k.shape[-2]))
        self.dtype, self.device, self.dropout = q.dtype, q.device, 0.0

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: apply(name, (self, *args), kwargs)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return apply(func.__name__, args, kwargs or {})

    def copy(self, kind: "type[Symbol] | None" = None, **changes: Any) -> Any:
        """A copy of this symbol, of the class ``kind`` if given, with the attributes ``changes`` replaced."""
        other = object.__new__(kind or type(self))
        vars(other).update(vars(self) | changes)
        return other


class Scores(Symbol):
    """A placeholder for the product of queries and keys: an operation on it gives Scores with one more term, or
    Probabilities."""


class Probabilities(Symbol):
    """A placeholder for the softmax of attention scores over the keys; its product with the values ends the recording."""


def _operator(name: str) -> Callable[..., Any]:
    """A special method (``__add__``, ...) of Symbol that records the operation ``name``."""
    return lambda self, *args: apply(name, (self, *args), {})


for _name in ("add", "radd", "iadd", "sub", "isub", "mul", "rmul", "imul", "truediv", "itruediv", "matmul", "neg", "pow"):
    setattr(Symbol, f"__{_name}__", _operator(_name))


class RecordScores(TorchFunctionMode):
    """Torch function mode: inside, a batched product of two tensors returns Scores instead of being computed.

    Args:
        owner: the name of the module's class, for messages.
        finish: called with the recorded Attention instead of the product of probabilities and values; returns [..., S, V] with
            the leading dims of the queries.
    """

    def __init__(self, owner: str, finish: Callable[[Attention], Tensor]) -> None:
        super().__init__()
        self.owner, self._finish, self._finishing = owner, finish, False

    def finish(self, attention: Attention) -> Tensor:
        """The result of the argument ``finish`` of this mode for ``attention``; meanwhile the mode records nothing."""
        self._finishing = True
        try:
            return self._finish(attention)
        finally:
            self._finishing = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if self._finishing:
            return func(*args, **kwargs)
        if any(isinstance(each, Symbol) for each in (*args, *kwargs.values())):
            return apply(name, args, kwargs)
        if name == "scaled_dot_product_attention":
            return self.finish(_fused(*args, **kwargs))
        if _base_name(name) in PRODUCTS and _is_batched(_base_name(name), args, kwargs):
            return _product(_base_name(name), args, kwargs, self)
        return func(*args, **kwargs)


def apply(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Record the torch function ``name``, of whose arguments at least one is a Symbol.

    Args:
        name: the name of a torch function or Tensor method.
        args, kwargs: its arguments.

    Returns:
        A Symbol, or the output of ``RecordScores.finish`` for the last product.

    Raises:
        ModelError: the function is no part of scaled dot-product attention.
    """
    in_place, name = name.endswith("_") and not name.endswith("__"), _base_name(name)
    symbol = next(each for each in (*args, *kwargs.values()) if isinstance(each, Symbol))
    if args and isinstance(args[0], Tensor) and name in LIKE:
        return LIKE[name](args[0], symbol)
    if name in DESCRIBES:
        return _described(symbol, name, *args[1:], **kwargs)
    if name in SAME:
        return symbol
    if name in SHAPES:
        return symbol.copy(shape=_reshaped(symbol, name, args[1:], kwargs))
    known = _OF_SCORES if isinstance(symbol, Scores) else _OF_PROBABILITIES
    if name not in known:
        _refuse(symbol, name)
    try:
        inspect.signature(known[name]).bind(*args, **kwargs)
    except TypeError:
        return _refuse(symbol, f"{name} with {', '.join(kwargs) or 'other arguments'}")
    found = known[name](*args, **kwargs)
    if in_place and isinstance(found, Symbol):
        vars(symbol).update(vars(found))
    return found


def _base_name(name: str) -> str:
    """The name of an operation without underscores and the prefixes of reflected and in-place operators: "__radd__" is
    "add"."""
    name = name.strip("_")
    return name[1:] if name in ("radd", "rmul", "iadd", "isub", "imul", "itruediv") else name


def _refuse(symbol: Symbol, what: str) -> NoReturn:
    """Raise ModelError: the module's own code does ``what`` with its scores or probabilities."""
    kind = "scores" if isinstance(symbol, Scores) else "probabilities"
    raise ModelError(
        f"{symbol.record.owner} attends in its own code and does {what} with its {kind}, which is no scaled dot-product "
        f"attention; such a layer is not supported"
    )


def _is_batched(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a product is one of two tensors with at least three dims: that may be queries and keys."""
    named = [kwargs[key] for key in ("batch1", "batch2", "mat2", "other") if key in kwargs]
    a, b = [*args, *named][-2:] if name == "baddbmm" else [*args, *named][:2]
    return isinstance(a, Tensor) and isinstance(b, Tensor) and a.ndim >= 3 and b.ndim >= 3


def _product(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], record: RecordScores) -> Any:
    """The Scores of a product of queries and keys, by the function ``name``: matmul, bmm or baddbmm.

    ``args`` and ``kwargs`` are that function's; ``record`` is the mode that saw the call.
    """
    if name != "baddbmm":
        q, k = (*args, *kwargs.values())
        return Scores(q, k.transpose(-1, -2), record)
    given = dict(zip(("input", "batch1", "batch2"), args)) | kwargs
    alpha, beta = given.get("alpha", 1), given.get("beta", 1)
    scores = _mul(Scores(given["batch1"], given["batch2"].transpose(-1, -2), record), alpha)
    return _add(scores, given["input"], beta) if beta else scores


def _fused(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: float | None = None, enable_gqa: bool = False,
) -> Attention:  # fmt: skip
    """What a call of ``F.scaled_dot_product_attention`` computes, as an Attention with its scale and mask as terms.

    Its arguments are that function's; ``scale`` None is 1/sqrt(D).
    """
    shape = torch.Size((*query.shape[:-1], key.shape[-2]))
    terms = [Term("scale", query.shape[-1] ** -0.5 if scale is None else scale, shape)]
    if is_causal:
        terms.append(Term("show", torch.ones(shape[-2:], dtype=torch.bool, device=query.device).tril(), shape))
    if attn_mask is not None:
        shows = isinstance(attn_mask, Tensor) and attn_mask.dtype == torch.bool
        terms.append(Term("show" if shows else "add", attn_mask, shape))
    return Attention(query, key, value, tuple(terms), shape, dropout_p)


def _described(symbol: Symbol, name: str, *args: Any, **kwargs: Any) -> Any:
    """The result of ``size``, ``dim``, ``numel`` or ``is_floating_point`` of a symbol."""
    if name == "size":
        dim = args[0] if args else kwargs.get("dim")
        return symbol.shape if dim is None else symbol.shape[dim]
    return {"dim": symbol.ndim, "is_floating_point": True, "numel": symbol.shape.numel()}[name]


def _reshaped(symbol: Symbol, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Size:
    """The shape that the reshape ``name`` gives to ``symbol``.

    Raises:
        ModelError: its last two dims would no longer be queries and keys.
    """
    like = torch.empty((), device="meta").expand(symbol.shape)
    shape: torch.Size = getattr(like, name if name != "view" else "reshape")(*args, **kwargs).shape
    if shape[-2:] != symbol.shape[-2:]:
        _refuse(symbol, f"{name} to {list(shape)}")
    return shape


def _add(a: Any, b: Any, alpha: float = 1) -> Any:
    """Record scores + a tensor in the order of the call, as ``torch.add`` with its ``alpha`` (the factor of ``b``).

    Returns:
        The scores with one more term, or the same scores for + 0.

    Raises:
        ModelError: both are scores or probabilities (Symbol) of which a sum is no attention.
    """
    scores, other = (a, b) if isinstance(a, Scores) else (b, a)
    if isinstance(other, Symbol):
        return _refuse(scores, "a sum")
    if isinstance(other, int | float) and other == 0 and alpha == 1:
        return scores
    if alpha == 1:
        return _with(scores, "add", other)
    return _with(a, "add", b * alpha) if scores is a else _with(_with(b, "scale", alpha), "add", a)


def _sub(a: Any, b: Any) -> Any:
    return _add(a, -b) if isinstance(a, Scores) and not isinstance(b, Symbol) else _refuse(b, "subtract")


def _mul(a: Any, b: Any) -> Any:
    """Record scores times a number or tensor, in either order; a product of two symbols is refused."""
    scores, factor = (a, b) if isinstance(a, Scores) else (b, a)
    return _refuse(scores, "a product") if isinstance(factor, Symbol) else _with(scores, "scale", factor)


def _div(a: Any, b: Any, rounding_mode: Any = None) -> Any:
    """Scores whose recorded scale is divided by ``b``, a number or tensor.

    Any other quotient (of something else than scores, by scores, or rounded) is refused.
    """
    if not isinstance(a, Scores) or isinstance(b, Symbol) or rounding_mode is not None:
        return _refuse(b if isinstance(b, Symbol) else a, "a quotient")
    return _with(a, "scale", 1 / b)


def _masked_fill(scores: Any, mask: Any, value: Any) -> Any:
    """Record that keys where ``mask`` is true are hidden; a ``value`` that does not hide is refused."""
    if not _hides(value):
        return _refuse(scores, f"masked_fill with {value}")
    return _with(scores, "hide", mask)


def _where(condition: Any, a: Any, b: Any) -> Any:
    """Record which keys ``condition`` shows or hides; one of ``a`` and ``b`` must be scores, the other a value that hides."""
    if isinstance(a, Scores) and _hides(b) and isinstance(condition, Tensor):
        return _with(a, "show", condition)
    if isinstance(b, Scores) and _hides(a) and isinstance(condition, Tensor):
        return _with(b, "hide", condition.bool())
    return _refuse(a if isinstance(a, Symbol) else b, "where")


def _maximum(scores: Any, other: Any = None, min: Any = None, max: Any = None) -> Any:
    """The scores themselves, for a floor so low that it hides; any other maximum or clamp is refused."""
    floor = other if min is None else min
    return scores if max is None and _hides(floor) else _refuse(scores, "max")


def _hides(value: Any) -> bool:
    """Whether ``value``, as a score, means probability 0: a number, or a tensor of one number, of at most -10,000."""
    return (
        isinstance(value, int | float | Tensor) and (not isinstance(value, Tensor) or value.ndim == 0) and float(value) <= -1e4
    )


def _tanh(scores: Any) -> Any:
    return _with(scores, "cap")


def _softmax(scores: Any, dim: int = -1, dtype: Any = None, _stacklevel: int = 3) -> Any:
    """The Probabilities of scores, for a softmax over the keys; one over another dim is refused."""
    if dim not in (-1, scores.ndim - 1):
        return _refuse(scores, f"softmax over dim {dim}")
    return scores.copy(Probabilities)


def _dropout(probabilities: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    return probabilities.copy(dropout=p) if training and p else probabilities


def _attend(probabilities: Any, v: Any) -> Any:
    """The product of probabilities and values ``v``, which ends the recording: what ``RecordScores.finish`` returns for it."""
    if not isinstance(probabilities, Probabilities) or not isinstance(v, Tensor):
        return _refuse(probabilities if isinstance(probabilities, Symbol) else v, "a product")
    found = Attention(probabilities.q, probabilities.k, v, probabilities.terms, probabilities.shape, probabilities.dropout)
    return probabilities.record.finish(found)


def _with(scores: Any, kind: str, value: Any = None) -> Any:
    """A copy of ``scores`` with one more term of this kind and value."""
    return scores.copy(terms=(*scores.terms, Term(kind, value, scores.shape)))


_OF_SCORES: dict[str, Callable[..., Any]] = {
    "add": _add, "sub": _sub, "mul": _mul, "multiply": _mul, "div": _div, "truediv": _div, "true_divide": _div,
    "masked_fill": _masked_fill, "where": _where, "max": _maximum, "maximum": _maximum, "clamp": _maximum, "tanh": _tanh,
    "softmax": _softmax,
}  # fmt: skip
_OF_PROBABILITIES: dict[str, Callable[..., Any]] = {"dropout": _dropout, "matmul": _attend, "bmm": _attend}


class Recorded:
    """Replaces the forward of a module by one that runs it inside RecordScores, until ``remove``.

    Args:
        module: an attention module.
        finish: called with the module and each recorded Attention; returns the output of that attention.
    """

    def __init__(self, module: nn.Module, finish: Callable[[nn.Module, Attention], Tensor]) -> None:
        self._module, self._had, own = module, vars(module).get("forward"), module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            with RecordScores(type(module).__name__, partial(finish, module)):
                return own(*args, **kwargs)

        vars(module)["forward"] = forward

    def remove(self) -> None:
        """Undo the replacement: the module runs the forward that it had before."""
        vars(self._module).pop("forward", None)
        if self._had is not None:
            vars(self._module)["forward"] = self._had
