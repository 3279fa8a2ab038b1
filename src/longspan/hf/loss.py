"""The loss of a Hugging Face model over all ranks, in place of the one that it would compute from one rank's tokens.

    model.loss_function(logits, labels, ...)       called by most models; its name says whether labels are shifted or in place
    F.cross_entropy(logits, labels) of its own     (BERT, BART) proven on one rank to be that and no more: the forward is then
                                                   given no labels, and the loss is put beside its logits

Both become the mean over the labelled tokens of all ranks. Another loss is left unchanged, and a call with labels is refused.
Independent of attention.
"""

import inspect
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.batch.context import BatchInfo
from longspan.batch.labels import IGNORE
from longspan.distributed.consensus import refuse_difference
from longspan.distributed.mesh import ParallelMesh
from longspan.errors import BatchError, ModelError
from longspan.hf import _compat
from longspan.hf.candidate import Candidate, Undo
from longspan.hf.probe import Probe, forward, proving, row_lengths, special_ids
from longspan.hf.step_scope import own_forward, scope_of, set_forward
from longspan.loss import mean_cross_entropy

IN_PLACE = ("ForMaskedLM", "ForTokenClassification")
"""Losses of Transformers for which the logits at position t predict ``labels[t]``."""
SHIFTED = ("ForCausalLM",)
"""Losses of Transformers for which the logits at position t predict the next token, ``shift_labels[t]``."""
SUPPORTED = frozenset({"logits", "labels", "vocab_size", "shift_labels", "num_items_in_batch", "ignore_index", "config"})
"""Arguments of Transformers' loss functions that mean the same over ranks, or are refused by a sentence of their own."""
OWN = "its own, in place"
"""The model's forward computes the cross-entropy of its logits and labels, in place, without ``model.loss_function``."""


@dataclass(frozen=True)
class Loss:
    """How a model computes its loss, as ``probe`` found it; ``install`` replaces it by the loss over all ranks.

    Attributes:
        kind: a name of Transformers' table of losses, ``OWN``, or None if the loss cannot be computed over ranks.
        classes: the last dim of the logits: labels must be below it; None if the model has no logits [rows, tokens, classes].
        handed: whether the model passes the keyword ``longspan`` (the BatchInfo) on to ``model.loss_function``.
    """

    kind: str | None
    classes: int | None
    handed: bool

    def install(self, model: Any, mesh: ParallelMesh) -> Undo:
        """Replace the model's loss by the mean over all ranks, and check labels and loss keywords before each forward.

        Returns:
            A function that undoes it.
        """
        undo = ExitStack()
        check = partial(self._check, type(model).__name__, mesh)
        undo.callback(model.register_forward_pre_hook(check, with_kwargs=True).remove)
        if self.kind == OWN:
            set_forward(model, partial(forward_with_loss, model, mesh))
            undo.callback(_compat.remove_forward, model)
        elif self.kind is not None:
            _compat.set_loss_function(model, partial(loss_over_ranks, model=model, mesh=mesh, in_place=is_in_place(self.kind)))
            undo.callback(_compat.reset_loss_function, model)
        return undo.close

    def _check(self, name: str, mesh: ParallelMesh, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of a model of the class ``name``, for calls with labels.

        Raises:
            BatchError: a label of any rank is beyond the classes of the logits.
            ModelError: a keyword that this loss cannot use, or a model whose loss cannot be computed over ranks.
        """
        if kwargs.get("labels") is None:
            self._refuse_labels_of_a_module_around(name, model, kwargs)
            return
        _refuse_keywords(self.kind, kwargs)
        _refuse_unfit_divisor(kwargs.get("num_items_in_batch"), mesh)
        largest = kwargs["longspan"].largest_label
        if self.classes is not None and largest >= self.classes:
            raise BatchError(f"the step holds label {largest}, and {name} tells 0 to {self.classes - 1} apart")
        if self.kind is None:
            raise ModelError(
                f"{name} computes its loss from labels by itself, over this rank's tokens; leave labels out of the call, and "
                f"use longspan.cross_entropy(outputs.logits, labels, mesh=mesh, num_labels=part['longspan'].num_labels)"
            )

    def _refuse_labels_of_a_module_around(self, name: str, model: Any, kwargs: dict[str, Any]) -> None:
        """Raise ModelError if a module that holds ``model``, of the class ``name``, has taken the labels of the call."""
        if kwargs.get("shift_labels") is not None and "labels" not in inspect.signature(model.forward).parameters:
            raise ModelError(
                f"shift_labels reached {name} without labels: a module around it has taken those, and would form the loss of "
                f"this rank's tokens; parallelize that module instead of {name}, or take shift_labels out of the call for "
                f"longspan.cross_entropy(logits, shift_labels, mesh=mesh, num_labels=part['longspan'].num_labels)"
            )


def probe(candidate: Candidate) -> Loss:
    """How a model computes its loss, found by test forwards with labels that leave the model as it was.

    Args:
        candidate: the model that is about to be made parallel, as the user calls it (models/adapter.py).

    Returns:
        A Loss. Its ``kind`` is None where the model takes no labels, the forward fails or its loss is none that can be computed
        over ranks; such a model trains without labels, or is refused at the first call with labels.
    """
    kind, handed = _kind(candidate.called, candidate.model)
    return Loss(kind, _classes(candidate.called), handed)


def is_in_place(kind: str | None) -> bool:
    """Whether the logits at position t predict ``labels[t]`` with the loss ``kind``; otherwise they predict the next token.

    ``kind`` is a name of Transformers' table of losses, or ``OWN`` (the cross-entropy of a model's own code, which is in
    place); None, a loss that is not in the table, gives False.
    """
    return kind in (*IN_PLACE, OWN)


def _kind(model: Any, base: Any) -> tuple[str | None, bool]:
    """How a model computes its loss, found by a test forward that records the call of its loss function.

    Args:
        model: what the user calls.
        base: the Transformers model in it.

    Returns:
        (the name of the loss in Transformers' table, ``OWN``, or None if it cannot be computed over ranks; whether the loss
        function gets the keyword ``longspan``).
    """
    if "labels" not in inspect.signature(base.forward).parameters:
        return None, True
    calls: list[tuple[Any, bool]] = []

    def note(logits: Tensor, labels: Tensor, *args: Any, **keywords: Any) -> Tensor:
        every_token = logits.shape[:-1].numel() == labels.numel() == count
        calls.append((keywords.get("longspan"), every_token))
        return logits.sum() * 0

    count = list(row_lengths(base).values())[-1]
    labels = torch.zeros(1, count, dtype=torch.long, device=model.device)
    kind = _compat.loss_kind(base)
    with proving(model):
        try:
            with _compat.loss_function_set_to(base, note):
                forward(model, labels=labels, shift_labels=labels)
        except ModelError:
            return None, True
        if not calls:
            return (OWN if _is_plain(model, base) else None), True
    step, every_token = calls[0]
    known = len(calls) == 1 and every_token and kind in (*IN_PLACE, *SHIFTED)
    return (kind if known else None), isinstance(step, Probe)


def _classes(model: Any) -> int | None:
    """The last dim of the model's logits [rows, tokens, classes], from a test forward; None if it has no such logits."""
    with proving(model):
        logits = forward(model).get("logits")
    return None if logits is None or logits.ndim != 3 else logits.shape[2]


def _is_plain(model: Any, base: Any) -> bool:
    """Whether the loss that ``model`` computes in its own code is the cross-entropy of its logits.

    Tested on one rank: labels of -100 must be ignored in it, and no others, also not those that equal the padding id. ``base``
    is the Transformers model itself.
    """
    logits = forward(model).get("logits")
    if logits is None or logits.ndim != 3 or "forward" in vars(base):
        return False
    named = [token for token in sorted(special_ids(model, "pad", "bos", "eos")) if 0 <= token < logits.shape[2]][:6]
    labels = torch.arange(logits.shape[1], device=model.device) % logits.shape[2]
    labels[: len(named)], labels[-2:] = torch.tensor(named, dtype=torch.long), IGNORE
    try:
        found = forward(model, labels=labels.unsqueeze(0)).get("loss")
    except ModelError:
        return False
    expected = F.cross_entropy(logits[0].double(), labels)
    return found is not None and torch.allclose(found.double(), expected, rtol=2e-2 if logits.dtype.itemsize == 2 else 1e-5)


def loss_over_ranks(
    logits: Tensor, labels: Tensor, vocab_size: int | None = None, *, model: Any, mesh: ParallelMesh, in_place: bool,
    longspan: BatchInfo | None = None, shift_labels: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None, **for_layers: Any,
) -> Tensor:  # fmt: skip
    """``model.loss_function`` over the mesh: the mean over the labelled tokens of all ranks.

    Args:
        logits: [rows, my tokens, vocab].
        labels: this rank's labels [rows, my tokens]; read if ``shift_labels`` is None.
        vocab_size: not used, because it is the last dim of the logits.
        model: the model; if it does not pass on ``longspan`` and ``shift_labels``, those of its current call are used.
        mesh: the ranks.
        in_place: True if the logits at position t predict ``labels[t]``; otherwise they predict the next token, and
            ``shift_labels`` is read.
        longspan: the BatchInfo of the call.
        shift_labels: the labels shifted over the whole row, this rank's tokens of them.
        num_items_in_batch: replaces the number of labels of the step as the divisor; the same on every rank.
        for_layers: not used: keywords for the layers, which Transformers' own loss functions ignore too. Keywords that a
            loss function would use are refused before the forward.

    Returns:
        The mean loss, equal on every rank.

    Raises:
        ModelError: the labels were shifted for the other kind of model.
    """
    if longspan is None:
        call = scope_of(model).call
        longspan, shift_labels = call.step, call.shift_labels
    _refuse_labels_of_another_kind(in_place, shift_labels)
    targets = labels if shift_labels is None else shift_labels
    return mean_cross_entropy(logits, targets, mesh, divisor(longspan, num_items_in_batch))


def divisor(step: BatchInfo, num_items_in_batch: Tensor | int | None) -> int:
    """The divisor of the sum of all ranks' losses: ``num_items_in_batch`` if given, else the labels of the step."""
    return step.num_labels if num_items_in_batch is None else int(num_items_in_batch)


def _refuse_keywords(kind: str | None, kwargs: dict[str, Any]) -> None:
    """Raise ModelError for a keyword in ``kwargs`` that the loss function ``kind`` would use and ``loss_over_ranks`` does not.

    ``kind`` None: it uses none.
    """
    if kwargs.get("ignore_index", IGNORE) != IGNORE and kind not in (OWN, None):
        raise ModelError(
            f"ignore_index={kwargs['ignore_index']} is another than {IGNORE}, by which shard_batch counted the labels; set the "
            f"labels that are not learned from to {IGNORE} before shard_batch, and leave ignore_index out"
        )
    unsupported = sorted((_compat.loss_keywords(kind) - SUPPORTED) & kwargs.keys())
    if unsupported:
        raise ModelError(f"{unsupported[0]}= of the loss {kind} is not supported over ranks; leave it out of model(...)")


def _refuse_unfit_divisor(items: Tensor | int | None, mesh: ParallelMesh) -> None:
    """Raise a LongspanError on every rank if ``num_items_in_batch`` is no whole number above 0, or differs between ranks.

    One exchange between all ranks, and only in a call with ``num_items_in_batch``.
    """
    if items is None or torch.compiler.is_compiling():
        return
    refuse_difference(
        "num_items_in_batch",
        f"{float(items):g}",
        mesh.loss_control_group,
        "it divides the sum of all ranks' losses: pass the labels of the whole step on every rank, or leave it out",
    )
    if float(items) < 1 or float(items) % 1:
        raise ModelError(
            f"num_items_in_batch={float(items):g} is no number of labels; pass a whole number of 1 or more, or leave it out: "
            f"shard_batch has counted the labels"
        )


def forward_with_loss(
    model: Any, mesh: ParallelMesh, *args: Any, labels: Tensor | None = None, shift_labels: Tensor | None = None, **given: Any
) -> Any:
    """The forward of a model that computes its loss in its own code, with that loss replaced by the mean over all ranks.

    The model's own forward is called without labels; the loss is computed from its logits and added to its output.

    Args:
        model: the Transformers model.
        mesh: the ranks.
        labels, shift_labels: this rank's labels; without ``labels`` the output has no loss.
        args, given: the other arguments of the call.
    """
    return_dict = given.get("return_dict")
    output = own_forward(model)(*args, **given | {"return_dict": True})
    if labels is not None:
        _refuse_labels_of_another_kind(True, shift_labels)
        loss = mean_cross_entropy(output.logits, labels, mesh, given["longspan"].num_labels)
        output = type(output)(**{"loss": loss} | {name: value for name, value in output.items() if name != "loss"})
    return as_asked(model, output, return_dict)


def as_asked(model: Any, output: Any, return_dict: bool | None) -> Any:
    """The model output in the form that the caller wants: a tuple if ``return_dict`` is False, else ``output`` itself.

    If ``return_dict`` is None, ``model.config.return_dict`` decides.
    """
    return output.to_tuple() if (model.config.return_dict if return_dict is None else return_dict) is False else output


def _refuse_labels_of_another_kind(in_place: bool, shift_labels: Tensor | None) -> None:
    """Raise ModelError if the labels were cut for another kind of model.

    Args:
        in_place: whether the logits at position t predict ``labels[t]``; then ``shift_labels`` must be None.
        shift_labels: the shifted labels, needed for the other kind.
    """
    if in_place is (shift_labels is not None):
        argument = "shift=False" if in_place else "shift=True"
        raise ModelError(f"the labels were cut for another kind of model; use shard_batch(batch, mesh, {argument})")
