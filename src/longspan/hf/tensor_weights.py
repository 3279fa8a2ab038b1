"""Tensor parallelism of a Hugging Face model by its own plan, ``config.base_model_tp_plan``: which weights are cut, and where.

    "layers.*.self_attn.q_proj": "colwise"        rows of the weight are heads               \\  region layers.*.self_attn,
    "layers.*.self_attn.o_proj": "rowwise"        its output is a partial sum                /   exit o_proj
    "layers.*.mlp.experts.gate_up_proj": "packed_colwise"      gate and up, each cut         >   region and exit layers.*.mlp

The plan names weights; the region is the module that owns them (of experts: the module that routes to them). What the plan does
not name is replicated. Styles that are not in ``HONOURED`` are refused by name. Embedding and head: vocab_weights.py.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from longspan.distributed.layout import Heads
from longspan.distributed.mesh import ParallelMesh
from longspan.distributed.tensor_cuts import Cut
from longspan.distributed.tensor_parallel import TensorPlan, refuse_plan, shown_by
from longspan.errors import ModelError
from longspan.hf.attention_layers import AttentionLayers
from longspan.hf.candidate import Candidate, Undo
from longspan.hf.names import is_encoder_decoder
from longspan.hf.probe import TOKENS, equal, forward, proving
from longspan.hf.vocab_weights import vocabulary_of

HONOURED = frozenset({
    "colwise", "rowwise", "packed_colwise", "packed_rowwise", "replicated_with_grad_allreduce", "moe_tp_experts",
})  # fmt: skip
"""The styles of base models' plans that are computed; ``colwise_gather_output`` is honoured for the head alone."""
REFUSED = frozenset({
    "all_reduce", "colwise_gather_output", "colwise_rep", "embedding_colwise", "embedding_rowwise", "ep_dispatch_experts",
    "grouped_gemm", "local_params", "mla_kv_a_proj", "moe_identity_expert", "replicate", "rowwise_rep",
    "rowwise_split_input", "sequence_parallel",
})  # fmt: skip
"""Styles that Transformers has and longspan does not compute. A test fails for a style that is in neither list."""


@dataclass(frozen=True)
class TensorWeights:
    """What ``probe`` found: which weights of the model are cut over the tensor ranks, and how (``plan``)."""

    plan: TensorPlan

    def install(self, model: nn.Module, mesh: ParallelMesh) -> Undo:
        """Return an undo that does nothing: ``parallelize`` cuts the weights after every other change is installed."""
        return lambda: None


def probe(candidate: Candidate) -> TensorWeights | None:
    """Which weights of the model are cut over the tensor ranks, read from its config; None on a mesh with tensor=1.

    Raises:
        ModelError: the config has no plan of tensor parallelism, or one that longspan does not compute; LoRA; an
            encoder-decoder; a balance loss of experts; a mixture of experts that adds what the plan does not cut; weights that
            are read outside of the modules that own them.
        LayoutError: heads or hidden units that the tensor ranks do not divide.
    """
    ranks = candidate.mesh.coordinate.tensor
    if ranks == 1:
        return None
    layers = candidate.finding(AttentionLayers)
    assert layers is not None, "attention_layers stands before this file in DEVIATIONS"
    styles = _styles(candidate)
    plan = _Reader(candidate.model, layers, styles).plan()
    refuse_plan(plan, ranks)
    with proving(candidate.called):
        for region in (name for name in plan.regions if name in plan.exits):  # in one order, so that ranks say the same
            _prove_partial_sums(candidate.model, region, plan, ranks)
        _prove_reads(candidate.model, plan)
        words = vocabulary_of(candidate.model, ranks)
    plan = replace(plan, cuts={**plan.cuts, **words.cuts}, embeddings=words.embeddings, heads=words.heads)
    for query, kv in {layer.heads for _, layer in layers.layers}:
        Heads(query // ranks, max(1, kv // ranks), candidate.mesh.coordinate.ulysses, candidate.memory.head_chunks)
    return TensorWeights(plan)


def _styles(candidate: Candidate) -> dict[str, str]:
    """How each module or parameter of the model is cut: {name: style of Transformers' plan, such as "colwise"}.

    Raises:
        ModelError: the config has no plan of tensor parallelism or has an unsupported style, or the model is one that the plan
            does not cover: LoRA, an encoder-decoder, a balance loss of experts.
    """
    model, kind = candidate.model, type(candidate.model).__name__
    base = model.base_model
    plan: Mapping[str, str] = getattr(base.config, "base_model_tp_plan", None) or {}
    reason = None
    if candidate.called is not model:
        reason = "is wrapped by peft, whose adapters the plan of the model does not name"
    elif is_encoder_decoder(model):
        reason = "is an encoder-decoder"
    elif not plan:
        reason = "has no base_model_tp_plan that says which of its weights may be cut"
    elif any(getattr(config, "output_router_logits", False) for _, config in candidate.configs):
        reason = "adds the balance loss of its experts (config.output_router_logits)"
    if reason is not None:
        raise ModelError(f"{kind} {reason}, which tensor > 1 does not support; use tensor=1 with ulysses or ring")
    prefix = next(name for name, module in model.named_modules() if module is base)
    found = {}
    for name in [name for name, _ in (*base.named_modules(), *base.named_parameters())]:
        style, full = plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", name)), f"{prefix}.{name}" if prefix else name
        if style is not None and style not in HONOURED:
            raise ModelError(
                f"{kind} wants {full!r} cut in the style {style!r}, which is not supported; use tensor=1 with ulysses or ring"
            )
        if style is not None:
            found[full] = style
    return found


class _Reader:
    """Reads which weights of a model are cut, and where their inputs are gathered, from the styles of Transformers' plan.

    Args:
        model: the Transformers model.
        layers: its attention layers.
        styles: the style of each module or parameter of the plan, by its name in the model.
    """

    def __init__(self, model: nn.Module, layers: AttentionLayers, styles: Mapping[str, str]) -> None:
        self._model, self._styles = model, styles
        names = {module: name for name, module in model.named_modules()}
        self._heads = {names[module]: layer.heads for module, layer in layers.layers}
        if any(layer.recipe is not None for _, layer in layers.layers):
            raise ModelError(f"{type(model).__name__} attends in its own code, which tensor > 1 does not support; use tensor=1")

    def plan(self) -> TensorPlan:
        """The model's TensorPlan: where inputs are gathered, where outputs are reduced, and how each weight is cut.

        Raises:
            ModelError: a weight cannot be cut as the plan says.
        """
        regions = self._regions()
        for name in self._heads:
            if name not in regions:
                raise ModelError(f"the model's plan cuts nothing of attention {name!r}, which tensor > 1 needs; use tensor=1")
        exits, cuts, late = list[str](), dict[str, Cut](), dict[str, str]()
        for name, style in self._weights():
            region = next(region for region in regions if name.startswith(f"{region}."))
            module, leaf = self._linear(name)
            cuts |= self._cuts(region, name, style)
            is_exit = style == "rowwise" and leaf and not regions[region]
            if is_exit:
                exits.append(name)
            if style == "rowwise" and getattr(module, "bias", None) is not None:
                if not is_exit:
                    raise ModelError(
                        f"{name!r} has a bias inside a mixture of experts, which tensor > 1 would add on each rank"
                    )
                late[name] = f"{name}.bias"
        routed = [region for region, experts in regions.items() if experts]
        self._refuse_uncut_experts(routed, cuts)
        return TensorPlan(regions=tuple(regions), exits=(*exits, *routed), cuts=cuts, late_biases=late)

    def _weights(self) -> Iterator[tuple[str, str]]:
        """What the model's plan cuts: (name, style), where style is Transformers' word, such as "colwise".

        The name is that of a Linear module, whose weight and bias are cut, or of a single parameter, such as packed experts.
        """
        return ((n, s) for n, s in self._styles.items() if s not in ("replicated_with_grad_allreduce", "moe_tp_experts"))

    def _regions(self) -> dict[str, bool]:
        """The modules whose input is gathered: {name: whether the module routes tokens to experts}.

        Of modules inside one another only the outer one is in the result.
        """
        experts = {name for name, style in self._styles.items() if style == "moe_tp_experts"}
        owners: dict[str, bool] = {}
        for name, _ in self._weights():
            owner = name.rpartition(".")[0]
            owners |= {owner.rpartition(".")[0]: True} if owner in experts else {owner: owners.get(owner, False)}
        return {
            name: routes for name, routes in owners.items() if not any(name.startswith(f"{other}.") for other in owners)
        }  # fmt: skip

    def _linear(self, name: str) -> tuple[nn.Module | None, bool]:
        """The Linear module called ``name`` and True; None and False if ``name`` is that of a parameter.

        Raises:
            ModelError: it is another kind of module.
        """
        module = dict(self._model.named_modules()).get(name)
        if module is not None and not isinstance(module, nn.Linear):
            raise ModelError(f"{name!r} is a {type(module).__name__}, and tensor > 1 cuts torch.nn.Linear only; use tensor=1")
        return module, module is not None

    def _cuts(self, region: str, name: str, style: str) -> dict[str, Cut]:
        """{name of a parameter: how it is cut}, for the module or parameter ``name`` of the plan, in ``region``, with this
        ``style``.

        Raises:
            ModelError: a Linear module has a style that is for experts only, or its rows are no heads.
        """
        module, is_linear = self._linear(name)
        if not is_linear:
            return {name: self._cut_of_parameter(name, style)}
        assert isinstance(module, nn.Linear)
        rows, columns = module.weight.shape
        if style == "rowwise":
            return {f"{name}.weight": Cut(dim=1, units=self._heads[region][0] if region in self._heads else columns)}
        if style != "colwise":
            raise ModelError(f"{name!r} is a Linear in the style {style!r}, which is supported for experts only; use tensor=1")
        cut = self._cut_of_heads(region, name, rows) if region in self._heads else Cut(dim=0, units=rows)
        return {f"{name}.weight": cut} | ({f"{name}.bias": cut} if module.bias is not None else {})

    def _cut_of_heads(self, region: str, name: str, rows: int) -> Cut:
        """How a projection of an attention module is cut over the tensor ranks: by its query heads, or by its key/value heads.

        Args:
            region: the attention module.
            name: the projection.
            rows: rows of its weight.

        Raises:
            ModelError: its rows are those of neither.
        """
        query, kv = self._heads[region]
        attention: Any = self._model.get_submodule(region)
        dims: set[int] = {getattr(attention, field, 0) for field in ("head_dim", "v_head_dim", "head_size")}
        if kv < query and rows in {kv * dim for dim in dims}:
            return Cut(dim=0, units=kv, replicable=True)
        if rows % query == 0 and (kv == query or rows // query in {dim * many for dim in dims for many in (1, 2)}):
            return Cut(dim=0, units=query)
        raise ModelError(
            f"{name!r} has {rows} rows, which are not those of its {query} query or {kv} key/value heads; tensor > 1 cannot "
            f"cut it, use tensor=1"
        )

    def _cut_of_parameter(self, name: str, style: str) -> Cut:
        """How a parameter with the stacked weights [experts, rows, columns] of experts is cut, along rows or columns.

        Args:
            name: the parameter.
            style: its style in Transformers' plan, such as "packed_colwise".

        Raises:
            ModelError: the parameter has another shape.
        """
        shape = self._model.get_parameter(name).shape
        known = {"colwise": (-2, 1), "rowwise": (-1, 1), "packed_colwise": (-2, 2), "packed_rowwise": (-1, 2)}
        dim, packed = known[style]
        if len(shape) != 3 or shape[dim] % packed:
            raise ModelError(f"{name!r} of shape {list(shape)} is no stack of experts; tensor > 1 cannot cut it, use tensor=1")
        return Cut(dim=len(shape) + dim, units=shape[dim] // packed, packed=packed)

    def _refuse_uncut_experts(self, regions: list[str], cuts: Mapping[str, Cut]) -> None:
        """Raise ModelError if experts in ``regions`` have a parameter that is not among ``cuts``: every tensor rank would
        add it."""
        experts = [name for name, style in self._styles.items() if style == "moe_tp_experts"]
        for name in experts:
            for leaf, _ in self._model.get_submodule(name).named_parameters():
                if f"{name}.{leaf}" not in cuts and any(name.startswith(f"{region}.") for region in regions):
                    raise ModelError(f"the model's plan does not cut {name}.{leaf}, which tensor > 1 would add on each rank")


def _prove_partial_sums(model: Any, region: str, plan: TensorPlan, ranks: int) -> None:
    """Raise ModelError if the outputs of ``region`` with each rank's weights do not add up to its output with whole weights.

    Tested on one rank, with random hidden states, for ``ranks`` tensor ranks. A shared expert that is not cut would be added by
    every rank.
    """
    module = model.get_submodule(region)
    own = {name: parameter for name, parameter in module.named_parameters() if f"{region}.{name}" in plan.cuts}
    first = next(module.parameters())
    x = torch.randn(1, TOKENS, model.config.get_text_config().hidden_size, generator=torch.Generator().manual_seed(0))
    x = x.to(first.device, first.dtype)
    total = torch.zeros_like(x)
    try:
        for rank in range(ranks):
            pieces = {name: cut_piece(parameter, plan.cuts[f"{region}.{name}"], ranks, rank) for name, parameter in own.items()}
            total += _first(torch.func.functional_call(module, pieces, (x,)))
        whole = _first(module(x))
    except Exception as error:
        raise ModelError(
            f"'{region}' cannot be proven to work on a part of its weights ({type(error).__name__}: {error}), which tensor > 1 "
            f"needs; use tensor=1"
        ) from error
    if not equal(total, whole):
        raise ModelError(
            f"'{region}' adds something that the model's plan does not cut (a shared expert), so that every tensor rank would "
            f"add it; use tensor=1 with ulysses or ring"
        )


def cut_piece(parameter: Tensor, cut: Cut, ranks: int, rank: int) -> Tensor:
    """The part of a whole ``parameter`` with which tensor rank ``rank`` of ``ranks`` computes, as a new tensor."""
    runs = cut.pieces(parameter.shape[cut.dim], ranks, rank)
    return torch.cat([parameter.detach().narrow(cut.dim, run.start, len(run)) for run in runs], cut.dim)


def _first(output: Any) -> Tensor:
    """The output of a module, or the first element of it if it is a tuple."""
    first: Tensor = output[0] if isinstance(output, tuple) else output
    return first


def _prove_reads(model: Any, plan: TensorPlan) -> None:
    """Raise ModelError if a forward of ``model`` reads a weight while no module of its region (or the one that owns it) runs.

    There the weight would be a DTensor. A test forward, in which all other weights are empty, shows it.
    """
    held = {module: dict(module.named_parameters(recurse=False)) for module in model.modules()}
    shown = shown_by(model, plan)
    handles = []
    for module, parts in shown.items():
        owners = tuple(parts.values())
        handles.append(module.register_forward_pre_hook(lambda _, args, owners=owners: _set(held, owners)))
        handles.append(module.register_forward_hook(lambda *_, owners=owners: _unset(held, owners), always_call=True))
    try:
        for module, own in held.items():
            for name, parameter in own.items():
                setattr(module, name, nn.Parameter(parameter.detach().new_empty(0), requires_grad=False))
        forward(model)
    except ModelError as error:
        raise ModelError(
            f"{type(model).__name__} reads weights outside of the modules that own them, where tensor > 1 has only a part of "
            f"each; use tensor=1 with ulysses or ring ({error})"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
        for module, own in held.items():
            _unset(held, [module])
            for name, parameter in own.items():
                setattr(module, name, parameter)


def _set(held: Mapping[nn.Module, Mapping[str, nn.Parameter]], owners: Iterable[nn.Module]) -> None:
    """Set the parameters that ``held`` has of each of the ``owners`` as plain attributes of it."""
    for owner in owners:
        vars(owner).update(held[owner])


def _unset(held: Mapping[nn.Module, Mapping[str, nn.Parameter]], owners: Iterable[nn.Module]) -> None:
    """Remove the attributes that ``_set`` has set on the ``owners``."""
    for owner in owners:
        for name in held[owner]:
            vars(owner).pop(name, None)
