"""Prove, on one rank and before anything is changed, that a Hugging Face model can hold its sequence on several.

    whole       t0 t1 t2 t3 t4 t5 t6  --model, no token sees another-->  y0 y1 y2 y3 y4 y5 y6
    in halves   t0 t1 t2 | t3 t4 ...  --the same-------------------->    y0 y1 y2 | y3 y4 ...          must be equal

For the time of the proof attention gives each token its own values. What is left must not let tokens meet: whatever mixes them
outside attention (a convolution, a state space, a pooling head), or counts positions its own way, gives something else in
halves, in any architecture, and is refused by the name of the first module that differs. The same forwards show whether every
attention layer goes through Transformers' registry, and what each says about who may look at whom.

B batch   S my tokens   H heads   K key/value heads   D head dim
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from longspan.attention.api import attend
from longspan.batch.context import TARGET as PREFIX
from longspan.batch.context import BatchInfo
from longspan.distributed.layout import Heads
from longspan.distributed.mesh import ParallelMesh
from longspan.errors import LongspanError, ModelError
from longspan.hf.mask_functions import Said, is_pair
from longspan.hf.position_ids import hand_over
from longspan.hf.t5_bias import hand_distances, prove_distances
from longspan.masks.constructors import Full, Mask

TOKENS, TARGETS = 14, 10
"""Of the proof, and of its decoder where the model has both: few, even, unequal, as their halves are, and no usual width."""
SELECTING = ("index_topk", "index_block", "index_n_heads", "compress_rate")
"""How fields are named that select keys by content. On rows as short as those of the proof such layers see every key."""
SOURCE, TARGET, ACROSS = "source", "target", "across"
"""Which tokens a layer attends over: the batch's, its decoder's in an encoder-decoder, or from the latter to the former."""
OUTPUT = "output "
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Of the proof, relative to the largest value; other dtypes get ``COARSE``."""
COARSE = 5e-2


class Layer(NamedTuple):
    """What hangs on an attention module: who may look at whom, what users call it, how it attends.

    ``packs``: positions that begin anew mean another document to it, as they do to most decoders. ``over`` which tokens.
    """

    own: Mask
    name: str
    packs: bool
    attend: Callable[..., Tensor]
    over: str

    def row(self, step: BatchInfo) -> BatchInfo:
        """The tokens that attend."""
        return step if self.over == SOURCE or step.target is None else step.target


class Call(NamedTuple):
    """What came to an attention layer."""

    module: nn.Module
    tokens: tuple[int, int]  # of q, of k
    heads: tuple[int, int]
    said: Any


@dataclass
class Probe:
    """The attention of a proof: no token sees another, and what comes to it is written down."""

    calls: list[Call] = field(default_factory=list)
    read: dict[str, Tensor] = field(default_factory=dict)

    def note(self, module: nn.Module, q_BSHD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor, said: Any) -> Tensor:
        """Each token's own values, and a trace of its query, which has been turned by the token's position.

        Keys of other tokens than the queries' have no values for these; they are remembered, to be compared by themselves.
        """
        tokens, heads = ((q_BSHD.shape[dim], k_BSKD.shape[dim]) for dim in (1, 2))
        self.calls.append(Call(module, tokens, heads, said))
        trace = q_BSHD.mean(-1, keepdim=True)
        if tokens[0] == tokens[1]:
            return v_BSKD.repeat_interleave(heads[0] // heads[1], 2) + trace
        self.read |= {f"keys of layer {len(self.calls)}": k_BSKD, f"values of layer {len(self.calls)}": v_BSKD}
        return trace.expand(*q_BSHD.shape[:3], v_BSKD.shape[3])


def prove(model: Any, base: Any, mesh: ParallelMesh, head_chunks: int = 1) -> tuple[tuple[Any, Layer], ...]:
    """The attention modules of a model whose configs name our attention, and what each is; ``base`` is the one inside an
    adapter's wrapper, or the same.

    Raises ModelError by name for what cannot be parallel, and LayoutError for heads that do not fit the mesh. Changes nothing.
    """
    prove_distances(base)
    with proving(model):
        layers = _prove_attention(model, mesh, head_chunks)
        _prove_tokens(model)
    return tuple(layers)


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
    dropped = sorted(name for name, value in vars(config).items() if "layerdrop" in name and value)
    if dropped:
        raise ModelError(f"config.{dropped[0]} drops layers at random, other ones on every rank; set it to 0")


@contextmanager
def _handing(model: Any) -> Iterator[None]:
    """With the positions and biases that a parallel model's layers are handed."""
    handles = [*hand_over(model), *hand_distances(model)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def proving(model: nn.Module) -> Iterator[None]:
    """In evaluation, without gradients, with no parameter that hides what it multiplies, handed what a parallel model is."""
    with _evaluating(model), _awake(model), _handing(model), torch.no_grad():
        yield


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


def rows(model: Any) -> dict[str, int]:
    """How many tokens the proof has, by how the names of their tensors begin: two rows for an encoder-decoder."""
    return {"": TOKENS} | ({PREFIX: TARGETS} if is_pair(model) else {})


def special(model: Any, *kinds: str) -> set[int]:
    """The ids that the model's configs name for ``kinds`` ("pad", "bos", ...)."""
    configs = [module.config for module in model.modules() if hasattr(module, "config")]
    named = [getattr(config, f"{kind}_token_id", None) for config in configs for kind in kinds]
    return {token for tokens in named for token in _as_list(tokens) if token is not None}


def ids_of(model: Any, count: int = TOKENS) -> Tensor:
    """Tokens of the proof [count], none of them special to the model."""
    named = special(model, "pad", "bos", "eos", "decoder_start")
    ids = [i for i in range(model.config.get_text_config().vocab_size) if i not in named][3 : 3 + 3 * TOKENS : 3]
    return torch.tensor(ids[-count:], device=model.device)


def whole(model: Any) -> dict[str, Tensor]:
    """The batch of the proof: tokens and their positions [1, count]."""
    given = {f"{name}input_ids": ids_of(model, count) for name, count in rows(model).items()}
    given |= {f"{name}position_ids": torch.arange(count, device=model.device) for name, count in rows(model).items()}
    return {name: value.unsqueeze(0) for name, value in given.items()}


def ask(model: Any, half: int | None = None, probe: Probe | None = None, **more: Any) -> dict[str, Tensor]:
    """What the model gives for the tokens of the proof, or the first or second half of them (0, 1), by name."""
    probe = probe or Probe()
    halves = {name: value if half is None else value.chunk(2, 1)[half] for name, value in whole(model).items()}
    given = {name: value for name, value in (halves | more).items() if value is not None}
    try:
        output = model(**given, longspan=probe, return_dict=True)
    except LongspanError:
        raise
    except Exception as error:
        if Said.__name__ in str(error):
            raise ModelError(
                f"{type(model).__name__} works on its attention mask in its own code, not through Transformers' attention "
                f"registry: it would see this rank's tokens only; such a model is not supported"
            ) from error
        raise ModelError(
            f"{type(model).__name__} cannot be proven: a forward of {' and '.join(map(str, rows(model).values()))} tokens with "
            f"{', '.join(sorted(given))} fails with {type(error).__name__}: {error}"
        ) from error
    found = {name: value for name, value in output.items() if isinstance(value, Tensor) and value.is_floating_point()}
    return found | probe.read


def _prove_attention(model: Any, mesh: ParallelMesh, head_chunks: int) -> list[tuple[Any, Layer]]:
    """Every attention layer reached our function once, with heads that fit the mesh and a mask that can be said in bands."""
    probe, anew = Probe(), Probe()
    ask(model, probe=probe)
    positions = {name: x for name, x in whole(model).items() if name.endswith("position_ids")}
    restarting: dict[str, Any] = {name: x % (x.shape[1] // 2) for name, x in positions.items()}
    ask(model, probe=anew, **restarting)
    names = {module: name for name, module in model.named_modules()}
    reached = [call.module for call in probe.calls]
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
    return [(call.module, _layer(call, again, names, mesh, head_chunks)) for call, again in zip(probe.calls, anew.calls)]


def _layer(call: Call, anew: Call, names: dict[nn.Module, str], mesh: ParallelMesh, head_chunks: int) -> Layer:
    """What a layer said; ``anew`` is the same call where positions begin anew in the middle."""
    Heads(*call.heads, mesh.coordinate.ulysses, head_chunks)
    name = f"{type(call.module).__name__} '{names[call.module]}'"
    own = call.said.mask if isinstance(call.said, Said) else None
    known = {(TOKENS, TOKENS): SOURCE, (TARGETS, TARGETS): TARGET, (TARGETS, TOKENS): ACROSS}
    over = known.get(call.tokens)
    if own is None or (over == ACROSS and own != Full()):
        raise ModelError(
            f"{name} was given a mask that is none of causal, full, sliding or chunked: what it lets tokens see cannot "
            f"be said in bands, and such a layer is not supported"
        )
    if over is None:
        raise ModelError(
            f"{name} lets {call.tokens[0]} queries look at {call.tokens[1]} keys, which are neither all tokens nor all of an "
            f"encoder; such a layer is not supported"
        )
    middle = call.tokens[0] // 2
    packs = not anew.said.sees(middle, middle - 1)  # the first token of a document, the last of the one before
    if packs and "Chunked" in repr(own):
        raise ModelError(f"{name} counts its chunks anew in each packed document, which is not supported; pass one a row")
    return Layer(own, name, packs, attend, over)


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
        for half in (None, 0, 1):
            outputs.append({})
            given = ask(model, half)
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
    cuts = [(count, count // 2, count // 2) for count in (TOKENS, TARGETS)]
    dims = [dim for dim, found in enumerate(sizes) if found in cuts]
    return _equal(whole[name], torch.cat([left[name], right[name]], dims[0])) if dims else None


def _equal(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or not a.is_floating_point():
        return a.shape == b.shape and bool((a == b).all())
    scale = max(float(a.abs().max()), 1e-30)
    return float((a.double() - b.double()).abs().max()) <= TOLERANCE.get(a.dtype, COARSE) * scale


def all_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(_equal(a[name], b[name]) for name in a)
