"""A single-rank proof, before anything is changed, that a Hugging Face model can run on a part of its tokens.

    whole       t0 t1 t2 t3 t4 t5 t6  --model, no token sees another-->  y0 y1 y2 y3 y4 y5 y6
    in halves   t0 t1 t2 | t3 t4 ...  --the same-------------------->    y0 y1 y2 | y3 y4 ...          must be equal

During the proof attention gives each token its own values. What is left must not mix tokens: whatever mixes them outside
attention (a convolution, a state space, a pooling head), or counts positions in a way of its own, gives another result in
halves, in any architecture, and is refused by the name of the first module that differs. The same forwards record every call
of attention (attention_layers.py).

"Proof", "prove" and "proven" mean this test on one rank with small random inputs, here and in the other files of the folder.

B batch   S my tokens   H heads   K key/value heads   D head dim
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from longspan.batch.context import TARGET
from longspan.errors import LongspanError, ModelError
from longspan.hf.names import is_attention, is_encoder_decoder
from longspan.hf.own_recipe import Recipe, read_recipe, shape_like
from longspan.hf.own_scores import Attention, Recorded
from longspan.hf.peft import base_of
from longspan.hf.position_ids import pass_positions_to_tables
from longspan.hf.step_scope import ScopedModel, scope_of, strip_additions
from longspan.hf.t5_bias import compute_biases_by_distance

TOKENS, TARGETS = 14, 10
"""Tokens of the proof and of its decoder: few, even, unequal, as their halves are, and no usual width."""
OUTPUT = "output "
NOT_TENSORS = ("MaskFunction", "DenseMask", "AllOf", "Scores", "Probabilities")
"""What a proof hands to models in place of masks, scores and probabilities."""
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
"""The tolerance of the proof by dtype, relative to the largest value; other dtypes get ``COARSE``."""
COARSE = 5e-2
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class Call(NamedTuple):
    """One recorded call of attention in a test forward.

    Attributes:
        module: the attention module.
        tokens, heads: the numbers of tokens, and of heads, of q and of k.
        mask: its mask, a MaskFunction or what else the model passed.
        recipe: how the module attends in its own code; None if it calls Transformers' registry.
        handed: whether the registered function was given the keyword ``longspan``.
    """

    module: nn.Module
    tokens: tuple[int, int]
    heads: tuple[int, int]
    mask: Any
    recipe: Recipe | None
    handed: bool


@dataclass
class Probe:
    """Replaces attention in test forwards: every call is recorded, and no token sees another.

    It is passed as the keyword ``longspan`` of the model's call. A token's output is its own value, repeated for the query
    heads, plus the mean of its query. In cross-attention (more or fewer keys than queries) it is the mean of the query alone.

    Attributes:
        calls: the recorded calls, in order.
        keys: of cross-attention, "keys of layer N" and "values of layer N", with N the number of the call, from 1.
    """

    calls: list[Call] = field(default_factory=list)
    keys: dict[str, Tensor] = field(default_factory=dict)

    def attend(
        self, module: nn.Module, q_BSHD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor, mask: Any,
        *, recipe: Recipe | None = None, handed: bool = False,
    ) -> Tensor:  # fmt: skip
        """Record a call of attention and return, for each token, its own value plus the mean of its query.

        The query has been rotated by the token's position, so the outputs show which position it had. In cross-attention the
        queries' tokens have no values; there, keys and values are recorded to be compared.

        Args:
            module: the attention module.
            q_BSHD, k_BSKD, v_BSKD: its queries, keys and values.
            mask: the mask that the model passed.
            recipe: how the module attends in its own code; None if it calls Transformers' registry.
            handed: whether the registered function was given the keyword ``longspan``.

        Returns:
            [batch, tokens, heads, dim of v].
        """
        tokens, heads = ((q_BSHD.shape[dim], k_BSKD.shape[dim]) for dim in (1, 2))
        self.calls.append(Call(module, tokens, heads, mask, recipe, handed))
        trace = q_BSHD.mean(-1, keepdim=True)
        if tokens[0] == tokens[1]:
            return v_BSKD.repeat_interleave(heads[0] // heads[1], 2) + trace
        self.keys |= {f"keys of layer {len(self.calls)}": k_BSKD, f"values of layer {len(self.calls)}": v_BSKD}
        return trace.expand(*q_BSHD.shape[:3], v_BSKD.shape[3])


@contextmanager
def proving(model: nn.Module) -> Iterator[None]:
    """Context manager for the test forwards before ``parallelize`` changes the model.

    Evaluation mode, no gradients, every trainable parameter that is all zeros replaced by small random values (a zero LoRA
    matrix would hide what it multiplies), and position tables and T5 biases computed as in a parallel model. Restores
    everything on exit.
    """
    with _evaluating(model), _without_zero_parameters(model), _positions_and_biases(model), torch.no_grad():
        yield


@contextmanager
def _positions_and_biases(model: Any) -> Iterator[None]:
    """Context manager: position tables, T5 biases and attention in a model's own code work as in a parallel model."""
    handles = [*pass_positions_to_tables(model), *compute_biases_by_distance(model)]
    base = base_of(model) or model
    attentions = [Recorded(module, attend_in_proof) for module in base.modules() if is_attention(module)]
    handles += [ScopedModel(base), strip_additions(base), *attentions]
    try:
        yield
    finally:
        for handle in reversed(handles):  # a forward that was replaced twice gets the first one back
            handle.remove()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Context manager: every module of ``model`` is in evaluation mode; on exit each is in the mode that it had."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, was in training.items():
            module.training = was


@contextmanager
def _without_zero_parameters(model: nn.Module) -> Iterator[None]:
    """Context manager: trainable parameters that are all zeros hold small random values; restored on exit."""
    zeroed = [(p, p.data) for p in model.parameters() if p.requires_grad and not p.any()]
    own = torch.Generator().manual_seed(0)
    try:
        for parameter, zeros in zeroed:
            parameter.data = (torch.randn(zeros.shape, generator=own) * 0.1).to(zeros)
        yield
    finally:
        for parameter, zeros in zeroed:
            parameter.data = zeros


def attend_in_proof(module: nn.Module, attention: Attention) -> Tensor:
    """The output of attention in a test forward, for a module that computes attention in its own code.

    The call is recorded by the ``Probe`` of the forward, and each token gets its own value and the mean of its query.

    Args:
        module: the attention module.
        attention: its q, k and v, and the recorded operations on its scores.

    Returns:
        The output, in the shape that the module's code expects.
    """
    scope = scope_of(module)
    recipe, mask = read_recipe(module, attention, scope.configs)
    out = scope.call.step.attend(module, *recipe.operands(attention), mask, recipe=recipe)
    return shape_like(out, attention)


def row_lengths(model: Any) -> dict[str, int]:
    """The number of tokens in each row of a test batch: {"": tokens} and, for an encoder-decoder, also {"decoder_": tokens}.

    A key is the prefix of the names of the row's tensors.
    """
    return {"": TOKENS} | ({TARGET: TARGETS} if is_encoder_decoder(model) else {})


def special_ids(model: Any, *kinds: str) -> set[int]:
    """The token ids that the model's configs have for ``kinds``, such as "pad" for ``pad_token_id``."""
    configs = [module.config for module in model.modules() if hasattr(module, "config")]
    named = [getattr(config, f"{kind}_token_id", None) for config in configs for kind in kinds]
    return {token for tokens in named for token in _as_list(tokens) if token is not None}


def _as_list(value: Any) -> list[Any]:
    """``value`` as a list: itself, [] for None, and any other value as one element."""
    return list(value) if isinstance(value, list | tuple) else [value]


def ids_of(model: Any, count: int = TOKENS) -> Tensor:
    """``count`` different token ids for a test row, [1, count].

    None is a special token of the model, and none is one more than the id before it, because position_probe.py would take such
    ids for positions.

    Raises:
        ModelError: the vocabulary has too few others; equal tokens would hide that a module mixes them.
    """
    named, vocab = special_ids(model, "pad", "bos", "eos", "decoder_start"), model.config.get_text_config().vocab_size
    usable = list(islice((i for i in range(vocab) if i not in named), 3 + 3 * TOKENS))
    if len(usable) < TOKENS:
        raise ModelError(
            f"{type(model).__name__} has a vocabulary of {vocab}, of which {len(usable)} are no special tokens; its proof "
            f"needs {TOKENS} different ones, so use a larger vocab_size"
        )
    spread = usable[3::3]
    return torch.tensor((spread if len(spread) == TOKENS else usable[::-1])[-count:], device=model.device)


def batch_of(model: Any) -> dict[str, Tensor]:
    """The batch of the test forwards: input_ids and position_ids [1, tokens], and for an encoder-decoder the decoder's."""
    given = {f"{name}input_ids": ids_of(model, count) for name, count in row_lengths(model).items()}
    given |= {f"{name}position_ids": torch.arange(count, device=model.device) for name, count in row_lengths(model).items()}
    return {name: value.unsqueeze(0) for name, value in given.items()}


def forward(model: Any, half: int | None = None, probe: Probe | None = None, **more: Any) -> dict[str, Tensor]:
    """The outputs of a test forward of ``model``: {name: tensor}.

    Args:
        model: the model, its configs naming longspan's attention.
        half: 0 or 1 for the first or second half of the test row; None for all of it.
        probe: what records the calls of attention; None: one whose record is not kept.
        more: further keywords of the call, which replace those of the test batch; one that is None is left out.

    Raises:
        ModelError: the forward fails.
    """
    probe = probe or Probe()
    halves = {name: value if half is None else value.chunk(2, 1)[half] for name, value in batch_of(model).items()}
    given = {name: value for name, value in (halves | more).items() if value is not None}
    try:
        output = model(**given, longspan=probe, return_dict=True)
    except LongspanError:
        raise
    except Exception as error:
        if any(
            name in str(error) for name in NOT_TENSORS
        ):  # PyTorch's and Python's own errors name the type that they cannot use
            raise ModelError(
                f"{type(model).__name__} works on its attention mask in its own code, not through Transformers' attention "
                f"registry: it would see this rank's tokens only; such a model is not supported"
            ) from error
        counts = " and ".join(map(str, row_lengths(model).values()))
        raise ModelError(
            f"{type(model).__name__} cannot be proven: a forward of {counts} tokens with "
            f"{', '.join(sorted(given))} fails with {type(error).__name__}: {error}"
        ) from error
    found = {name: value for name, value in output.items() if isinstance(value, Tensor) and value.is_floating_point()}
    return found | probe.keys


def prove_token_wise(model: nn.Module) -> None:
    """Raise ModelError, naming the module, if a module outside attention mixes tokens; otherwise return None.

    Two forwards of half a row are compared with one of the whole row, with attention in which no token sees another. They are
    in evaluation mode, in which a batch norm is token-wise: it is refused by its type.
    """
    for name, module in model.named_modules():
        if isinstance(module, BATCH_NORMS):
            raise ModelError(
                f"{type(module).__name__} '{name}' normalises over the tokens of a batch while it trains, and each rank has "
                f"some of them; such layers are not supported, a layer norm or RMS norm is"
            )
    outputs: list[dict[str, Tensor]] = []

    def remember(name: str, module: nn.Module, _: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) and output else output
        if isinstance(first, Tensor):
            outputs[-1][name] = first

    handles = [module.register_forward_hook(partial(remember, name)) for name, module in model.named_modules()]
    try:
        for half in (None, 0, 1):
            outputs.append({})
            given = forward(model, half)
            outputs[-1] |= {f"{OUTPUT}{name}": value for name, value in given.items()}
    finally:
        for handle in handles:
            handle.remove()
    wrong = [name for name in outputs[0] if name.startswith(OUTPUT) and not _is_token_wise(name, *outputs)]
    if not wrong:
        return
    # Modules are recorded in the order in which they finish: the first that differs is the cause.
    name = next((name for name in outputs[0] if _is_token_wise(name, *outputs) is False), wrong[0])
    module = dict(model.named_modules()).get(name, model)
    raise ModelError(
        f"{type(module).__name__} '{name}' mixes tokens outside attention, or counts positions in its own way: over a part of "
        f"the tokens it gives something else than over all of them; such layers (convolutions, state spaces, pooling) are "
        f"not supported"
    )


def _is_token_wise(name: str, whole: dict[str, Tensor], left: dict[str, Tensor], right: dict[str, Tensor]) -> bool | None:
    """Whether the outputs of a module for the two halves of a row, put together, equal its output for the whole row.

    Args:
        name: the module's name in the model.
        whole, left, right: {name: output} of the forwards of the row and of its halves.

    Returns:
        None if its output has no dim of tokens, as inside experts, which sort their tokens.
    """
    if name not in left or name not in right:
        return None
    sizes = zip(whole[name].shape, left[name].shape, right[name].shape)
    cuts = [(count, count // 2, count // 2) for count in (TOKENS, TARGETS)]
    dims = [dim for dim, found in enumerate(sizes) if found in cuts]
    return equal(whole[name], torch.cat([left[name], right[name]], dims[0])) if dims else None


def equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have equal shapes, and values that are equal up to the tolerance of their dtype."""
    if a.shape != b.shape or not a.is_floating_point():
        return a.shape == b.shape and bool((a == b).all())
    scale = max(float(a.abs().max()), 1e-30)
    return float((a.double() - b.double()).abs().max()) <= TOLERANCE.get(a.dtype, COARSE) * scale


def all_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two results of ``forward`` have the same names, and tensors that are equal up to a small tolerance."""
    return a.keys() == b.keys() and all(equal(a[name], b[name]) for name in a)
