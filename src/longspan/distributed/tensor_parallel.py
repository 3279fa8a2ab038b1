"""Tensor parallel with sequence-parallel norms (Megatron-SP): heads and feed-forwards split over the tensor axis.

    x [B, my tokens, M]                                  norms: each rank its own tokens, parameters replicated
      | all-gather over tensor                           entry of a region: an attention or a feed-forward module
      v
    [B, gathered tokens, M]
      | weights cut by rows (column-parallel)            q, k, v, gate, up: each rank its own heads and hidden units
      | weight cut by columns (row-parallel)             out, down: each rank a partial sum of all hidden states
      v
    [B, gathered tokens, M], a partial sum
      | reduce-scatter over tensor, then the bias        exit of the region
      v
    [B, my tokens, M]

A parameter is a DTensor on the tensor mesh, cut (``Shard``) or replicated. Where its module uses it, it becomes a plain tensor,
whose gradient is finished at once (tensor_cuts.py). Embedding and head: by rows of the vocabulary (vocab_parallel.py).

Sees names of modules and parameters, and the number of tokens of each rank; knows nothing of models or batches. Source:
Megatron-LM's sequence parallelism, arXiv:2205.05198; tensor parallelism, arXiv:1909.08053.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from longspan import _compat
from longspan.distributed.collectives import all_gather, reduce_scatter
from longspan.distributed.mesh import ParallelMesh
from longspan.distributed.tensor_cuts import Cut, every_part, own_part
from longspan.distributed.vocab_parallel import EmbeddingRows, VocabularyRegion
from longspan.errors import LayoutError, ModelError

SIZES = "longspan_tensor_sizes"
"""The keyword of a block's call that holds the token counts of the tensor ranks; activation checkpointing passes it again."""


@dataclass(frozen=True, kw_only=True)
class TensorPlan:
    """Which modules and parameters of a model are tensor parallel, by their names in it; the model's adapter makes it.

    Attributes:
        regions: modules whose first input is gathered over the tensor ranks.
        exits: modules whose output is a partial sum that is reduce-scattered: a region, or a row-parallel module in it.
        cuts: parameters that are cut; every other parameter is replicated.
        late_biases: {exit: the name of its bias}, which is added once, after the reduce-scatter.
        embeddings: ``nn.Embedding`` modules whose table is cut by rows of the vocabulary.
        heads: ``nn.Linear`` modules that form logits, cut by rows of the vocabulary. While one runs, it has all rows.
        inputs: keywords of the model's call, [batch, my tokens], that attention reads: they are gathered at the call.
    """

    regions: tuple[str, ...]
    exits: tuple[str, ...]
    cuts: Mapping[str, Cut]
    late_biases: Mapping[str, str] = field(default_factory=dict)
    embeddings: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ("position_ids",)

    def within(self, model: nn.Module) -> "TensorPlan":
        """The part of the plan that concerns ``model``, a pipeline stage that lacks some of the modules and parameters."""
        modules = dict(model.named_modules())
        parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}  # a tied head has two names
        return replace(
            self,
            regions=tuple(name for name in self.regions if name in modules),
            exits=tuple(name for name in self.exits if name in modules),
            cuts={name: cut for name, cut in self.cuts.items() if name in parameters},
            late_biases={name: bias for name, bias in self.late_biases.items() if name in modules},
            embeddings=tuple(name for name in self.embeddings if isinstance(modules.get(name), nn.Embedding)),
            heads=tuple(name for name in self.heads if isinstance(modules.get(name), nn.Linear)),
        )


def refuse_plan(plan: TensorPlan, ranks: int) -> None:
    """Raise LayoutError, with the legal degrees, if a parameter of the plan cannot be divided over ``ranks`` tensor ranks."""
    if ranks == 1:
        return
    for name, cut in plan.cuts.items():
        if not cut.divides(ranks):
            most = max(cut.units for cut in plan.cuts.values() if not cut.uneven)
            legal = (degree for degree in range(1, most + 1) if all(other.divides(degree) for other in plan.cuts.values()))
            raise LayoutError(
                f"tensor={ranks} cannot divide {name!r}, which has {cut.units} heads or hidden units, into equal parts; legal "
                f"are {', '.join(map(str, legal))} (ulysses takes heads that do not divide)"
            )


class TensorParallel:
    """The tensor parallelism of one model: its cut parameters, and the hooks on its modules. ``parallelize`` makes it for
    tensor > 1.

    Args:
        model: the whole model, equal on every rank, or on the meta device. Its parameters become DTensors.
        blocks: its layers, which activation checkpointing may compute again.
        plan: what is cut.
        mesh: the ranks.
        sizes_of: called with the keywords of the model's call, returns for each tensor rank the tokens that it holds of a row.

    Raises:
        ModelError: in a forward, where a region is not given hidden states [batch, my tokens, hidden].
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[nn.Module],
        plan: TensorPlan,
        mesh: ParallelMesh,
        sizes_of: Callable[[Mapping[str, Any]], Sequence[int]],
    ) -> None:
        self._mesh, self._sizes_of, self._inputs = mesh, sizes_of, plan.inputs
        self._sizes: list[tuple[int, ...]] = []
        _distribute(model, plan, mesh)
        model.register_forward_pre_hook(self._enter_model, with_kwargs=True)
        model.register_forward_hook(self._leave_model, always_call=True)
        for block in blocks:
            block.register_forward_pre_hook(self._name_sizes, with_kwargs=True)
            vars(block)["forward"] = partial(self._hold, block.forward)
        for name in plan.regions:
            model.get_submodule(name).register_forward_pre_hook(partial(self._gather, name), with_kwargs=True)
        for module, uses in _uses(model, plan, mesh).items():
            module.register_forward_pre_hook(partial(_show, uses))
            module.register_forward_hook(partial(_hide, uses), always_call=True)
        for name in plan.embeddings:
            self._cut_embedding(name, model.get_submodule(name))
        for name in plan.exits:
            bias = plan.late_biases.get(name)
            added = None if bias is None else _Use(*_owner(model, bias), None, mesh)
            model.get_submodule(name).register_forward_hook(partial(self._scatter, name, added))

    def _cut_embedding(self, name: str, module: nn.Module) -> None:
        """Replace the forward of the embedding ``name``: it looks up this rank's rows for the tokens of all tensor ranks."""
        assert isinstance(module, nn.Embedding)
        rows, forward = EmbeddingRows(name, module), module.forward

        def look_up(*args: Any) -> Tensor:
            return rows.look_up(forward, args, VocabularyRegion(self._mesh, self._sizes_in_call(name)))

        vars(module)["forward"] = look_up

    def _sizes_in_call(self, name: str) -> tuple[int, ...]:
        """For each tensor rank, the tokens that it holds of a row in the call of the model that runs now.

        Raises:
            ModelError: none runs; ``name`` is the module that was called.
        """
        if not self._sizes:
            raise ModelError(
                f"'{name}' was called outside of a call of its model, where the tokens of the tensor ranks are not known; call "
                f"model(**shard_batch(batch, mesh)), or use tensor=1 with ulysses or ring"
            )
        return self._sizes[-1]

    def _enter_model(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Forward pre-hook of the model: note the tensor ranks' token counts, and gather the keywords of ``plan.inputs``."""
        sizes = tuple(self._sizes_of(kwargs))
        self._sizes.append(sizes)
        whole = {name: self._gathered(x, sizes) for name in self._inputs if isinstance(x := kwargs.get(name), Tensor)}
        for name, x in whole.items():
            vars(x).update(vars(kwargs[name]))  # facts of the whole row that the model's adapter has attached
        return args, kwargs | whole

    def _leave_model(self, *_: Any) -> None:
        """Forward hook of the model: forget the token counts of its call."""
        self._sizes.clear()

    def _name_sizes(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Forward pre-hook of a layer: add how many tokens each tensor rank has in this call, as the keyword ``SIZES``.

        A keyword, because activation checkpointing keeps the layer's arguments and computes it again with them.

        Returns:
            The arguments, and the keywords with that one.
        """
        if not self._sizes:
            raise ModelError(
                "a layer is computed again outside of a call of its model, where the tokens of the tensor ranks are not known; "
                "use MemoryOptions(recompute=...) of parallelize instead of the model's own gradient checkpointing"
            )
        return args, kwargs | {SIZES: self._sizes[-1]}

    def _hold(self, forward: Callable[..., Any], *args: Any, longspan_tensor_sizes: tuple[int, ...], **kwargs: Any) -> Any:
        """The forward of a layer, with the token counts that its keyword ``SIZES`` holds in effect while it runs."""
        self._sizes.append(longspan_tensor_sizes)
        try:
            return forward(*args, **kwargs)
        finally:
            self._sizes.pop()

    def _gather(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Forward pre-hook of the region ``name``: gather its hidden states over the tensor ranks.

        Raises:
            ModelError: its first argument (or ``hidden_states``) is not [batch, my tokens, hidden].
        """
        x = args[0] if args else kwargs.get("hidden_states")
        sizes, rank = self._sizes_in_call(name), self._mesh.tensor_group.rank()
        if not isinstance(x, Tensor) or x.ndim != 3 or x.shape[1] != sizes[rank]:
            shape = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ModelError(
                f"'{name}' was given {shape} instead of hidden states [batch, {sizes[rank]} tokens of this rank, hidden], "
                f"which tensor > 1 gathers there; use tensor=1 with ulysses or ring"
            )
        whole = self._gathered(x, sizes)
        return ((whole, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": whole})

    def _gathered(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        """``x`` [batch, my tokens, ...] of all tensor ranks, which hold ``sizes`` tokens of a row: [batch, tokens, ...]."""
        return all_gather(x, self._mesh.tensor_group, self._mesh.transport, 1, sizes).contiguous()

    def _scatter(self, name: str, bias: "_Use | None", module: nn.Module, args: Any, output: Any) -> Any:
        """Forward hook of the exit ``name``: reduce-scatter its output (or the first of a tuple) over the tensor ranks, then
        add ``bias``.

        ``bias`` None: the exit has none.
        """
        partial_sum: Tensor = output[0] if isinstance(output, tuple) else output
        sizes = self._sizes_in_call(name)
        mine = reduce_scatter(partial_sum, self._mesh.tensor_group, self._mesh.transport, 1, sizes).contiguous()
        if bias is not None:
            mine = mine + bias.local()
        return (mine, *output[1:]) if isinstance(output, tuple) else mine


def _distribute(model: nn.Module, plan: TensorPlan, mesh: ParallelMesh) -> None:
    """Replace every parameter of the model by a DTensor on the tensor mesh, in place.

    It is sharded if the plan cuts it into one even piece per rank, else replicated. A parameter that several modules share
    stays one parameter.
    """
    assert mesh.tensor_mesh is not None
    ranks, made = mesh.tensor_group.size(), dict[int, nn.Parameter]()
    for name, module in model.named_modules(remove_duplicate=False):
        for own, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in made:
                cut = plan.cuts.get(f"{name}.{own}" if name else own)
                placement = Shard(cut.dim) if cut is not None and cut.is_even(ranks) else Replicate()
                whole = distribute_tensor(parameter.detach(), mesh.tensor_mesh, [placement], src_data_rank=None)
                made[id(parameter)] = nn.Parameter(whole, requires_grad=parameter.requires_grad)
                made[id(made[id(parameter)])] = made[id(parameter)]
            setattr(module, own, made[id(parameter)])


@dataclass(frozen=True)
class _Use:
    """A parameter (a DTensor) as one module uses it.

    Attributes:
        module, name: the module, and the parameter's name in it.
        cut: how the parameter is divided; None: it is replicated.
        mesh: the ranks.
        is_late: it is a bias that is added after the reduce-scatter, so the module itself must not add it.
        is_head: the module forms logits: it computes with every row of a parameter that is cut by rows.
    """

    module: nn.Module
    name: str
    cut: Cut | None
    mesh: ParallelMesh
    is_late: bool = False
    is_head: bool = False

    def local(self) -> Tensor:
        """The plain tensor with which this rank computes: its pieces of a cut parameter, the whole of any other."""
        parameter = _compat.own_parameters(self.module)[self.name]
        assert parameter is not None
        if not isinstance(parameter, DTensor):  # the chunked loss has put this rank's rows of a head there
            return parameter
        if self.cut is not None and self.is_head:
            return every_part(parameter, self.cut, self.mesh)
        return own_part(parameter, self.cut, self.mesh)


def shown_by(model: nn.Module, plan: TensorPlan) -> dict[nn.Module, dict[str, nn.Module]]:
    """For each module with hooks, the modules whose parameters are plain tensors while its forward runs: {name: module}.

    For a region they are all modules in it; for any other module it is that module alone, with its own parameters.
    """
    shown, inside = dict[nn.Module, dict[str, nn.Module]](), set[nn.Module]()
    for name, module in model.named_modules():
        if module not in inside:
            parts = dict(module.named_modules()) if name in plan.regions else {"": module}
            inside |= set(parts.values())
            shown[module] = {".".join(filter(None, (name, below))): part for below, part in parts.items()}
    return shown


def _uses(model: nn.Module, plan: TensorPlan, mesh: ParallelMesh) -> dict[nn.Module, tuple[_Use, ...]]:
    """For each module that gets hooks, the parameters that are to be plain tensors during its forward; modules without any
    left out."""
    late, uses = set(plan.late_biases.values()), dict[nn.Module, tuple[_Use, ...]]()
    for module, parts in shown_by(model, plan).items():
        own = tuple(
            _Use(part, leaf, plan.cuts.get(full), mesh, full in late, name in plan.heads)
            for name, part in parts.items()
            for leaf, _ in part.named_parameters(recurse=False)
            for full in [f"{name}.{leaf}" if name else leaf]
        )
        if own:
            uses[module] = own
    return uses


def _show(uses: Sequence[_Use], *_: Any) -> None:
    """Forward pre-hook: set each parameter in ``uses`` on its module as the plain tensor with which this rank computes.

    ``_hide`` undoes it after the forward. A bias that is added after the reduce-scatter is None meanwhile.
    """
    for use in uses:
        vars(use.module)[use.name] = None if use.is_late else use.local()


def _hide(uses: Sequence[_Use], *_: Any) -> None:
    """Forward hook: remove what ``_show`` has set, so that the modules have their DTensors again."""
    for use in uses:
        vars(use.module).pop(use.name, None)


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that owns the parameter ``name`` of ``model``, and the parameter's name in it."""
    module, _, leaf = name.rpartition(".")
    return model.get_submodule(module), leaf
