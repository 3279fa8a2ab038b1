"""Any Hugging Face model, unmodified: its attention over the mesh, its loss over all ranks. Needs the extra ``hf``.

    model(**part)   ->   embeddings, norms, MLPs, experts: this rank's tokens, the model's own code
                              |
                         attention(module, query, key, value, mask, ..., longspan=Step)      by the *name* "longspan" in
                              |                                                              Transformers' public registries
                         attend(...) over the mesh that hangs on the module
                              |
                    ->   loss_function(logits, labels, ...)   the mean over the labels of all ranks

Nothing of the process or of another model changes: this model gets a copy of its config that names the attention, and
attributes and hooks on itself, which ``undo`` takes away. Before that ``Pretrained`` *proves* the model on one rank, with an
attention that lets no token see another: cut in two, the model must give what it gives whole. So whatever mixes tokens outside
attention (a convolution, a state space, a pooling head) or counts positions its own way is found, by name, in any architecture.

B batch   H heads   K key/value heads   S my tokens   D head dim
"""

import inspect
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel

from longspan.attention import attend
from longspan.batch import Step
from longspan.errors import LongspanError, ModelError
from longspan.layout import Heads
from longspan.loss import cross_entropy
from longspan.masks import Causal, Chunked, Full, Mask, Window
from longspan.mesh import ParallelMesh

NAME = "longspan"
"""The attention that a parallel model's config names."""
TOKENS = 14
"""Of the proof: few, even, and no usual width of a model."""
IN_PLACE = ("ForMaskedLM", "ForTokenClassification")
"""Losses whose labels stand where they are predicted."""
SHIFTED = ("ForCausalLM",)
OUTPUT = "output "
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Of the proof, relative to the largest value; other dtypes get ``COARSE``."""
COARSE = 5e-2


class Layer(NamedTuple):
    """What hangs on an attention module: the mesh, who may look at whom, what users call it.

    ``packs``: positions that begin anew mean another document to it, as they do to most decoders.
    """

    mesh: ParallelMesh
    own: Mask
    name: str
    packs: bool


def _attention(
    module: nn.Module, query_BHSD: Tensor, key_BKSD: Tensor, value_BKSD: Tensor, attention_mask: Any, *,
    dropout: float = 0.0, scaling: float | None = None, softcap: float | None = None, s_aux: Tensor | None = None,
    longspan: "Step | _Probe | None" = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """The attention that Transformers calls by name: (out [batch, my tokens, heads, dim], no weights)."""
    q, k, v = (x.transpose(1, 2) for x in (query_BHSD, key_BKSD, value_BKSD))
    if isinstance(longspan, _Probe):
        return longspan.note(module, q, k, v, attention_mask), None
    layer: Any = getattr(module, "_longspan", None)
    if layer is None or longspan is None:
        raise ModelError(
            f"the attention 'longspan' of {type(module).__name__} was called without a mesh or a step; call "
            f"parallelize(model, mesh), then model(**shard(batch, mesh))"
        )
    if dropout:
        _refuse_dropout(module, layer)
    out = attend(
        q, k, v, mask=longspan.mask_for(layer.own, restarts=layer.packs), mesh=layer.mesh, tokens=longspan.tokens,
        scale=scaling, softcap=softcap, sinks=s_aux,
    )  # fmt: skip
    return out, None


def _refuse_dropout(module: nn.Module, layer: Layer) -> None:
    config: Any = getattr(module, "config", None)
    fields = [name for name, value in vars(config).items() if "dropout" in name and value] if config is not None else []
    raise ModelError(
        f"{layer.name} asks for attention dropout, which would differ on every layout; set "
        f"{' or '.join(f'config.{name}' for name in fields) or 'its attention dropout'} to 0 before the model is built"
    )


class _Said:
    """What the model says about who may look at whom: its mask function, asked when it is needed."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function = function

    @cached_property
    def mask(self) -> Mask | None:
        """The same as a mask, or None where it is none of the kinds that Transformers builds."""
        return as_mask(self.function)


def _mask(*_: Any, mask_function: Callable[..., Tensor], **__: Any) -> _Said:
    """The mask that Transformers asks for by name. Padding and documents are the Step's; this is what the layer itself is."""
    return _Said(mask_function)


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)


def as_mask(function: Callable[..., Tensor], tokens: int = 2**21) -> Mask | None:
    """One of Transformers' mask functions, which are closures, as a mask; None where it is of no kind that it builds.

    Its first column says how far it reaches; the kind that this allows is then compared with it at rows and keys of interest:
    where rows begin and end, and a few hundred others.
    """
    every, zero = torch.arange(tokens), torch.zeros((), dtype=torch.long)
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
            keys = torch.tensor(sorted(k for k in some | edges if 0 <= k < tokens))
            seen = function(zero, zero, torch.tensor(q), keys).expand(len(keys))
            if not torch.equal(seen, (keys >= start) & (keys < stop)):
                return False
        return True

    return next((mask for mask, row in kinds if fits(row)), None) if reach else None


@dataclass
class _Probe:
    """The attention of a proof: no token sees another, and what comes to it is written down."""

    calls: list[tuple[nn.Module, int, int, Any]] = field(default_factory=list)

    def note(self, module: nn.Module, q_BSHD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor, said: Any) -> Tensor:
        """Each token's own values, and a trace of its query, which has been turned by the token's position."""
        self.calls.append((module, q_BSHD.shape[2], k_BSKD.shape[2], said))
        return v_BSKD.repeat_interleave(q_BSHD.shape[2] // k_BSKD.shape[2], 2) + q_BSHD.mean(-1, keepdim=True)


class Pretrained:
    """A Transformers model as ``parallelize`` wants it: proven, with its blocks, and the way to give it a mesh and back."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model: Any = model
        configured = [module for module in model.modules() if isinstance(getattr(module, "config", None), PreTrainedConfig)]
        self.configs: list[tuple[Any, Any]] = [(module, module.config) for module in configured]
        self._handles: list[Any] = []

    def blocks(self) -> list[nn.Module]:
        """The layers that FSDP2 shards one by one."""
        kinds = set(self.model._no_split_modules or ())
        return [module for module in self.model.modules() if type(module).__name__ in kinds]

    def prove(self, mesh: ParallelMesh) -> None:
        """Raise ModelError by name for what cannot be parallel, LayoutError for heads that do not fit. Changes nothing."""
        _refuse_by_config(self.model)
        with self._renamed(), _evaluating(self.model), torch.no_grad():
            self.layers = _prove_attention(self.model, mesh)
            _prove_tokens(self.model)
            self.positions_from_padding = _prove_positions(self.model)
            self.loss_type = _prove_loss(self.model)

    def install(self, mesh: ParallelMesh) -> None:
        """Give the model its mesh: copies of its configs, its attention layers' mesh, its loss, its hooks."""
        self._rename()
        for module, layer in self.layers:
            module._longspan = layer
        if self.loss_type is not None:
            self.model._loss_function = partial(_loss, mesh=mesh, in_place=self.loss_type in IN_PLACE)
        self._handles = [self.model.register_forward_pre_hook(partial(_check_call, self), prepend=True, with_kwargs=True)]
        for name, rotary in self.model.named_modules():
            if _chooses_by_length(rotary):
                self._handles.append(rotary.register_forward_pre_hook(partial(_lengthen, name), with_kwargs=True))
                self._handles.append(rotary.register_forward_hook(_shorten))

    def undo(self) -> None:
        """Take away everything that ``install`` gave."""
        for handle in self._handles:
            handle.remove()
        for module, _ in self.layers:
            del module._longspan
        if self.loss_type is not None:
            del self.model._loss_function
        for module, config in self.configs:
            module.config = config

    def _rename(self) -> None:
        """Name our attention in copies of the configs, one for all modules that share one: other models share the originals."""
        copies: dict[int, Any] = {}
        for module, config in self.configs:
            module.config = deepcopy(config, copies)
        for module, _ in self.configs:
            module.config._attn_implementation = NAME
            if hasattr(module.config, "use_cache"):
                module.config.use_cache = False

    @contextmanager
    def _renamed(self) -> Any:
        self._rename()
        try:
            yield
        finally:
            for module, config in self.configs:
                module.config = config


def _refuse_by_config(model: Any) -> None:
    config = model.config.get_text_config()
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ModelError(f"{type(model).__name__} is on the meta device; give it weights before parallelize, which proves it")
    if getattr(config, "output_router_logits", False):
        raise ModelError(
            "config.output_router_logits is on, whose balance loss would be that of one rank's tokens; set it to False"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{type(model).__name__} is an encoder-decoder, not supported yet; use a decoder or an encoder")


@contextmanager
def _evaluating(model: nn.Module) -> Any:
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, was in training.items():
            module.training = was


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _ask(model: Any, tokens: slice = slice(0, TOKENS), probe: _Probe | None = None, **more: Any) -> dict[str, Tensor]:
    """What the model gives for some of the tokens of the proof, by name."""
    config = model.config.get_text_config()
    named = [getattr(config, f"{name}_token_id", None) for name in ("pad", "bos", "eos")]
    special = [token for tokens_of_kind in named for token in _as_list(tokens_of_kind)]
    ids = [i for i in range(config.vocab_size) if i not in special][3 : 3 + 3 * TOKENS : 3]
    batch = {
        "input_ids": torch.tensor([ids[tokens]], device=model.device),
        "position_ids": torch.arange(TOKENS, device=model.device)[None, tokens],
    } | more
    given = {name: value for name, value in batch.items() if value is not None}
    try:
        output = model(**given, longspan=probe or _Probe(), return_dict=True)
    except LongspanError:
        raise
    except Exception as error:
        if _Said.__name__ in str(error):
            raise ModelError(
                f"{type(model).__name__} works on its attention mask in its own code, not through Transformers' attention "
                f"registry: it would see this rank's tokens only; such a model is not supported"
            ) from error
        raise ModelError(
            f"{type(model).__name__} cannot be proven: a forward of {len(ids[tokens])} tokens with {', '.join(sorted(given))} "
            f"fails with {type(error).__name__}: {error}"
        ) from error
    return {name: value for name, value in output.items() if isinstance(value, Tensor) and value.is_floating_point()}


def _prove_attention(model: Any, mesh: ParallelMesh) -> list[tuple[Any, Layer]]:
    """Every attention layer reached our function once, with heads that fit the mesh and a mask that can be said in bands."""
    probe, anew = _Probe(), _Probe()
    _ask(model, probe=probe)
    _ask(model, probe=anew, position_ids=(torch.arange(TOKENS, device=model.device) % (TOKENS // 2)).unsqueeze(0))
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
        Heads(heads, kv_heads, mesh.place.ulysses)
        name = f"{type(module).__name__} '{names[module]}'"
        own = said.mask if isinstance(said, _Said) else None
        if own is None:
            raise ModelError(
                f"{name} was given a mask that is none of causal, full, sliding or chunked: what it lets tokens see cannot "
                f"be said in bands, and such a layer is not supported"
            )
        first = torch.tensor(TOKENS // 2)  # of the second document: does it see the last token of the first one?
        packs = not bool(said_anew.function(torch.tensor(0), torch.tensor(0), first, first - 1))
        if packs and "Chunked" in repr(own):
            raise ModelError(f"{name} counts its chunks anew in each packed document, which is not supported; pass one a row")
        layers.append((module, Layer(mesh, own, name, packs)))
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
            given = _ask(model, tokens)
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


def _all_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(_equal(a[name], b[name]) for name in a)


def _prove_positions(model: Any) -> bool:
    """Positions count from 0 where none are given; True where the model counts them from padding, if there is some."""
    given = _ask(model)
    if not _all_equal(given, _ask(model, position_ids=None)):
        raise ModelError(
            f"{type(model).__name__} does not count its positions 0, 1, 2, ..., which shard gives it; such a model is not "
            f"supported yet"
        )
    if "attention_mask" not in inspect.signature(model.forward).parameters:
        return False
    padded = torch.ones(1, TOKENS, dtype=torch.long, device=model.device)
    padded[:, :3] = 0
    counted = _ask(model, position_ids=None, attention_mask=padded)
    real = slice(3, None)
    return not _all_equal({name: x[:, real] for name, x in given.items()}, {name: x[:, real] for name, x in counted.items()})


def _prove_loss(model: Any) -> str | None:
    """The kind of the model's loss, where it computes one through its ``loss_function``; None where it does so by itself."""
    if "labels" not in inspect.signature(model.forward).parameters:
        return None
    calls = []

    def note(logits: Tensor, labels: Tensor, *args: Any, **keywords: Any) -> Tensor:
        calls.append(keywords.get("longspan"))
        return logits.sum() * 0

    labels = torch.zeros(1, TOKENS, dtype=torch.long, device=model.device)
    had = vars(model).get("_loss_function")
    model._loss_function = note
    try:
        _ask(model, labels=labels, shift_labels=labels)
    except ModelError:
        return None
    finally:
        if had is None:
            del model._loss_function
        else:
            model._loss_function = had
    kind: str | None = getattr(model, "loss_type", None)
    knows_the_step = len(calls) == 1 and isinstance(calls[0], _Probe)
    return kind if knows_the_step and had is None and kind in (*IN_PLACE, *SHIFTED) else None


def _loss(
    logits: Tensor, labels: Tensor, vocab_size: int | None = None, *, mesh: ParallelMesh, in_place: bool, longspan: Step,
    shift_labels: Tensor | None = None, **_: Any,
) -> Tensor:  # fmt: skip
    """``model.loss_function`` over the mesh: the mean over the labelled tokens of all ranks."""
    if in_place is (shift_labels is not None):
        asked = "shift=False" if in_place else "shift=True"
        raise ModelError(f"the labels were cut for another kind of model; use shard(batch, mesh, {asked})")
    targets = labels if shift_labels is None else shift_labels
    return cross_entropy(logits, targets, mesh=mesh, labelled=longspan.labelled)


def _check_call(proven: Pretrained, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Refuse what a forward on a part of the tokens cannot honour, and write the last position of all on the positions."""
    step = kwargs.get("longspan")
    if step is None:
        raise ModelError(
            "each sequence of this model lies on several ranks, but the batch was not cut; call "
            "model(**shard(batch, mesh)), and to generate, unparallelize(model) first"
        )
    for name in ("past_key_values", "output_attentions", "logits_to_keep", "use_cache", "attention_mask"):
        value = kwargs.get(name)
        if value is not None and value is not False and not (isinstance(value, int) and value == 0):
            raise ModelError(f"{name}= means the whole sequence, and a rank has a part of it; leave it out of model(...)")
    if kwargs.get("labels") is not None and proven.loss_type is None:
        raise ModelError(
            f"{type(model).__name__} computes its loss from labels by itself, over this rank's tokens; leave labels out of "
            f"the call, and use longspan.cross_entropy(outputs.logits, labels, mesh=mesh, labelled=part['longspan'].labelled)"
        )
    if proven.positions_from_padding and any(row.start for row in step.padding or ()):
        raise ModelError(
            f"{type(model).__name__} counts positions from the padding mask, which is not supported yet; pad on the right"
        )
    if isinstance(kwargs.get("position_ids"), Tensor):
        kwargs["position_ids"] = kwargs["position_ids"].view_as(kwargs["position_ids"])
        kwargs["position_ids"]._longspan_last = step.last_position
    return args, kwargs


def _chooses_by_length(module: nn.Module) -> bool:
    """Whether a rotary table depends on the longest position: dynamic and longrope do."""
    kinds = getattr(module, "rope_type", None)
    named = kinds.values() if isinstance(kinds, dict) else [kinds or ""]
    return any("dynamic" in kind or kind == "longrope" for kind in named)


def _lengthen(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Let a rotary module see the largest position of the whole batch behind this rank's."""
    bound = inspect.signature(module.forward).bind(*args, **kwargs).arguments
    positions = bound["position_ids"]
    last_position = getattr(positions, "_longspan_last", None)
    if last_position is None:
        raise ModelError(f"'{name}' chooses its table by the longest position, but was not given the step's position_ids")
    last = positions.new_full((*positions.shape[:-1], 1), last_position)
    return (), bound | {"position_ids": torch.cat([positions, last], -1)}


def _shorten(module: nn.Module, args: Any, output: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(table[..., :-1, :] for table in output)
