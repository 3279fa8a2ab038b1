"""An attention of Transformers' registry as a kernel, by its name (kernel="hf:sdpa"): on my heads of every token.

    rows      d d d d e e . . f f f f f        R rows of the batch behind one another, as a kernel gets them with their bands
    blocks    [d d d d][e e]   [f f f f f]     rows that see only one another: a document, a row of the batch without padding
              function(module, q, k, v, mask, scaling=, ...)      once a block, [1, my heads, rows of the block, dim]

A block that is causal, full or a window is described by keywords; any other shape needs a mask of its rows x rows, which "sdpa"
and "eager" take as Transformers builds them, and flash attention does not. The function is given a view of the layer's module:
its sinks are those of my heads, and any other tensor of it, which has every head, is refused. Such a function returns no
log-sum-exp: it runs once more for the gradients, and its parts cannot be merged over a ring.

Independent of ranks. R rows of a block   G my heads   D head dim
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from longspan.distributed.coordinate import MeshCoordinate
from longspan.distributed.mesh import ParallelMesh
from longspan.errors import KernelError
from longspan.hf._compat import (
    ALL_ATTENTION_FUNCTIONS,
    eager_mask,
    flash_attention_mask,
    mask_functions,
    sdpa_mask,
    set_attention_name,
)
from longspan.hf.attention_layers import AttentionLayers
from longspan.hf.candidate import Candidate, Undo
from longspan.hf.names import SINK_PARAMETERS
from longspan.kernels.protocol import BoundBias
from longspan.masks.bands import Band, rectangle
from longspan.masks.constructors import Causal, Full, Mask, Window

PREFIX = "hf:"
"""Distinguishes names of the registry from longspan's own: both have an "sdpa"."""
TAKES = {sdpa_mask: "booleans", eager_mask: "numbers", flash_attention_mask: "nothing", None: "nothing"}
"""What an attention takes as its mask, by the mask function that Transformers has registered under the same name."""


@dataclass(frozen=True)
class RegistryKernels:
    """The kernels of an attention of Transformers' registry, which the user asked for by ``kernel="hf:..."``.

    Attributes:
        kernels: (attention module, its kernel), one for each attention module.
    """

    kernels: tuple[tuple[Any, "Registered"], ...]

    def install(self, model: Any, mesh: ParallelMesh) -> Undo:
        """Make each attention module use its kernel.

        Returns:
            A function that does nothing: the undo of ``AttentionLayers``, on whose Layers the kernels are, removes them.
        """
        for module, kernel in self.kernels:
            layer = module._longspan_layer
            module._longspan_layer = layer._replace(attend=partial(kernel.attend, by=layer.attend))
        return lambda: None


def probe(candidate: Candidate) -> RegistryKernels | None:
    """The kernels for ``kernel="hf:..."``; None for any other kernel, and for a model without attention.

    Raises:
        KernelError: a layer cannot use this kernel, or the model has cross-attention.
    """
    kernel, found = candidate.kernel, candidate.finding(AttentionLayers)
    if not isinstance(kernel, str) or not kernel.startswith(PREFIX) or found is None:
        return None
    if any(layer.crosses for _, layer in found.layers):
        raise KernelError(f"kernel={kernel!r} attends within one row of tokens, an encoder-decoder has two; use kernel='auto'")
    return RegistryKernels(tuple((module, Registered(kernel, module, layer.name, layer.own)) for module, layer in found.layers))


def refuse_name(kernel: str, model: PreTrainedModel, coordinate: MeshCoordinate) -> None:
    """Raise KernelError if the attention ``kernel`` ("hf:" and a name) of Transformers' registry cannot be used; otherwise
    return.

    Refused: a name that is not in Transformers' registry, one that the model cannot use, and any name on a mesh whose ring has
    several ranks, because these functions return no log-sum-exp.
    """
    legal = _names()
    name = kernel.removeprefix(PREFIX)
    if name not in legal:
        raise KernelError(
            f"kernel={kernel!r} is no attention of Transformers' registry that longspan can call; use "
            f"{', '.join(repr(PREFIX + each) for each in legal)}, or one of longspan's own: 'auto', 'flex'"
        )
    if coordinate.ring > 1:
        raise KernelError(
            f"kernel={kernel!r} returns only its output, which cannot carry a ring; use ring=1, or one of longspan's own: "
            f"kernel='auto'"
        )
    try:
        model.get_correct_attn_implementation(name)
    except (ValueError, ImportError) as error:
        raise KernelError(f"kernel={kernel!r} cannot be used by {type(model).__name__}: {error}") from error


def _names() -> list[str]:
    """The names of all attention functions in Transformers' registry that can be asked for."""
    known = ["eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()]
    return [name for name in known if mask_functions().get(name) in TAKES and not name.startswith("paged|")]


class Registered:
    """A Kernel that calls an attention function of Transformers' registry for one layer.

    The function gives no log-sum-exp, so the one that ``forward`` returns is all zeros and must not be used.

    Args:
        kernel: "hf:" and the function's name in the registry.
        module: the attention module.
        layer: the module's name in messages.
        own: the layer's mask.

    Raises:
        KernelError: the model's own file has no such function, or the function takes no mask and the layer needs one.
    """

    def __init__(self, kernel: str, module: nn.Module, layer: str, own: Mask) -> None:
        self.name, self.module, self.layer = kernel, module, layer
        name = kernel.removeprefix(PREFIX)
        self.takes = TAKES[mask_functions().get(name)]
        function = _function(module, name)
        if function is None:
            raise KernelError(f"kernel={kernel!r} means the modeling file's own, and that of {layer} has none; use 'auto'")
        self.function = function
        if self.takes == "nothing" and not isinstance(own, Full | Causal | Window):
            raise KernelError(_not_expressible(kernel, f"the mask {own} of {layer}"))
        self.config = deepcopy(getattr(module, "config", None))
        if self.config is not None:
            set_attention_name(self.config, name)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, by: Callable[..., Tensor],
        softcap: float | None = None, sink_logits: Tensor | None = None, bias: Any = None, **more: Any,
    ) -> Tensor:  # fmt: skip
        """Attention over a mesh with this kernel: call ``by``, which is ``longspan.attend`` with the mesh bound.

        ``sink_logits`` reach the kernel as a bias, which computes their gradients; it adds nothing to the scores.

        Args:
            q, k, v: this rank's tokens, [batch, my tokens, heads, dim].
            by: the attention to call.
            softcap: c turns a score s into c·tanh(s/c); None: no softcap.
            sink_logits: one logit per query head, [heads], or None.
            bias: must be None.
            more: further keywords of ``attend``.

        Returns:
            [batch, my tokens, heads, v_dim].

        Raises:
            KernelError: the layer has a bias, or a softcap or sinks that this function cannot compute.
        """
        if bias is not None:
            raise KernelError(
                f"kernel={self.name!r} cannot carry the bias of {self.layer}, which is evaluated a tile at a time; use 'auto'"
            )
        for what, value in {"softcap": softcap, "sink_logits": sink_logits}.items():
            if value is not None and self.takes == "booleans":
                raise KernelError(
                    f"kernel={self.name!r} cannot carry {what}, which {self.layer} asks for; use 'hf:eager' or 'auto'"
                )
        out: Tensor = by(
            q, k, v, kernel=self, softcap=softcap, bias=None if sink_logits is None else _Sinks(sink_logits), **more
        )
        return out

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, bands: Sequence[Band], scale: float,
        *, softcap: float | None = None, bias: BoundBias | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        out = q.new_zeros(*q.shape[:2], v.shape[2])
        with torch.no_grad():
            for block in _blocks(bands):
                rows = slice(block.start, block.stop)
                out[rows] = self._call(q[rows], k[rows], v[rows], block, scale, softcap, bias)
        return out, out.new_zeros(q.shape[1], q.shape[0], dtype=torch.promote_types(q.dtype, torch.float32))

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, bands: Sequence[Band], scale: float,
        *, softcap: float | None = None, bias: BoundBias | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:  # fmt: skip
        parameters = [] if bias is None else list(bias.parameters)
        dqkv = [torch.zeros_like(x) for x in (q, k, v)]
        dparameters = [torch.zeros_like(parameter) for parameter in parameters]
        for block in _blocks(bands):
            rows = slice(block.start, block.stop)
            with torch.enable_grad():
                mine = [x[rows].detach().requires_grad_() for x in (q, k, v)]
                part = self._call(mine[0], mine[1], mine[2], block, scale, softcap, bias)
                found = torch.autograd.grad(part, [*mine, *parameters], dout[rows].to(part.dtype))
            for total, grad in zip((*(dx[rows] for dx in dqkv), *dparameters), found):
                total += grad
        return dqkv[0], dqkv[1], dqkv[2], dparameters

    def _call(
        self, q_RGD: Tensor, k_RGD: Tensor, v_RGD: Tensor, block: "_Block", scale: float, softcap: float | None,
        bias: BoundBias | None,
    ) -> Tensor:  # fmt: skip
        """The output [rows, my heads, v_dim] of Transformers' attention function for the tokens of one block.

        Args:
            q_RGD, k_RGD, v_RGD: of the block's rows and this rank's heads.
            block: the block, which has its mask.
            scale, softcap: of the scores; None: no softcap.
            bias: gives the layer's sinks; None: it has none.
        """
        zero = torch.zeros(1, dtype=torch.long, device=q_RGD.device)
        sinks = None if bias is None else bias(zero, zero).flatten()
        keywords, mask, blind = block.keywords(), None, None
        if not self._needs_no_mask(keywords):
            mask, blind = block.mask(q_RGD.device)
            keywords = {}  # the mask expresses all of it
        if mask is not None and self.takes == "numbers":
            mask = torch.zeros_like(mask, dtype=q_RGD.dtype).masked_fill(~mask, torch.finfo(q_RGD.dtype).min)
        beside = {name: value for name, value in {"softcap": softcap, "s_aux": sinks}.items() if value is not None}
        layer = _LayerView(self, q_RGD.shape[1] // k_RGD.shape[1], sinks)
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q_RGD, k_RGD, v_RGD))
        out: Tensor = self.function(layer, q, k, v, mask, dropout=0.0, scaling=scale, **(keywords or {}), **beside)[0][0]
        return out if blind is None else out.masked_fill(blind[:, None, None], 0.0)

    def _needs_no_mask(self, keywords: dict[str, Any] | None) -> bool:
        """Whether the function shows the mask of a block by ``keywords`` alone (None: no keywords express it), so needs no
        tensor.

        Raises:
            KernelError: it needs one, and the function takes no mask.
        """
        if self.takes == "nothing":
            if keywords is None:
                raise KernelError(_not_expressible(self.name, f"the mask of this step in {self.layer}"))
            return True
        causal_is_free = self.takes == "booleans"
        return keywords is not None and "sliding_window" not in keywords and (causal_is_free or not keywords["is_causal"])


class _Sinks:
    """Passes a layer's sinks to the kernel as a bias, because the attention operator computes gradients of a bias' parameters.

    Called for a range of heads it returns their sinks [heads, 1, 1], which the kernel does not add to scores.
    """

    def __init__(self, sinks: Tensor) -> None:
        self.parameters = (sinks,)

    def __call__(self, heads: range, q_positions: Tensor, k_positions: Tensor, parameters: tuple[Tensor, ...]) -> Tensor:
        return parameters[0][heads.start : heads.stop].view(-1, 1, 1)


class _LayerView:
    """Replaces the attention module as the first argument of the registry's function: its sinks are those of this rank's heads.

    Any other tensor of the module, which has every head, raises KernelError when it is read.

    Args:
        kernel: the kernel of the module.
        groups: query heads for each key/value head.
        sinks: the sinks of this rank's heads, or None.
    """

    def __init__(self, kernel: Registered, groups: int, sinks: Tensor | None) -> None:
        self._kernel, self._sinks = kernel, sinks
        self.config, self.num_key_value_groups = kernel.config, groups

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._kernel.module, name)
        if not isinstance(value, Tensor):
            return value
        if name in SINK_PARAMETERS and self._sinks is not None:
            return self._sinks
        raise KernelError(
            f"kernel={self._kernel.name!r} reads {name} of {self._kernel.layer}, which has every head; use kernel='auto'"
        )


class _Block(NamedTuple):
    """Tokens that see only one another, for which the registry's function is called once.

    Attributes:
        start, stop: they are the tokens ``start`` to ``stop - 1``.
        bands: their mask, as bands.
    """

    start: int
    stop: int
    bands: tuple[Band, ...]

    def keywords(self) -> dict[str, Any] | None:
        """The keywords ``is_causal`` and ``sliding_window`` by which a registry function shows these bands without a mask.

        None if they cannot express the bands.
        """
        if len(self.bands) > 1:
            return None
        whole, band = rectangle(self.start, self.stop, self.start, self.stop), self.bands[0]
        if band == whole:
            return {"is_causal": False}
        if whole is None or band[:4] != whole[:4] or band.hi not in (0, -band.lo):
            return None
        window = {} if band.lo == whole.lo else {"sliding_window": 1 - band.lo}
        return {"is_causal": band.hi == 0} | window

    def mask(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The block's mask as boolean tensors, for a function that takes a mask.

        Returns:
            (mask [1, 1, rows, rows], True where a row sees a key; blind [rows], True for a row that sees no key). In the mask
            such a row sees itself.
        """
        rows = self.stop - self.start
        sees = torch.zeros(rows, rows, dtype=torch.bool, device=device)
        at = torch.arange(self.start, self.stop, device=device)
        for q_start, q_stop, k_start, k_stop, lo, hi in self.bands:
            q, k = slice(q_start - self.start, q_stop - self.start), slice(k_start - self.start, k_stop - self.start)
            apart = at[k] - at[q, None]
            sees[q, k] |= (apart >= lo) & (apart <= hi)
        blind = ~sees.any(1)
        return (sees | torch.diag(blind))[None, None], blind


def _blocks(bands: Sequence[Band]) -> Iterator[_Block]:
    """Yield the smallest blocks of tokens that see only one another, in order; a token that no band contains is in none."""
    block: _Block | None = None
    for band in sorted(bands, key=lambda band: min(band.q_start, band.k_start)):
        start, stop = min(band.q_start, band.k_start), max(band.q_stop, band.k_stop)
        if block is None or start >= block.stop:
            if block is not None:
                yield block
            block = _Block(start, stop, (band,))
        else:
            block = _Block(block.start, max(block.stop, stop), (*block.bands, band))
    if block is not None:
        yield block


def _function(module: nn.Module, name: str) -> Callable[..., Any] | None:
    """The attention function ``name`` of the registry that the module's modeling file uses; for "eager" the file's own
    function.

    None if there is none.
    """
    files = [vars(sys.modules[kind.__module__]) for kind in type(module).__mro__ if kind.__module__ in sys.modules]
    own = next((file for file in files if "ALL_ATTENTION_FUNCTIONS" in file), {})
    registry = own.get("ALL_ATTENTION_FUNCTIONS", ALL_ATTENTION_FUNCTIONS)
    found: Callable[..., Any] | None = registry.get(name, own.get("eager_attention_forward") if name == "eager" else None)
    return found


def _not_expressible(kernel: str, what: str) -> str:
    """The text of the error of a kernel that takes no mask and cannot express ``what``."""
    return f"kernel={kernel!r} takes no mask and cannot express {what}; use 'hf:sdpa', 'hf:eager' or 'auto'"
