"""Pipeline stages of a Hugging Face model by its own plan, ``config.base_model_pp_plan``: embedding, layers, norm, head.

    first stage      embed_tokens, layers      called with input_ids
    other stages     layers                    called with inputs_embeds = the hidden states of the stage before
    last stage       layers, norm, and what stands beside the base model: the head

What the plan does not name must be without parameters (rotary tables): every stage has it. That the stages, one after the
other, compute what the whole model computes is tested on one rank first: a layer could read more than hidden states.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from longspan.distributed.mesh import ParallelMesh
from longspan.distributed.pipeline_parallel import PipelinePlan, skipping, stage_modules
from longspan.errors import ModelError
from longspan.hf.candidate import Candidate, Undo
from longspan.hf.names import is_encoder_decoder
from longspan.hf.probe import equal, forward, proving


@dataclass(frozen=True)
class PipelineStages:
    """What ``probe`` found: which modules of the model are on which pipeline stage (``plan``)."""

    plan: PipelinePlan

    def install(self, model: nn.Module, mesh: ParallelMesh) -> Undo:
        """Return an undo that does nothing: ``parallelize`` splits the model before anything is installed."""
        return lambda: None


def probe(candidate: Candidate) -> PipelineStages | None:
    """The stages of the model on a mesh with pipeline > 1, else None.

    Raises:
        ModelError: the model has no plan, or its stages do not compute what it computes; peft; an encoder-decoder; a balance
            loss of experts.
    """
    if candidate.mesh.coordinate.pipeline == 1:
        return None
    model, kind = candidate.model, type(candidate.model).__name__
    base = model.base_model
    named: Mapping[str, Any] = getattr(base.config, "base_model_pp_plan", None) or {}
    reason = None
    if candidate.called is not model:
        reason = "is wrapped by peft"
    elif is_encoder_decoder(model):
        reason = "is an encoder-decoder"
    elif not named:
        reason = "has no base_model_pp_plan that says how its layers follow one another"
    elif base is model:
        reason = "has no head beside its base model, so no stage would form a loss"
    elif any(getattr(config, "output_router_logits", False) for _, config in candidate.configs):
        reason = "adds the balance loss of its experts (config.output_router_logits)"
    if reason is not None:
        raise ModelError(f"{kind} {reason}, which pipeline > 1 does not support; use pipeline=1")
    plan = _plan(model, named)
    with proving(candidate.called):
        _prove_stages(model, plan)
    return PipelineStages(plan)


def _plan(model: Any, named: Mapping[str, Any]) -> PipelinePlan:
    """The PipelinePlan of a model, read from the plan in its config.

    Args:
        model: the Transformers model.
        named: that plan, ``base_model_pp_plan``: {name of a module: its inputs and outputs}.

    Raises:
        ModelError: a module has parameters and the plan does not name it.
    """
    base = model.base_model
    body = next(name for name, module in model.named_modules() if module is base)
    children = dict(base.named_children())
    layers = [name for name in named if isinstance(children.get(name), nn.ModuleList)]
    kind = type(model).__name__
    if len(layers) != 1:
        raise ModelError(
            f"{kind}'s base_model_pp_plan names no single list of layers, which pipeline > 1 needs; use pipeline=1"
        )
    for name, child in children.items():
        if name not in named and any(True for _ in child.parameters()):
            raise ModelError(
                f"'{body}.{name}' of {kind} has parameters and is not in its base_model_pp_plan; pipeline > 1 would not know "
                f"its stage, use pipeline=1"
            )
    order = [name for name in children if name in named]
    cut = order.index(layers[0])
    beside = [name for name, module in model.named_children() if module is not base and any(True for _ in module.parameters())]
    embed, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {module: name for name, module in model.named_modules()}
    tied = head is not None and head.weight is embed.weight
    return PipelinePlan(
        blocks=tuple(f"{body}.{layers[0]}.{index}" for index in range(len(children[layers[0]]))),
        first=tuple(f"{body}.{name}" for name in order[:cut]),
        last=tuple(f"{body}.{name}" for name in order[cut + 1 :]), heads=tuple(beside),
        hidden=model.config.get_text_config().hidden_size, hidden_of=_first, body=body,
        tied=(f"{names[embed]}.weight", f"{names[head]}.weight") if tied else None,
    )  # fmt: skip


def _first(output: Any) -> Tensor:
    """The first element of a module's output: its hidden states."""
    hidden: Tensor = output[0]
    return hidden


def _prove_stages(model: Any, plan: PipelinePlan) -> None:
    """Raise ModelError if two stages, one after the other, give other hidden states than the whole model.

    Two stages show what every number of stages does: a layer before the cut and one behind it. With one layer there is no cut.
    """
    if len(plan.blocks) < 2:
        return
    wanted = _hidden(model, plan)
    holders = stage_modules(model, plan, 2)
    given: dict[str, Any] = {}
    for stage in (0, 1):
        with skipping(model, plan, [name for name, holder in holders.items() if holder != stage]):
            hidden = _hidden(model, plan, **given)
        given = {"inputs_embeds": hidden, "input_ids": None}
    if not equal(hidden, wanted):
        raise ModelError(
            f"the layers of {type(model).__name__} read more than the hidden states of the layer before: split into stages "
            f"they compute something else; use pipeline=1"
        )


def _hidden(model: Any, plan: PipelinePlan, **given: Any) -> Tensor:
    """What ``plan.body`` gives out as hidden states in one test forward (behind the final norm if ``plan.body`` applies it).

    Args:
        model: the Transformers model.
        plan: names the module whose output is read.
        given: keywords of the model that replace those of the test batch; one that is None is left out.
    """
    found: list[Tensor] = []
    body = model.get_submodule(plan.body)
    handle = body.register_forward_hook(lambda module, args, output: found.append(_first(output)))
    try:
        forward(model, **given)
    finally:
        handle.remove()
    return found[0]
