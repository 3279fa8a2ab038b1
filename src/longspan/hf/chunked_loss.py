"""The loss of a Hugging Face model without its logits: in blocks of a linear head, else by its own head, in tiles of tokens.

    base model(**part)   ->   hidden [rows, my tokens, M]                                                        once
    a linear head        ->   blocks of tokens and vocabulary entries          ->   log-sum-exp, the label's logit
    or model.forward     ->   base model: a stub that gives a tile of hidden   ->   head, ...   ->   its loss    for each tile
    model.forward        ->   base model: a stub that gives no token           ->   loss: the mean over all ranks, and whatever
                                                                                    else the model puts beside it

With tensor > 1 the hidden states of all tensor ranks are gathered, and each rank's head has its own rows of the vocabulary, for
the log-sum-exp and the label's logit, which the ranks that hold the tokens combine (distributed/vocab_parallel.py).
A model that does more behind its head than works on some of the logits gathers the head's rows instead.

B rows   S my tokens   N gathered tokens   R tokens   L of them labelled   M hidden   V vocabulary   K terms of a token's loss
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from longspan.batch.labels import IGNORE, labelled_rows
from longspan.distributed.fsdp import gathered
from longspan.distributed.mesh import ParallelMesh
from longspan.distributed.tensor_cuts import Cut, every_part, own_part
from longspan.distributed.vocab_parallel import VocabularyRegion, is_on_tensor_axis
from longspan.errors import ModelError
from longspan.hf import _compat
from longspan.hf.behind_base import Head, OwnForward, catching, forward_giving, logits_of, parameters_beside_base
from longspan.hf.candidate import Candidate, Undo
from longspan.hf.linear_head import LinearHead, linear_head_of
from longspan.hf.loss import OWN, Loss, as_asked, divisor, is_in_place
from longspan.hf.probe import equal, forward, proving
from longspan.hf.step_scope import own_forward, set_forward
from longspan.hf.tensor_weights import TensorWeights, cut_piece
from longspan.kernels.linear_loss import nan_where_unknown
from longspan.loss import mean_over_ranks
from longspan.memory.tiling import tile_by_tile
from longspan.tuning import HEAD_TILE_BYTES, HEAD_TILE_BYTES_ON_GPU

LABELS = ("labels", "shift_labels")


@dataclass(frozen=True)
class ChunkedLoss:
    """Makes a Transformers model compute its loss one tile of tokens at a time, so that the whole logits never exist.

    Attributes:
        in_place: True if the logits at position t predict ``labels[t]`` (masked LM, token classification); False if they
            predict the next token, so that ``shift_labels`` is read.
        cuts: parameters of the head that are cut by rows of the vocabulary over the tensor axis, by name.
        works_on_rows: whether the model's code behind its head can be given the logits of some rows of the vocabulary.
        head: the model's head if it is linear; None: only the model's own code forms its logits.
    """

    in_place: bool
    cuts: Mapping[str, Cut] = field(default_factory=dict)
    works_on_rows: bool = False
    head: LinearHead | None = None

    def install(self, model: Any, mesh: ParallelMesh) -> Undo:
        """Replace the model's forward by one that computes the loss over ``mesh`` without forming all logits.

        Returns:
            A function that undoes it.
        """
        set_forward(model, partial(forward_without_logits, model, mesh, self))
        return partial(_compat.remove_forward, model)


def probe(candidate: Candidate) -> ChunkedLoss | None:
    """A ChunkedLoss if the option ``chunked_loss`` is set, else None.

    Raises:
        ModelError: the model cannot compute its loss tile by tile.
    """
    if not candidate.memory.chunked_loss:
        return None
    loss = candidate.finding(Loss)
    kind = None if loss is None else loss.kind
    output = _prove(candidate.model, candidate.called, kind)
    weights, model = candidate.finding(TensorWeights), candidate.model
    with proving(candidate.called), gathered(candidate.called):
        head = linear_head_of(model, output.last_hidden_state, partial(logits_of, model, type(output)))
    if weights is None:
        return ChunkedLoss(is_in_place(kind), head=head)
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    of_heads = {name: cut for name, cut in weights.plan.cuts.items() if name in names and name.startswith(_prefixes(weights))}
    with proving(candidate.called):
        works = bool(of_heads) and _works_on_rows(model, of_heads, candidate.mesh.coordinate.tensor)
    return ChunkedLoss(is_in_place(kind), of_heads, works, head)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def forward_without_logits(model: Any, mesh: ParallelMesh, found: ChunkedLoss, *args: Any, **given: Any) -> Any:
    """The forward of a model with a chunked loss: a call with labels returns the loss over all ranks, and no logits.

    A call without labels, or with labels of the other kind, is passed to the model's own forward (which refuses the latter).

    Args:
        model: the Transformers model.
        mesh: the ranks.
        found: whether ``labels`` or ``shift_labels`` are read, and how the head is cut.
        args, given: the arguments of the call.
    """
    targets = given.get("labels" if found.in_place else "shift_labels")
    cut_for_another_kind = found.in_place is (given.get("shift_labels") is not None)
    if given.get("labels") is None or targets is None or cut_for_another_kind:
        return own_forward(model)(*args, **given)  # its loss refuses labels that were shifted for the other kind of model
    return_dict, step = given.get("return_dict"), given["longspan"]
    base, given = model.base_model, given | {"return_dict": True}
    output = base(*args, **{name: value for name, value in given.items() if name not in LABELS})
    held, wanted = _held(model, mesh, found), targets != IGNORE
    linear = found.head
    if linear is not None and not linear.is_as_proved(model, output.last_hidden_state):
        linear = None
    if found.works_on_rows:
        region = VocabularyRegion(mesh, mesh.coordinate.tensor_sizes(step.tokens))
        vocab = next(iter(found.cuts.values())).units
        total = _sum_over_vocabulary(model, region, output, targets, step, held, vocab, linear)
    else:
        total = _sum_of_losses(model, output, targets, step, held, linear)
    loss = mean_over_ranks(total, wanted, mesh, divisor(step, given.get("num_items_in_batch")))
    output.last_hidden_state = output.last_hidden_state[:, :0]
    with forward_giving(base, output), _compat.loss_function_set_to(model, lambda *_, **__: loss):
        whole = functional_call(OwnForward(model), held, args, given)
    output = type(whole)(**{name: value for name, value in whole.items() if name != "logits"})
    return as_asked(model, output, return_dict)


def _prove(model: Any, called: nn.Module, loss_kind: str | None) -> Any:
    """Raise ModelError for a model whose loss cannot be computed tile by tile.

    That is one for which, on a small input, the sum over tiles of tokens differs from the cross-entropy of all its logits; one
    that computes its loss by itself, has no separate base model, or has a replaced forward.

    Args:
        model: the Transformers model.
        called: what the user calls: the model, or peft's wrapper of it.
        loss_kind: the name of its loss in Transformers' table; None if it computes it by itself.

    Returns:
        What the base model returned for the small input.
    """
    reason, caught = None, []
    if loss_kind in (None, OWN):
        reason = "computes its loss by itself"
    elif "forward" in vars(model):
        reason = "has a forward of its own hung on it by another library"
    elif model.base_model is model:
        reason = "has no base model apart from its head"
    else:
        with proving(called):
            with catching(model.base_model) as caught:
                logits = forward(called)["logits"]
            with gathered(called):
                reason = _why_not_in_tiles(model, caught[0], logits) if caught else "does not call its base model as a whole"
    if reason is not None:
        raise ModelError(f"{type(model).__name__} {reason}, so its logits must be there; leave out chunked_loss=True")
    return caught[0]


def _why_not_in_tiles(model: Any, output: Any, logits: Tensor) -> str | None:
    """What makes the head of ``model`` give another loss or other gradients a tile at a time; None if nothing does.

    Args:
        model: the Transformers model.
        output: what its base model returned for a small input.
        logits: of that input, all at once.
    """
    held = {id(parameter) for parameter in parameters_beside_base(model).values()}
    of_base = [
        (name, each) for name, each in model.base_model.named_parameters() if each.requires_grad and id(each) not in held
    ]
    with torch.enable_grad():
        whole = logits_of(model, type(output), output.last_hidden_state.detach()).sum()
    if whole.requires_grad and of_base:
        grads = torch.autograd.grad(whole, [each for _, each in of_base], allow_unused=True)
        for (name, _), grad in zip(of_base, grads):
            if grad is not None:
                return f"multiplies by {name!r} of its base model in its head"
    targets = torch.full(logits.shape[:2], min(5, logits.shape[-1] - 1), device=model.device)
    total = _sum_of_losses(model, output, targets, None, parameters_beside_base(model))
    expected = F.cross_entropy(logits[0].double(), targets[0], reduction="sum")
    is_equal = torch.allclose(total.double(), expected, rtol=5e-2 if logits.dtype.itemsize == 2 else 1e-4)
    return None if is_equal else "gives other logits for some tokens than for all"


def _prefixes(weights: TensorWeights) -> tuple[str, ...]:
    """The prefixes of the names of the parameters of all heads."""
    return tuple(f"{name}." for name in weights.plan.heads)


def _works_on_rows(model: Any, cuts: Mapping[str, Cut], ranks: int) -> bool:
    """Whether the logits that ``model`` forms with each rank's rows of its head are, side by side, those of the whole head.

    Tested on one rank, for ``ranks`` tensor ranks; a softcap works on each logit, but a softmax needs all.
    """
    with catching(model.base_model) as caught:
        wanted = forward(model)["logits"]
    named = dict(model.named_parameters(remove_duplicate=False))
    found = []
    try:
        for rank in range(ranks):
            pieces = {f"model.{name}": cut_piece(named[name], cut, ranks, rank) for name, cut in cuts.items()}
            with forward_giving(model.base_model, caught[0]):
                found.append(functional_call(Head(model), pieces, (None,)))
        whole = torch.cat(found, -1)
    except Exception:  # whatever the model's code makes of fewer logits
        return False
    return equal(whole, wanted)


def _held(model: Any, mesh: ParallelMesh, found: ChunkedLoss) -> dict[str, Tensor]:
    """The parameters beside the base model with which this rank computes, by name; on the tensor axis plain tensors.

    Of a head that is cut by rows they are this rank's rows, or all of them where the model's code needs them.
    """
    held = parameters_beside_base(model)
    for name, parameter in held.items():
        cut = found.cuts.get(name.removeprefix("model."))
        if is_on_tensor_axis(parameter, mesh):
            held[name] = (
                own_part(parameter, cut, mesh) if cut is None or found.works_on_rows else every_part(parameter, cut, mesh)
            )
    return held


def _sum_of_losses(
    model: Any, output: Any, targets: Tensor, step: Any, held: Mapping[str, Tensor], linear: LinearHead | None = None
) -> Tensor:
    """The sum of the losses of this rank's labelled tokens, a scalar in at least fp32.

    Args:
        model: the model.
        output: what its base model returned.
        targets: [rows, tokens], -100 for no label.
        step: the BatchInfo, or None.
        held: the head's parameters.
        linear: how the logits are formed in blocks; None: the model's head is applied to a tile of labelled tokens at a time.
    """
    hidden_BSM, wanted = output.last_hidden_state, targets != IGNORE
    rows = labelled_rows(wanted.flatten(), None if step is None else step.num_local_labels)
    hidden_RM, targets = hidden_BSM.flatten(0, 1), targets.flatten()[rows]
    if not len(targets):
        return _nothing(hidden_BSM, held.values())
    if linear is not None:
        lse, hit = linear.terms(hidden_RM, rows, targets, held)
        vocab = model.get_submodule(linear.name).out_features
        total: Tensor = (lse - nan_where_unknown(hit, targets, vocab)).sum()
        return total

    def losses(logits_RV: Tensor, rows: slice) -> Tensor:
        return F.cross_entropy(logits_RV, targets[rows], reduction="sum").unsqueeze(0)

    return _by_tiles(model, output, hidden_RM[rows], step, held, losses).sum()


def _sum_over_vocabulary(
    model: Any,
    region: VocabularyRegion,
    output: Any,
    targets: Tensor,
    step: Any,
    held: Mapping[str, Tensor],
    vocab: int,
    linear: LinearHead | None,
) -> Tensor:
    """The sum of the losses of this rank's labelled tokens, where each tensor rank computes with its own rows of the head.

    Args:
        model, output, targets, step, linear: as in ``_sum_of_losses``.
        region: the tensor ranks and their tokens.
        held: the head's parameters, of which this rank has its rows.
        vocab: the rows of all tensor ranks.
    """
    first = region.first_row(vocab)
    hidden_BNM, wanted_BN = region.gathered(output.last_hidden_state), region.gathered(targets)
    rows, hidden_RM = labelled_rows((wanted_BN != IGNORE).flatten(), None), hidden_BNM.flatten(0, 1)
    labels = wanted_BN.flatten()[rows]
    columns = labels - first

    def terms(logits_RV: Tensor, rows: slice) -> Tensor:
        here = (columns[rows] >= 0) & (columns[rows] < logits_RV.shape[1])
        hit = logits_RV.gather(1, columns[rows].where(here, 0).unsqueeze(1)).squeeze(1).where(here, 0)
        return torch.stack([logits_RV.logsumexp(1), hit], 1)

    if len(rows):
        if linear is not None:
            terms_KL = torch.stack(linear.terms(hidden_RM, rows, labels, held, first))
        else:
            terms_KL = _by_tiles(model, output, hidden_RM[rows], step, held, terms).T
        terms_KR = terms_KL.new_zeros(2, wanted_BN.numel()).index_copy(1, rows, terms_KL)
    else:
        terms_KR = _nothing(hidden_BNM, held.values()).expand(2, wanted_BN.numel())
    terms_KS = region.of_my_tokens(terms_KR.unflatten(1, wanted_BN.shape)).flatten(1)
    mine = labelled_rows((targets != IGNORE).flatten(), step.num_local_labels)
    lse, hit = terms_KS[:, mine]
    total: Tensor = (lse - nan_where_unknown(hit, targets.flatten()[mine], vocab)).sum()
    return total


def _nothing(hidden_BSM: Tensor, parts: Iterable[Tensor]) -> Tensor:
    """A zero in at least fp32 whose graph has the hidden states and ``parts``, for which other ranks wait in a backward.

    Where all layers below the head are frozen, the parts alone need a gradient.
    """
    exact = torch.float64 if hidden_BSM.dtype == torch.float64 else torch.float32
    return torch.stack([part.flatten()[:0].sum().to(exact) for part in (hidden_BSM, *parts)]).sum()


def _by_tiles(
    model: Any,
    output: Any,
    hidden_RM: Tensor,
    step: Any,
    held: Mapping[str, Tensor],
    of_logits: Callable[[Tensor, slice], Tensor],
) -> Tensor:
    """What ``of_logits`` returns for the logits of each tile of tokens, concatenated.

    Args:
        model: the model, whose head is applied to one tile at a time.
        output: what its base model returned.
        hidden_RM: the tokens.
        step: the BatchInfo, or None.
        held: the head's parameters.
        of_logits: called with the logits of a tile, in at least fp32, and its tokens.
    """
    base, head = model.base_model, Head(model)

    def run(tile_RM: Tensor, rows: slice, parameters: Sequence[Tensor]) -> Tensor:
        with forward_giving(base, type(output)(last_hidden_state=tile_RM.unsqueeze(0))):
            logits = functional_call(head, dict(zip(held, parameters)), (step,)).squeeze(0)
        return of_logits(logits if logits.dtype == torch.float64 else logits.float(), rows)

    bytes_of_tile = HEAD_TILE_BYTES if hidden_RM.device.type == "cpu" else HEAD_TILE_BYTES_ON_GPU
    size = max(1, bytes_of_tile // (4 * model.config.get_text_config().vocab_size))
    return tile_by_tile(run, hidden_RM, size, list(held.values()))
