"""The loss of a Hugging Face model without its logits: by its own head, scale and softcap, a tile of labelled tokens at a time.

    base model(**part)   ->   hidden [rows, my tokens, M]                                                        once
    model.forward        ->   base model: a stub that gives a tile of hidden   ->   head, ...   ->   its loss    for each tile
    model.forward        ->   base model: a stub that gives no token           ->   loss: the mean over all ranks, and whatever
                                                                                    else the model puts beside it
B rows   S my tokens   M hidden
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from longspan.batch.labels import IGNORE, labelled_rows
from longspan.distributed.mesh import ParallelMesh
from longspan.errors import ModelError
from longspan.hf import _compat
from longspan.hf.candidate import Candidate, Undo
from longspan.hf.loss import OWN, Loss, as_asked, divisor, is_in_place
from longspan.hf.probe import forward, proving, row_lengths
from longspan.hf.step_scope import own_forward, set_forward
from longspan.loss import mean_over_ranks
from longspan.memory.tiling import tile_by_tile
from longspan.tuning import HEAD_TILE_BYTES

LABELS = ("labels", "shift_labels")


@dataclass(frozen=True)
class ChunkedLoss:
    """Makes a Transformers model compute its loss one tile of tokens at a time, so that the whole logits never exist.

    Attributes:
        in_place: True if the logits at position t predict ``labels[t]`` (masked LM, token classification); False if they
            predict the next token, so that ``shift_labels`` is read.
    """

    in_place: bool

    def install(self, model: Any, mesh: ParallelMesh) -> Undo:
        """Replace the model's forward by one that computes the loss over ``mesh`` without forming all logits.

        Returns:
            A function that undoes it.
        """
        set_forward(model, partial(forward_without_logits, model, mesh, self.in_place))
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
    _refuse(candidate.model, candidate.called, kind)
    return ChunkedLoss(is_in_place(kind))


@torch.compiler.disable  # type: ignore[untyped-decorator]
def forward_without_logits(model: Any, mesh: ParallelMesh, in_place: bool, *args: Any, **given: Any) -> Any:
    """The forward of a model with a chunked loss: a call with labels returns the loss over all ranks, and no logits.

    A call without labels, or with labels of the other kind, is passed to the model's own forward (which refuses the latter).

    Args:
        model: the Transformers model.
        mesh: the ranks.
        in_place: whether the logits at position t predict ``labels[t]``; else ``shift_labels`` is read.
        args, given: the arguments of the call.
    """
    targets = given.get("labels" if in_place else "shift_labels")
    cut_for_another_kind = in_place is (given.get("shift_labels") is not None)
    if given.get("labels") is None or targets is None or cut_for_another_kind:
        return own_forward(model)(*args, **given)  # its loss refuses labels that were shifted for the other kind of model
    return_dict = given.get("return_dict")
    base, given = model.base_model, given | {"return_dict": True}
    output = base(*args, **{name: value for name, value in given.items() if name not in LABELS})
    total, wanted = _sum_of_tiles(model, output, targets, given["longspan"])
    loss = mean_over_ranks(total, wanted, mesh, divisor(given["longspan"], given.get("num_items_in_batch")))
    output.last_hidden_state = output.last_hidden_state[:, :0]
    with _forward_giving(base, output), _compat.loss_function_set_to(model, lambda *_, **__: loss):
        whole = own_forward(model)(*args, **given)
    output = type(whole)(**{name: value for name, value in whole.items() if name != "logits"})
    return as_asked(model, output, return_dict)


def _refuse(model: Any, called: nn.Module, loss_kind: str | None) -> None:
    """Raise ModelError for a model whose loss cannot be computed tile by tile.

    That is one for which, on a small input, the sum over tiles of tokens differs from the cross-entropy of all its logits; one
    that computes its loss by itself, has no separate base model, or has a replaced forward.

    Args:
        model: the Transformers model.
        called: what the user calls: the model, or peft's wrapper of it.
        loss_kind: the name of its loss in Transformers' table; None if it computes it by itself.
    """
    reason = None
    if loss_kind in (None, OWN):
        reason = "computes its loss by itself"
    elif "forward" in vars(model):
        reason = "has a forward of its own hung on it by another library"
    elif model.base_model is model:
        reason = "has no base model apart from its head"
    else:
        targets = torch.full((1, list(row_lengths(model).values())[-1]), 5, device=model.device)
        with proving(called):
            logits = forward(called)["logits"]
            with _catching(model.base_model) as caught:
                forward(called)
            total, _ = _sum_of_tiles(model, caught[0], targets, None)
        expected = F.cross_entropy(logits[0].double(), targets[0], reduction="sum")
        if not torch.allclose(total.double(), expected, rtol=5e-2 if logits.dtype.itemsize == 2 else 1e-4):
            reason = "gives other logits for some tokens than for all"
    if reason is not None:
        raise ModelError(f"{type(model).__name__} {reason}, so its logits must be there; leave out chunked_loss=True")


def _sum_of_tiles(model: Any, output: Any, targets: Tensor, step: Any) -> tuple[Tensor, Tensor]:
    """The sum of the losses of this rank's labelled tokens, and which tokens are labelled.

    Args:
        model: the model, whose head is applied to one tile of labelled tokens at a time.
        output: what its base model returned.
        targets: [rows, tokens], -100 for no label.
        step: the BatchInfo, or None.

    Returns:
        (a scalar in at least fp32, a boolean mask [rows, tokens]).
    """
    hidden_BSM, wanted = output.last_hidden_state, targets != IGNORE
    rows = labelled_rows(wanted.flatten(), None if step is None else step.num_local_labels)
    hidden_RM, targets = hidden_BSM.flatten(0, 1)[rows], targets.flatten()[rows]
    if not len(targets):
        nothing = hidden_BSM[:, :0].sum()  # which also keeps the graph of what the other ranks wait for
        return nothing.to(torch.promote_types(nothing.dtype, torch.float32)), wanted
    base = model.base_model
    inside = tuple(f"{name}." for name, module in model.named_modules() if module is base)
    every = model.named_parameters(remove_duplicate=False)  # a tied head has two names
    held = {f"model.{name}": parameter for name, parameter in every if not name.startswith(inside)}
    head = _Head(model)

    def run(tile_RM: Tensor, rows: slice, parameters: Sequence[Tensor]) -> Tensor:
        with _forward_giving(base, type(output)(last_hidden_state=tile_RM.unsqueeze(0))):
            logits = functional_call(head, dict(zip(held, parameters)), (step,)).squeeze(0)
        exact = logits if logits.dtype == torch.float64 else logits.float()
        return F.cross_entropy(exact, targets[rows], reduction="sum").unsqueeze(0)

    size = max(1, HEAD_TILE_BYTES // (4 * model.config.get_text_config().vocab_size))
    return tile_by_tile(run, hidden_RM, size, list(held.values())).sum(), wanted


class _Head(nn.Module):
    """The part of ``model`` after its base model, as a module: its forward gives the logits.

    The base model must be replaced meanwhile by one that returns the hidden states; ``step`` is the BatchInfo of the call.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.keywords: dict[str, Any] = {"return_dict": True}
        if hasattr(model.config, "output_router_logits"):
            self.keywords["output_router_logits"] = False  # a balance loss needs the tokens of all tiles

    def forward(self, step: Any) -> Tensor:
        ids = torch.zeros(1, 1, dtype=torch.long, device=self.model.device)
        logits: Tensor = own_forward(self.model)(input_ids=ids, longspan=step, **self.keywords).logits
        return logits


@contextmanager
def _forward_giving(base: Any, output: Any) -> Iterator[None]:
    """Context manager: inside, calling ``base`` returns ``output`` instead of computing."""
    had = vars(base).get("forward")
    base.forward = lambda *_, **__: output
    try:
        yield
    finally:
        del base.forward
        if had is not None:
            base.forward = had


@contextmanager
def _catching(module: nn.Module) -> Iterator[list[Any]]:
    """Context manager: yields a list to which the output of each call of ``module`` is added."""
    caught: list[Any] = []
    handle = module.register_forward_hook(lambda *call: caught.append(call[2]))
    try:
        yield caught
    finally:
        handle.remove()
