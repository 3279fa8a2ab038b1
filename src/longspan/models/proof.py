"""Prove, on one rank and before anything is changed, that a Hugging Face model can hold its sequence on several.

    whole       t0 t1 t2 t3 t4 t5 t6  --model, no token sees another-->  y0 y1 y2 y3 y4 y5 y6
    in halves   t0 t1 t2 | t3 t4 ...  --the same-------------------->    y0 y1 y2 | y3 y4 ...          must be equal

For the time of the proof attention gives each token its own values. What is left must not let tokens meet: whatever mixes them
outside attention (a convolution, a state space, a pooling head), or counts positions its own way, gives something else in
halves, in any architecture, and is refused by the name of the first module that differs. The same forwards show whether every
attention layer goes through Transformers' registry, what each says about who may look at whom, and how the loss is formed.

B batch   S my tokens   H heads   K key/value heads   D head dim
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from longspan.attention import attend
from longspan.errors import LongspanError, ModelError
from longspan.layout import Heads
from longspan.masks import Causal, Chunked, Full, Mask, Window
from longspan.mesh import ParallelMesh
from longspan.models.positions import of_ids

TOKENS = 14
"""Of the proof: few, even, and no usual width of a model."""
LEFT = 3
"""Tokens of padding on the left, where the proof has some."""
IN_PLACE = ("ForMaskedLM", "ForTokenClassification")
"""Losses whose labels stand where they are predicted."""
SHIFTED = ("ForCausalLM",)
SELECTING = ("index_topk", "index_block", "index_n_heads", "compress_rate")
"""How fields are named that select keys by content. On rows as short as those of the proof such layers see every key."""
OUTPUT = "output "
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Of the proof, relative to the largest value; other dtypes get ``COARSE``."""
COARSE = 5e-2


class Layer(NamedTuple):
    """What hangs on an attention module: who may look at whom, what users call it, how it attends.

    ``packs``: positions that begin anew mean another document to it, as they do to most decoders.
    """

    own: Mask
    name: str
    packs: bool
    attend: Callable[..., Tensor]


class Said:
    """What the model says about who may look at whom: its mask function, asked when it is needed."""

    def __init__(self, function: Callable[..., Tensor], device: torch.device) -> None:
        self.function, self.device = function, device

    def sees(self, q: int, k: int) -> bool:
        """Whether query q of the first row sees key k."""
        row, head, query, key = torch.tensor([0, 0, q, k], device=self.device)
        return bool(self.function(row, head, query, key))

    @cached_property
    def mask(self) -> Mask | None:
        """The same as a mask, or None where it is none of the kinds that Transformers builds."""
        return as_mask(self.function, self.device)


def as_mask(function: Callable[..., Tensor], device: torch.device, tokens: int = 2**21) -> Mask | None:
    """One of Transformers' mask functions, which are closures, as a mask; None where it is of no kind that it builds.

    Its first column says how far it reaches; the kind that this allows is then compared with it at rows and keys of interest:
    where rows begin and end, and a few hundred others.
    """
    every, zero = torch.arange(tokens, device=device), torch.zeros((), dtype=torch.long, device=device)
    reach = int(function(zero, zero, every, zero).expand(tokens).sum())
    kinds: list[tuple[Mask, Callable[[int], tuple[int, int]]]] = [
        (Full(), lambda q: (0, tokens)),
        (Causal(), lambda q: (0, q + 1)),
        (Window(reach - 1), lambda q: (max(0, q - reach + 1), q + 1)),
        (Window(reach - 1, reach - 1), lambda q: (max(0, q - reach + 1), min(tokens, q + reach))),
        (Chunked(reach) & Causal(), lambda q: (q // reach * reach, q + 1)),
    ]
    rows = sorted({0, 1, 2, reach - 1, reach, reach + 1, tokens // 3, tokens // 2, tokens - 1} & set(range(tokens)))
    some = {*range(64), *range(0, tokens, tokens // 256)}

    def fits(row: Callable[[int], tuple[int, int]]) -> bool:
        for q in rows:
            start, stop = row(q)
            edges = {k + near for k in (start, stop, q) for near in (-2, -1, 0, 1, 2)}
            keys = torch.tensor(sorted(k for k in some | edges if 0 <= k < tokens), device=device)
            seen = function(zero, zero, zero + q, keys).expand(len(keys))
            if not torch.equal(seen, (keys >= start) & (keys < stop)):
                return False
        return True

    return next((mask for mask, row in kinds if fits(row)), None) if reach else None


@dataclass
class Probe:
    """The attention of a proof: no token sees another, and what comes to it is written down."""

    calls: list[tuple[nn.Module, int, int, Any]] = field(default_factory=list)

    def note(self, module: nn.Module, q_BSHD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor, said: Any) -> Tensor:
        """Each token's own values, and a trace of its query, which has been turned by the token's position."""
        self.calls.append((module, q_BSHD.shape[2], k_BSKD.shape[2], said))
        return v_BSKD.repeat_interleave(q_BSHD.shape[2] // k_BSKD.shape[2], 2) + q_BSHD.mean(-1, keepdim=True)


@dataclass(frozen=True)
class Proof:
    """What was found: each attention module's layer, whether the model's own positions begin behind padding, the id of padding
    where they are counted from ids (else None), and the kind of its loss (None where it forms the loss by itself)."""

    layers: tuple[tuple[Any, Layer], ...]
    positions_behind_padding: bool
    padding_id: int | None
    loss_type: str | None


def prove(model: Any, base: Any, mesh: ParallelMesh, head_chunks: int = 1) -> Proof:
    """The proof of a model whose configs name our attention; ``base`` is the one inside an adapter's wrapper, or the same.

    Raises ModelError by name for what cannot be parallel, and LayoutError for heads that do not fit the mesh. Changes nothing.
    """
    with proving(model):
        layers = _prove_attention(model, mesh, head_chunks)
        _prove_tokens(model)
        return Proof(tuple(layers), *_prove_positions(model, base), _prove_loss(model, base))


def refuse_by_config(model: Any) -> None:
    """Raise ModelError, naming the field, for what the config already says cannot be."""
    config = model.config.get_text_config()
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ModelError(f"{type(model).__name__} is on the meta device; give it weights before parallelize, which proves it")
    selecting = sorted(name for name in vars(config) if name.startswith(SELECTING))
    if selecting:
        raise ModelError(
            f"config.{selecting[0]} says that {type(model).__name__} selects or compresses keys by their content on long rows, "
            f"which it would do among this rank's tokens; such a model is not supported"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{type(model).__name__} is an encoder-decoder, not supported yet; use a decoder or an encoder")


@contextmanager
def proving(model: nn.Module) -> Iterator[None]:
    """In evaluation, without gradients, and with no parameter that hides what it multiplies."""
    with _evaluating(model), _awake(model), torch.no_grad():
        yield


@contextmanager
def losing(base: Any, loss: Callable[..., Tensor]) -> Iterator[None]:
    """With another loss function than the model's own."""
    had = vars(base).get("_loss_function")
    base._loss_function = loss
    try:
        yield
    finally:
        if had is None:
            del base._loss_function
        else:
            base._loss_function = had


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, was in training.items():
            module.training = was


@contextmanager
def _awake(model: nn.Module) -> Iterator[None]:
    """Trained parameters of zeros hide what they multiply, as a new adapter's do: for the proof they are random."""
    asleep = [(p, p.data) for p in model.parameters() if p.requires_grad and not p.any()]
    own = torch.Generator().manual_seed(0)
    try:
        for parameter, zeros in asleep:
            parameter.data = (torch.randn(zeros.shape, generator=own) * 0.1).to(zeros)
        yield
    finally:
        for parameter, zeros in asleep:
            parameter.data = zeros


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _ids(model: Any) -> Tensor:
    """Tokens of the proof [TOKENS], none of them special to the model."""
    config = model.config.get_text_config()
    named = [getattr(config, f"{name}_token_id", None) for name in ("pad", "bos", "eos")]
    special = [token for tokens_of_kind in named for token in _as_list(tokens_of_kind)]
    ids = [i for i in range(config.vocab_size) if i not in special][3 : 3 + 3 * TOKENS : 3]
    return torch.tensor(ids, device=model.device)


def ask(model: Any, tokens: slice = slice(0, TOKENS), probe: Probe | None = None, **more: Any) -> dict[str, Tensor]:
    """What the model gives for some of the tokens of the proof, by name."""
    batch = {
        "input_ids": _ids(model)[None, tokens],
        "position_ids": torch.arange(TOKENS, device=model.device)[None, tokens],
    } | more
    given = {name: value for name, value in batch.items() if value is not None}
    try:
        output = model(**given, longspan=probe or Probe(), return_dict=True)
    except LongspanError:
        raise
    except Exception as error:
        if Said.__name__ in str(error):
            raise ModelError(
                f"{type(model).__name__} works on its attention mask in its own code, not through Transformers' attention "
                f"registry: it would see this rank's tokens only; such a model is not supported"
            ) from error
        raise ModelError(
            f"{type(model).__name__} cannot be proven: a forward of {len(range(TOKENS)[tokens])} tokens with "
            f"{', '.join(sorted(given))} fails with {type(error).__name__}: {error}"
        ) from error
    return {name: value for name, value in output.items() if isinstance(value, Tensor) and value.is_floating_point()}


def _prove_attention(model: Any, mesh: ParallelMesh, head_chunks: int) -> list[tuple[Any, Layer]]:
    """Every attention layer reached our function once, with heads that fit the mesh and a mask that can be said in bands."""
    probe, anew = Probe(), Probe()
    ask(model, probe=probe)
    ask(model, probe=anew, position_ids=(torch.arange(TOKENS, device=model.device) % (TOKENS // 2)).unsqueeze(0))
    names = {module: name for name, module in model.named_modules()}
    reached = [module for module, *_ in probe.calls]
    for name, module in model.named_modules():
        if reached.count(module) > 1:
            raise ModelError(
                f"{type(module).__name__} '{name}' attends {reached.count(module)} times in a forward; once is supported"
            )
        alien = not any(_is_within(name, names[other]) or _is_within(names[other], name) for other in reached)
        if "Attention" in type(module).__name__ and alien and any(True for _ in module.parameters()):
            raise ModelError(
                f"{type(module).__name__} '{name}' did not reach longspan: it does not attend through Transformers' attention "
                f"registry and would see this rank's tokens only; such a model is not supported"
            )
    if not reached:
        raise ModelError(f"no layer of {type(model).__name__} attends through Transformers' attention registry")
    layers = []
    for (module, heads, kv_heads, said), (*_, said_anew) in zip(probe.calls, anew.calls):
        Heads(heads, kv_heads, mesh.place.ulysses, head_chunks)
        name = f"{type(module).__name__} '{names[module]}'"
        own = said.mask if isinstance(said, Said) else None
        if own is None:
            raise ModelError(
                f"{name} was given a mask that is none of causal, full, sliding or chunked: what it lets tokens see cannot "
                f"be said in bands, and such a layer is not supported"
            )
        packs = not said_anew.sees(TOKENS // 2, TOKENS // 2 - 1)  # the first token of a document, the last of the one before
        if packs and "Chunked" in repr(own):
            raise ModelError(f"{name} counts its chunks anew in each packed document, which is not supported; pass one a row")
        layers.append((module, Layer(own, name, packs, attend)))
    return layers


def _is_within(name: str, other: str) -> bool:
    return name == other or name.startswith(f"{other}.") or not other


def _prove_tokens(model: nn.Module) -> None:
    """With an attention that lets no token see another, two halves give what the whole gives."""
    outputs: list[dict[str, Tensor]] = []

    def remember(name: str, module: nn.Module, _: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) and output else output
        if isinstance(first, Tensor):
            outputs[-1][name] = first

    handles = [module.register_forward_hook(partial(remember, name)) for name, module in model.named_modules()]
    try:
        for tokens in (slice(0, TOKENS), slice(0, TOKENS // 2), slice(TOKENS // 2, TOKENS)):
            outputs.append({})
            given = ask(model, tokens)
            outputs[-1] |= {f"{OUTPUT}{name}": value for name, value in given.items()}
    finally:
        for handle in handles:
            handle.remove()
    wrong = [name for name in outputs[0] if name.startswith(OUTPUT) and not _is_cut(name, *outputs)]
    if not wrong:
        return
    # Modules write down their outputs in the order in which they finish: the first that differs is the cause.
    name = next((name for name in outputs[0] if _is_cut(name, *outputs) is False), wrong[0])
    module = dict(model.named_modules()).get(name, model)
    raise ModelError(
        f"{type(module).__name__} '{name}' mixes tokens outside attention, or counts positions in its own way: over a part of "
        f"the tokens it gives something else than over all of them; such layers (convolutions, state spaces, pooling) are "
        f"not supported"
    )


def _is_cut(name: str, whole: dict[str, Tensor], left: dict[str, Tensor], right: dict[str, Tensor]) -> bool | None:
    """Whether a module gave the same in two parts; None where its output has no token dimension (experts sort their tokens)."""
    if name not in left or name not in right:
        return None
    sizes = zip(whole[name].shape, left[name].shape, right[name].shape)
    dims = [dim for dim, found in enumerate(sizes) if found == (TOKENS, TOKENS // 2, TOKENS // 2)]
    return _equal(whole[name], torch.cat([left[name], right[name]], dims[0])) if dims else None


def _equal(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or not a.is_floating_point():
        return a.shape == b.shape and bool((a == b).all())
    scale = max(float(a.abs().max()), 1e-30)
    return float((a.double() - b.double()).abs().max()) <= TOLERANCE.get(a.dtype, COARSE) * scale


def all_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(_equal(a[name], b[name]) for name in a)


def _prove_positions(model: Any, base: Any) -> tuple[bool, int | None]:
    """How positions are counted where none are given: from 0, or True, behind padding on the left (OPT), or from the ids,
    whose padding is this one (RoBERTa)."""
    given = ask(model)
    if not all_equal(given, ask(model, position_ids=None)):
        padding_id = model.config.get_text_config().pad_token_id
        if padding_id is not None and _counts_ids(model, padding_id):
            return False, padding_id
        raise ModelError(
            f"{type(model).__name__} does not count its positions 0, 1, 2, ..., which shard gives it; such a model is not "
            f"supported yet"
        )
    if "attention_mask" not in inspect.signature(base.forward).parameters:
        return False, None
    places = torch.arange(TOKENS, device=model.device).unsqueeze(0)
    padding = (places >= LEFT).long()
    counted = _behind_padding(ask(model, position_ids=None, attention_mask=padding))
    if all_equal(_behind_padding(given), counted):
        return False, None
    moved = ask(model, position_ids=(places - LEFT).clamp(min=0), attention_mask=padding)
    if not all_equal(_behind_padding(moved), counted):
        raise ModelError(f"{type(model).__name__} counts its positions from padding in its own way, which is not supported yet")
    return True, None


def _counts_ids(model: Any, padding_id: int) -> bool:
    """Whether the model gives the same where its positions are those of ``of_ids``, with and without a mask of padding."""
    ids = _ids(model).unsqueeze(0)
    ids[0, [0, 1, LEFT + 1, TOKENS - 1]] = padding_id
    counted = ask(model, input_ids=ids, position_ids=of_ids(ids, padding_id))
    masks: tuple[dict[str, Any], ...] = ({}, {"attention_mask": (ids != padding_id).long()})
    return all(all_equal(counted, ask(model, input_ids=ids, position_ids=None, **mask)) for mask in masks)


def _behind_padding(given: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x[:, LEFT:] for name, x in given.items()}


def _prove_loss(model: Any, base: Any) -> str | None:
    """The kind of the model's loss, where it computes one through its ``loss_function``; None where it does so by itself."""
    if "labels" not in inspect.signature(base.forward).parameters:
        return None
    calls = []

    def note(logits: Tensor, labels: Tensor, *args: Any, **keywords: Any) -> Tensor:
        calls.append(keywords.get("longspan"))
        return logits.sum() * 0

    labels = torch.zeros(1, TOKENS, dtype=torch.long, device=model.device)
    already = "_loss_function" in vars(base)
    try:
        with losing(base, note):
            ask(model, labels=labels, shift_labels=labels)
    except ModelError:
        return None
    kind: str | None = getattr(base, "loss_type", None)
    knows_the_step = len(calls) == 1 and isinstance(calls[0], Probe)
    return kind if knows_the_step and not already and kind in (*IN_PLACE, *SHIFTED) else None
