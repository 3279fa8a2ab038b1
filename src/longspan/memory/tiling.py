"""Run what works token by token on a tile of tokens at a time, forward and again backward. Knows nothing of ranks or models.

    x  [ tile 0 | tile 1 | tile 2 | .. ]   --module, without a graph-->   y  [ tile 0 | tile 1 | tile 2 | .. ]     kept: x
                                                                                 |
    dx [ tile 0 | tile 1 | tile 2 | .. ]   <--module again, its own graph--  dy <+      dw = the sum over tiles, in fp32

What a module needs between its input and its output, four times the hidden size in a feed-forward, is there for one tile. The
gradient of a parameter leaves the operator once and whole, whatever number of tiles this rank has: to FSDP2, DDP and plain
PyTorch it is the module that it was. Source: tiled MLP, Arctic Long Sequence Training, arXiv:2506.13996.
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

Module = TypeVar("Module", bound=nn.Module)
Run = Callable[[Tensor, slice, Sequence[Tensor]], Tensor]
"""(x of a tile [rows, ...], which rows, the parameters to use) -> what the tile gives, its rows in dim 0."""


def tiled(module: Module, tile_tokens: int) -> Module:
    """Change ``module`` in place so that it works on ``tile_tokens`` tokens at a time, and return it; ``untiled`` undoes it.

    Equals the module, gradients included, for any that takes one tensor [..., tokens, dim] and gives one, each token by itself:
    a feed-forward. Its forward is computed again in the backward, and the gradients of its parameters are summed over tiles in
    fp32. Ranks may have unequally many tiles.

    The module may not change its input in place. Raises ModelError for a mixture of experts, whose router would be recorded a
    tile at a time; at a call, for a module that takes or gives something else.
    """
    refuse_to_tile(module, tile_tokens)
    vars(module)["forward"] = partial(_forward, module, tile_tokens)
    return module


def refuse_to_tile(module: nn.Module, tile_tokens: int) -> None:
    """Raise ModelError for what ``tiled`` cannot change so."""
    if tile_tokens < 1:
        raise ModelError(f"tiles of {tile_tokens} tokens are not possible; use at least 1")
    if "forward" in vars(module):
        raise ModelError(
            f"{type(module).__name__} has a forward of its own hung on it (by another library, or tiled before), which tiles "
            f"would pass by; undo it first (untiled(module), where it is tiled), or tile before that library"
        )
    if routes_to_experts(module):
        raise ModelError(
            f"{type(module).__name__} routes tokens to experts: its balance loss wants the routes of all tokens at once, so it "
            f"cannot be tiled; tile the feed-forwards beside it"
        )


def routes_to_experts(module: nn.Module) -> bool:
    """Whether it is, or has, a mixture of experts."""
    return any("Router" in type(part).__name__ or hasattr(part, "experts") for part in module.modules())


def untiled(module: Module) -> Module:
    """Undo ``tiled`` in place, and return the module."""
    vars(module).pop("forward", None)
    return module


def tile_by_tile(run: Run, x: Tensor, tokens: int, parameters: Sequence[Tensor]) -> Tensor:
    """What ``run`` gives for each tile of ``tokens`` of the rows of ``x`` [..., dim], one behind the other along dim 0.

    Differentiable in ``x`` and ``parameters``; ``run`` is called without a graph, then once more for each tile in the backward.
    """
    out: Tensor = _in_tiles(run, x, tokens, None, parameters)
    return out


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _in_tiles(run: Run, x: Tensor, tokens: int, lead: torch.Size | None, parameters: Sequence[Tensor]) -> Tensor:
    """With ``lead`` the shape of the results before their last dimension, which is (rows,) without."""
    kept, mark = _Kept.apply(x, *parameters)  # type: ignore[no-untyped-call]
    out: Tensor = _Tiles.apply(run, tokens, lead, mark.grad_fn, kept, *parameters)  # type: ignore[no-untyped-call]
    return out


def _forward(module: nn.Module, tokens: int, x: Tensor, *more: Any, **named: Any) -> Tensor:
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
    """A module with the forward of its class, beside the tiled one that hangs on it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Any:
        return type(self.module).forward(self.module, x)


class _Kept(torch.autograd.Function):
    """Keeps what the tiles' backward begins with, before the tiles are computed.

    A checkpoint ends its recomputation with the last tensor that was kept: kept behind them, they were computed for nothing.
    Gives x, and an empty tensor that has this node of the graph where x, of integers, has none.
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
    @staticmethod
    def forward(ctx: Any, run: Run, tokens: int, lead: torch.Size | None, kept: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        x_RM = x.reshape(-1, x.shape[-1])
        ctx.run, ctx.tiles = run, [slice(start, start + tokens) for start in range(0, len(x_RM), tokens)]
        ctx.autocast, ctx.random = _autocast_of(x), _Random(x.device)
        with ctx.autocast():
            outs = [run(x_RM[rows], rows, parameters) for rows in ctx.tiles]
        ctx.sizes, ctx.inner = [len(out) for out in outs], outs[0].ndim - 1
        ctx.kept = kept
        tail = outs[0].shape[1:]
        out = outs[0].new_empty(*(lead or (sum(ctx.sizes),)), *tail)  # FSDP2 wants no view of something else
        torch.cat(outs, out=out.view(-1, *tail))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
        x, *parameters = ctx.kept.saved_tensors
        # Copies without hooks: what hangs on a parameter waits for its whole gradient.
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
    if grad is None:
        return total
    if total is None:
        return grad.to(torch.promote_types(grad.dtype, torch.float32))
    return total.add_(grad)


def _autocast_of(x: Tensor) -> Callable[[], AbstractContextManager[Any]]:
    kind = x.device.type
    # Without the cache: a weight that was cast without a graph would be taken for one with a graph.
    return partial(
        torch.autocast, kind, torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind), cache_enabled=False
    )


class _Random:
    """The random numbers of a forward, to be drawn again."""

    def __init__(self, device: torch.device) -> None:
        self.devices = [device] if device.type == "cuda" else []
        self.cpu = torch.get_rng_state()
        self.cuda = [torch.cuda.get_rng_state(device) for device in self.devices]

    @contextmanager
    def again(self) -> Iterator[None]:
        with torch.random.fork_rng(self.devices):
            torch.set_rng_state(self.cpu)
            for device, state in zip(self.devices, self.cuda):
                torch.cuda.set_rng_state(state, device)
            yield
