"""The loss of a Hugging Face model over all ranks, in the place of the one that it would form of one rank's tokens.

    model.loss_function(logits, labels, ...)       called by most models; by its name their labels are shifted, or in place
    F.cross_entropy(logits, labels) of its own     (BERT, BART) shown on one rank to be that and no more: the forward is then
                                                   given no labels, and the loss is put beside its logits

Both become the mean over the labelled tokens of all ranks. Whatever else a model computes as its loss is not touched, and a
call with labels refused. Knows nothing of attention.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.batch.context import BatchInfo
from longspan.batch.shard import IGNORE
from longspan.distributed.mesh import ParallelMesh
from longspan.errors import ModelError
from longspan.hf.probe import Probe, ask, proving, rows, special
from longspan.loss import mean_cross_entropy

IN_PLACE = ("ForMaskedLM", "ForTokenClassification")
"""Losses of the library whose labels stand where they are predicted."""
SHIFTED = ("ForCausalLM",)
OWN = "its own, in place"
"""What the model's forward computes by itself is the cross-entropy of its logits and labels, in place."""


def is_in_place(kind: str | None) -> bool:
    """Whether labels stand where they are predicted."""
    return kind in (*IN_PLACE, OWN)


def prove_loss(model: Any, base: Any) -> str | None:
    """The kind of the model's loss; None where it is none that can be formed over ranks. Changes nothing."""
    if "labels" not in inspect.signature(base.forward).parameters:
        return None
    calls = []

    def note(logits: Tensor, labels: Tensor, *args: Any, **keywords: Any) -> Tensor:
        calls.append(keywords.get("longspan"))
        return logits.sum() * 0

    labels = torch.zeros(1, list(rows(base).values())[-1], dtype=torch.long, device=model.device)
    already = "_loss_function" in vars(base)
    with proving(model):
        try:
            with losing(base, note):
                ask(model, labels=labels, shift_labels=labels)
        except ModelError:
            return None
        if not calls:
            return OWN if _is_plain(model, base) else None
    kind: str | None = getattr(base, "loss_type", None)
    knows_the_step = len(calls) == 1 and isinstance(calls[0], Probe)
    return kind if knows_the_step and not already and kind in (*IN_PLACE, *SHIFTED) else None


def labels_known(model: Any) -> int | None:
    """How many labels the model's logits tell apart; None without logits of tokens."""
    with proving(model):
        logits = ask(model).get("logits")
    return None if logits is None or logits.ndim != 3 else logits.shape[2]


def _is_plain(model: Any, base: Any) -> bool:
    """Whether the loss that the forward computes is the cross-entropy of its logits, of padding too, but not of -100."""
    logits = ask(model).get("logits")
    if logits is None or logits.ndim != 3 or "forward" in vars(base):
        return False
    named = [token for token in sorted(special(model, "pad", "bos", "eos")) if 0 <= token < logits.shape[2]][:6]
    labels = torch.arange(logits.shape[1], device=model.device) % logits.shape[2]
    labels[: len(named)], labels[-2:] = torch.tensor(named, dtype=torch.long), IGNORE
    try:
        found = ask(model, labels=labels.unsqueeze(0)).get("loss")
    except ModelError:
        return False
    expected = F.cross_entropy(logits[0].double(), labels)
    return found is not None and torch.allclose(found.double(), expected, rtol=2e-2 if logits.dtype.itemsize == 2 else 1e-5)


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


def loss_over_ranks(
    logits: Tensor, labels: Tensor, vocab_size: int | None = None, *, mesh: ParallelMesh, in_place: bool, longspan: BatchInfo,
    shift_labels: Tensor | None = None, **_: Any,
) -> Tensor:  # fmt: skip
    """``model.loss_function`` over the mesh: the mean over the labelled tokens of all ranks."""
    _refuse_labels_of_another_kind(in_place, shift_labels)
    targets = labels if shift_labels is None else shift_labels
    return mean_cross_entropy(logits, targets, mesh, longspan.num_labels)


def forward_with_loss(
    model: Any, mesh: ParallelMesh, *args: Any, labels: Tensor | None = None, shift_labels: Tensor | None = None, **given: Any
) -> Any:
    """``model.forward`` of a model that computes its loss by itself: without labels, and the loss put beside its logits."""
    asked = given.get("return_dict")
    output = type(model).forward(model, *args, **given | {"return_dict": True})
    if labels is not None:
        _refuse_labels_of_another_kind(True, shift_labels)
        loss = mean_cross_entropy(output.logits, labels, mesh, given["longspan"].num_labels)
        output = type(output)(**{"loss": loss} | {name: value for name, value in output.items() if name != "loss"})
    return output.to_tuple() if (model.config.return_dict if asked is None else asked) is False else output


def _refuse_labels_of_another_kind(in_place: bool, shift_labels: Tensor | None) -> None:
    if in_place is (shift_labels is not None):
        asked = "shift=False" if in_place else "shift=True"
        raise ModelError(f"the labels were cut for another kind of model; use shard_batch(batch, mesh, {asked})")
