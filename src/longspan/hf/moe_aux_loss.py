"""The load-balancing loss of a mixture of experts over every token of the batch, by the model's own function.

    base model   ->   router_logits   one [my tokens, experts] a layer          (config.output_router_logits)
                          |
                      my real tokens of them, gathered from all ranks of all replicas, whose adjoint is the sum over ranks
                          |
    the model's own load_balancing_loss_func(router_logits, ...)   ->   aux_loss   ->   loss + coefficient * aux_loss

The loss is not linear in the tokens: a mean of the ranks' losses is another number. It is a function of means over tokens, so
that it needs no mask where padding is left out, and no order: proven on one rank first. Over accumulated micro-batches one
balance loss a micro-batch is added, as Transformers does. Independent of masks.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from longspan.batch.context import BatchInfo
from longspan.distributed.collectives import all_gather
from longspan.distributed.consensus import exchange_integers
from longspan.distributed.mesh import ParallelMesh
from longspan.errors import BatchError, ModelError
from longspan.hf._compat import loss_function_set_to
from longspan.hf.candidate import Candidate, Undo, remove_all
from longspan.hf.loss import Loss
from longspan.hf.position_probe import LEFT
from longspan.hf.probe import TOKENS, all_equal, forward, proving


@dataclass(frozen=True)
class BalanceLoss:
    """What ``probe`` found about the balance loss of a mixture of experts.

    Attributes:
        routers: the module whose output holds the router logits; None where the config asks for no balance loss.
    """

    routers: nn.Module | None

    def install(self, model: nn.Module, mesh: ParallelMesh) -> Undo:
        """Register hooks with which the balance loss is computed from the router logits of all ranks.

        A call with ``output_router_logits=`` raises ModelError if the config asked for no balance loss.

        Returns:
            A function that removes the hooks.
        """
        handles: list[Any] = [model.register_forward_pre_hook(self._check, with_kwargs=True)]
        if self.routers is not None:
            handles += gather_routers(self.routers, model, mesh)
        return remove_all(handles)

    def _check(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook: raise ModelError for a call that asks for a balance loss which the config did not ask for."""
        if kwargs.get("output_router_logits") and self.routers is None:
            raise ModelError(
                "output_router_logits= was not proven for this model, and its balance loss would be that of this rank's "
                "tokens; set config.output_router_logits before parallelize"
            )


def probe(candidate: Candidate) -> BalanceLoss:
    """The BalanceLoss of a model: which module's output holds the router logits.

    Where the config asks for no balance loss, ``routers`` is None, and ``install`` only refuses calls that ask for one.

    Raises:
        ModelError: the balance loss depends on more than these router logits.
    """
    wanted = any(getattr(config, "output_router_logits", False) for _, config in candidate.configs)
    loss = candidate.finding(Loss)
    kind = None if loss is None else loss.kind
    return BalanceLoss(_prove_balance(candidate.called, candidate.model, kind) if wanted else None)


class _Whole(tuple[Tensor, ...]):
    """Router logits of the tokens of all ranks, one tensor [tokens, experts] per layer; ``mine``: those of this rank."""

    mine: tuple[Tensor, ...]


def gather_routers(module: nn.Module, base: nn.Module, mesh: ParallelMesh) -> list[Any]:
    """Register hooks with which ``base`` computes its balance loss from all tokens of the batch that are not padding.

    Args:
        module: the module whose output has the ``router_logits``; after it they are gathered from all ranks.
        base: the model; in its output ``router_logits`` are again those of this rank's tokens.
        mesh: the ranks.

    Returns:
        The handles of the hooks.
    """

    def gather(_: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        if output.get("router_logits") and not isinstance(output["router_logits"], _Whole):
            output["router_logits"] = _of_all_ranks(output["router_logits"], kwargs["longspan"], mesh)
        return output

    def cut(_: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output.get("router_logits"), _Whole):
            output["router_logits"] = output["router_logits"].mine
        return output

    return [module.register_forward_hook(gather, with_kwargs=True), base.register_forward_hook(cut)]


def _of_all_ranks(mine: tuple[Tensor, ...], step: BatchInfo, mesh: ParallelMesh) -> _Whole:
    """The router logits of each layer for the tokens of all ranks that are not padding, [tokens, experts]; differentiable.

    Args:
        mine: those of this rank's tokens, one tensor a layer.
        step: the BatchInfo, which says which tokens are padding.
        mesh: the ranks.

    Raises:
        BatchError: on every rank alike, if there is no such token: a mean over none is no number.
    """
    real = _real(step).to(mine[0].device)
    sizes = [count for (count,) in exchange_integers((len(real),), mesh.world_group)]
    if not sum(sizes):
        raise BatchError(
            "a micro-batch has no token in any replica, and the balance loss of experts is a mean over its tokens; leave it "
            "out on every replica, or set config.output_router_logits to False"
        )
    rows = (logits.flatten(0, -2).index_select(0, real) for logits in mine)
    whole = _Whole(all_gather(row, mesh.loss_group, mesh.transport, 0, sizes) for row in rows)
    whole.mine = mine
    return whole


def _real(step: BatchInfo) -> Tensor:
    """The indices into [rows * my tokens] of this rank's tokens that are not padding; empty for a dummy row."""
    positions = torch.tensor([position for run in step.positions for position in run])
    if step.is_dummy:
        return positions[:0]
    runs = step.padding or (range(step.tokens),) * step.rows
    real = torch.stack([(positions >= run.start) & (positions < run.stop) for run in runs])
    return real.flatten().nonzero().flatten()


def _prove_balance(model: Any, base: PreTrainedModel, loss_kind: str | None) -> nn.Module:
    """Find the module from whose ``router_logits`` the balance loss is computed, by a test forward that replaces them.

    Args:
        model: what the user calls.
        base: the Transformers model in it.
        loss_kind: the name of its loss in Transformers' table.

    Raises:
        ModelError: the balance loss depends on anything else of the tokens.
    """
    recorded: dict[nn.Module, tuple[Tensor, ...]] = {}

    def record(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, dict) and output.get("router_logits"):
            recorded[module] = output["router_logits"]

    labels = torch.zeros(1, TOKENS, dtype=torch.long, device=base.device)
    learned: dict[str, Any] = {} if loss_kind is None else {"labels": labels, "shift_labels": labels}
    padding = (torch.arange(TOKENS, device=base.device) >= LEFT).long().unsqueeze(0)
    inside = [module for module in base.modules() if module is not base and isinstance(module, PreTrainedModel)]
    handles = [module.register_forward_hook(record) for module in inside]
    try:
        with proving(model), loss_function_set_to(base, lambda logits, *_, **__: logits.sum() * 0):
            wanted = forward(model, attention_mask=padding, output_router_logits=True, **learned)
            for handle in handles:
                handle.remove()
            if len(recorded) == 1 and "aux_loss" in wanted:
                (module, logits), *_ = recorded.items()
                real = tuple(layer.flatten(0, -2)[LEFT:] for layer in logits)
                handles = [module.register_forward_hook(partial(_replace, real))]
                learned = {name: value[:, : TOKENS // 2] for name, value in learned.items()}
                found = forward(model, 0, output_router_logits=True, **learned)
                of_loss = ("aux_loss", "loss")
                if all_equal(*({name: x[name] for name in of_loss if name in x} for x in (wanted, found))):
                    return module
    finally:
        for handle in handles:
            handle.remove()
    raise ModelError(
        f"config.output_router_logits is on, but the balance loss of {type(base).__name__} is not its own function of all "
        f"tokens' router logits: over a part of the tokens it would be another; set it to False"
    )


def _replace(logits: tuple[Tensor, ...], module: nn.Module, args: Any, output: Any) -> Any:
    """Forward hook: put ``logits`` in place of the ``router_logits`` of the output."""
    output["router_logits"] = logits
    return output
