"""Tiled execution of token-wise modules (feed-forwards, norms): one tile of tokens at a time, recomputed in the backward.

    x  [ tile 0 | tile 1 | tile 2 | .. ]   --module, without a graph-->   y  [ tile 0 | tile 1 | tile 2 | .. ]     kept: x
                                                                                 |
    dx [ tile 0 | tile 1 | tile 2 | .. ]   <--module again, its own graph--  dy <+      dw = the sum over tiles, in fp32

The intermediate results of a module (four times the hidden size in a feed-forward) exist for one tile only. Autograd gets one
complete gradient per parameter, however many tiles this rank has, so FSDP2, DDP and plain PyTorch work as with the untiled
module. Independent of ranks and models. Source: tiled MLP, Arctic Long Sequence Training, arXiv:2506.13996.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from longspan.errors import ModelError
from longspan.kernels.protocol import accumulation_dtype

Module = TypeVar("Module", bound=nn.Module)
Run = Callable[[Tensor, slice, Sequence[Tensor]], Tensor]
"""(tile of x [rows, ...], its rows as a slice of x, the parameters to use) -> result of the tile, with its rows in dim 0."""


def tiled(module: Module, tile_tokens: int) -> Module:
    """Change ``module`` in place so that it processes ``tile_tokens`` tokens at a time; ``untiled`` undoes it.

    Results and gradients are those of the untiled module. Its forward is computed again in the backward, and the gradients of
    its parameters are summed over tiles in fp32. Ranks may have unequally many tiles.

    Args:
        module: a module that takes one tensor [..., tokens, dim], returns one, computes each token independently of the others,
            and does not change its input in place.
        tile_tokens: tokens of a tile, at least 1.

    Returns:
        The module, the same object.

    Raises:
        ModelError: the module contains a mixture of experts, whose router must see all tokens at once, or has a replaced
            forward; at a call, it takes or returns something other than one tensor.
    """
    refuse_to_tile(module, tile_tokens)
    vars(module)["forward"] = partial(_forward, module, tile_tokens)
    return module


def refuse_to_tile(module: nn.Module, tile_tokens: int) -> None:
    """Raise ModelError if ``module`` cannot be tiled into ``tile_tokens`` tokens; otherwise return. Nothing is changed.

    That is: fewer than 1 token, a mixture of experts in the module, or a forward that was replaced.
    """
    if tile_tokens < 1:
        raise ModelError(f"tiles of {tile_tokens} tokens are not possible; use at least 1")
    if "forward" in vars(module):
        raise ModelError(
            f"{type(module).__name__} has a forward that was replaced on the instance (by another library, or tiled before), "
            f"which tiles would not call; undo it first (untiled(module), where it is tiled), or tile before that library"
        )
    if routes_to_experts(module):
        raise ModelError(
            f"{type(module).__name__} routes tokens to experts: its balance loss wants the routes of all tokens at once, so it "
            f"cannot be tiled; tile the feed-forwards beside it"
        )


def routes_to_experts(module: nn.Module) -> bool:
    """Whether ``module`` contains a mixture of experts.

    A module counts as one if it or a submodule has an attribute ``experts`` or a class with "Router" in its name.
    """
    return any("Router" in type(part).__name__ or hasattr(part, "experts") for part in module.modules())


def untiled(module: Module) -> Module:
    """Undo ``tiled`` in place: ``module`` processes all its tokens at once again. A module that is not tiled is left as it is.

    Returns:
        The module, the same object.
    """
    vars(module).pop("forward", None)
    return module


def tile_by_tile(run: Run, x: Tensor, tokens: int, parameters: Sequence[Tensor]) -> Tensor:
    """The results of ``run`` for each tile of the rows of ``x``, concatenated; no intermediate result of it is saved.

    The chunked loss computes the logits of a tile so. Differentiable: the backward runs each tile again.

    Args:
        run: called as ``run(tile, rows, parameters)`` with ``rows`` the slice of x that the tile is; for each tile once in the
            forward without a graph, and once more with a graph in the backward.
        x: [..., dim]; its rows are those of ``x.reshape(-1, dim)``.
        tokens: rows of a tile.
        parameters: tensors that ``run`` gets and in which the result is differentiable, as it is in ``x``.

    Returns:
        The results of the tiles, concatenated along dim 0.
    """
    out: Tensor = _in_tiles(run, x, tokens, None, parameters)
    return out


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _in_tiles(run: Run, x: Tensor, tokens: int, lead: torch.Size | None, parameters: Sequence[Tensor]) -> Tensor:
    """The results of ``run`` for each tile of ``tokens`` rows of ``x``, concatenated; differentiable.

    Args:
        run: called as ``run(tile, rows, parameters)`` with ``rows`` the slice of x that the tile is.
        x: [..., dim].
        tokens: rows of a tile.
        lead: the shape to which dim 0 of the result is unflattened; None leaves one dim of all rows.
        parameters: tensors that ``run`` gets and in which the result is differentiable too.
    """
    saved, mark = _SaveInputs.apply(x, *parameters)  # type: ignore[no-untyped-call]
    out: Tensor = _Tiles.apply(run, tokens, lead, (mark,), saved, *parameters)  # type: ignore[no-untyped-call]
    return out


def _forward(module: nn.Module, tokens: int, x: Tensor, *more: Any, **named: Any) -> Tensor:
    """The forward of a tiled module: one tile of ``tokens`` tokens at a time.

    Raises:
        ModelError: it was called with anything but one tensor [..., tokens, dim], or returns something else.
    """
    if more or named or not isinstance(x, Tensor) or x.ndim < 2:
        raise ModelError(f"{type(module).__name__} is tiled: it takes one tensor [..., tokens, dim]; use untiled(module)")
    held = {f"module.{name}": parameter for name, parameter in module.named_parameters()}
    own = _Own(module)

    def run(tile: Tensor, rows: slice, parameters: Sequence[Tensor]) -> Tensor:
        out = functional_call(own, dict(zip(held, parameters)), (tile.unsqueeze(0),))
        if not isinstance(out, Tensor) or out.shape[:2] != (1, len(tile)):
            raise ModelError(f"{type(module).__name__} cannot be tiled: it does not give one tensor with a row for each token")
        return out.squeeze(0)

    if not x.numel():
        return own(x)  # type: ignore[no-any-return]
    out: Tensor = _in_tiles(run, x, tokens, x.shape[:-1], list(held.values()))
    return out


class _Own(nn.Module):
    """Runs ``module`` by the forward of its class, because the forward of the instance is the tiled one."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Any:
        return type(self.module).forward(self.module, x)


class _SaveInputs(torch.autograd.Function):
    """Autograd function that saves x and the parameters for the backward of ``_Tiles``, before the tiles are computed.

    A checkpoint stops its recomputation when the last saved tensor is there; with the inputs saved first, it does not compute
    the tiles. It returns x, and an empty tensor whose ``grad_fn`` is this node, because an integer x has no ``grad_fn``.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, *parameters)
        ctx.set_materialize_grads(False)
        return x.view_as(x), torch.empty(0)

    @staticmethod
    def backward(ctx: Any, dx: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        return dx, *(None for _ in ctx.needs_input_grad[1:])


class _Tiles(torch.autograd.Function):
    """Autograd function that runs each tile without a graph, and in the backward once more with one.

    Its argument ``marks`` is a tuple of the empty tensor that ``_SaveInputs`` returned, whose node has saved what the backward
    reads. The tensor keeps the node alive, and in a tuple it is no input that autograd wants a gradient for.
    """

    @staticmethod
    def forward(ctx: Any, run: Run, tokens: int, lead: torch.Size | None, marks: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        x_RM = x.reshape(-1, x.shape[-1])
        ctx.run, ctx.tiles = run, [slice(start, start + tokens) for start in range(0, len(x_RM), tokens)]
        ctx.autocast, ctx.random = _autocast_of(x), _Random(x.device)
        with ctx.autocast():
            outs = [run(x_RM[rows], rows, parameters) for rows in ctx.tiles]
        ctx.sizes, ctx.inner = [len(out) for out in outs], outs[0].ndim - 1
        ctx.marks = marks
        tail = outs[0].shape[1:]
        out = outs[0].new_empty(*(lead or (sum(ctx.sizes),)), *tail)  # FSDP2 wants no view of something else
        torch.cat(outs, out=out.view(-1, *tail))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
        x, *parameters = ctx.marks[0].grad_fn.saved_tensors
        # copies without hooks: the hooks of a parameter expect its whole gradient, not that of a tile
        leaves = [parameter.detach().requires_grad_(parameter.requires_grad) for parameter in parameters]
        trained = [leaf for leaf in leaves if leaf.requires_grad]
        sums: list[Tensor | None] = [None] * len(trained)
        x_RM, dout_RM = x.reshape(-1, x.shape[-1]), dout.reshape(sum(ctx.sizes), *dout.shape[dout.ndim - ctx.inner :])
        dx_RM = torch.zeros_like(x_RM) if x.requires_grad else None
        with ctx.random.again(), torch.enable_grad(), ctx.autocast():
            for rows, dtile in zip(ctx.tiles, dout_RM.split(ctx.sizes)):
                tile = x_RM[rows].detach().requires_grad_(x.requires_grad)
                out = ctx.run(tile, rows, leaves)
                inputs = [*([tile] if dx_RM is not None else []), *trained]
                grads = list(torch.autograd.grad(out, inputs, dtile, allow_unused=True))
                if dx_RM is not None and (of_tile := grads.pop(0)) is not None:
                    dx_RM[rows] = of_tile
                sums = [_sum(total, grad) for total, grad in zip(sums, grads)]
        found = iter(sums)
        each = ((next(found), leaf.dtype) if leaf.requires_grad else (None, leaf.dtype) for leaf in leaves)
        dx = None if dx_RM is None else dx_RM.view(x.shape)
        return None, None, None, None, dx, *(None if total is None else total.to(dtype) for total, dtype in each)


def _sum(total: Tensor | None, grad: Tensor | None) -> Tensor | None:
    """``total`` plus ``grad`` in fp32 (fp64 for fp64), in place; None stands for zero in either."""
    if grad is None:
        return total
    if total is None:
        return grad.to(accumulation_dtype(grad.dtype))
    return total.add_(grad)


def _autocast_of(x: Tensor) -> Callable[[], AbstractContextManager[Any]]:
    """A function that makes the context of the autocast state that now holds on the device of ``x``, for the backward."""
    kind = x.device.type
    # without the cache, which would reuse a weight that was cast without a graph where one with a graph is needed
    return partial(
        torch.autocast, kind, torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind), cache_enabled=False
    )


class _Random:
    """The state of the random number generators of the CPU and ``device`` when it is made, for a recomputation with dropout."""

    def __init__(self, device: torch.device) -> None:
        self.devices = [device] if device.type == "cuda" else []
        self.cpu = torch.get_rng_state()
        self.cuda = [torch.cuda.get_rng_state(device) for device in self.devices]

    @contextmanager
    def again(self) -> Iterator[None]:
        """Context manager: inside, the numbers that followed when this object was made are drawn again; on exit all is as
        before."""
        with torch.random.fork_rng(self.devices):
            torch.set_rng_state(self.cpu)
            for device, state in zip(self.devices, self.cuda):
                torch.cuda.set_rng_state(state, device)
            yield
