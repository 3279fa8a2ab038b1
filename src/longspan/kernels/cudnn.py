"""Kernel "cudnn": cuDNN's attention for calls without a window on CUDA, flash attention for the others. Never run on a GPU.

    bands --plan--> calls    full, or causal with as many queries as keys; documents of one length      cuDNN
                             windows, documents of several lengths, other alignments                    flash_cuda.py

Documents of one length are the batch dim of one dense call. cuDNN builds a plan for each shape at its first call, which takes
the host a while: this is for shapes that come again in every layer and step. Its causal mask is aligned at the top left.
"""

import math
import warnings
from collections.abc import Sequence
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from longspan import _compat
from longspan.errors import KernelError
from longspan.kernels import flash_cuda
from longspan.kernels.capability import lacks_ampere
from longspan.kernels.flash_calls import Call
from longspan.kernels.protocol import BoundBias, Gradients, Need, Partial, contiguous_last_dim
from longspan.masks.bands import Band

_forward_cuda, _backward_cuda = _compat.attention_operators("cudnn")

MOST_DIM = 128
"""The largest head dim that cuDNN's backward has for every GPU since Ampere."""


class Cudnn:
    """Kernel "cudnn": the operator that ``F.scaled_dot_product_attention`` calls under ``SDPBackend.CUDNN_ATTENTION``."""

    name = "cudnn"

    def lacks(self, need: Need) -> str | None:
        """The reason, as a sentence, why this kernel does not support the attention ``need``; None if it does."""
        if need.device_type != "cuda":
            return f"cuDNN's attention is for cuda, not {need.device_type}"
        if need.softcap or need.bias:
            return f"longspan calls cuDNN's attention without {'softcap' if need.softcap else 'bias'}"
        if need.dtype not in (torch.float16, torch.bfloat16):
            return f"cuDNN's attention takes fp16 and bf16, not {need.dtype}"
        if need.qk_dim != need.v_dim:
            return f"cuDNN's attention is called with equal query/key and value dims, not {need.qk_dim} and {need.v_dim}"
        if need.qk_dim % 8 or need.qk_dim > MOST_DIM:
            return f"cuDNN's attention takes head dims that are multiples of 8 up to {MOST_DIM}, not {need.qk_dim}"
        return lacks_ampere("cuDNN's attention", need.capability)

    def forward(
        self,
        q: Float[Tensor, "queries heads qk_dim"],
        k: Float[Tensor, "keys kv_heads qk_dim"],
        v: Float[Tensor, "keys kv_heads v_dim"],
        bands: Sequence[Band],
        scale: float,
        *,
        softcap: float | None = None,
        bias: BoundBias | None = None,
    ) -> Partial:
        _refuse(softcap, bias)
        q, k, v = (contiguous_last_dim(x) for x in (q, k, v))
        return flash_cuda.forward(q, k, v, bands, scale, OPERATORS)

    def backward(
        self,
        dout: Float[Tensor, "queries heads v_dim"],
        q: Float[Tensor, "queries heads qk_dim"],
        k: Float[Tensor, "keys kv_heads qk_dim"],
        v: Float[Tensor, "keys kv_heads v_dim"],
        out: Float[Tensor, "queries heads v_dim"],
        lse: Float[Tensor, "heads queries"],
        bands: Sequence[Band],
        scale: float,
        *,
        softcap: float | None = None,
        bias: BoundBias | None = None,
    ) -> Gradients:
        _refuse(softcap, bias)
        dout, q, k, v, out = (contiguous_last_dim(x) for x in (dout, q, k, v, out))
        return *flash_cuda.backward(dout, q, k, v, out, lse, bands, scale, OPERATORS), []


def _refuse(softcap: float | None, bias: BoundBias | None) -> None:
    """Raise KernelError if the attention has a softcap or a bias, which are None where it has none."""
    if softcap is not None or bias is not None:
        raise KernelError("kernel='cudnn' has neither softcap nor bias; use kernel='online' or 'auto'")


def _is_for_cudnn(call: Call) -> bool:
    """Whether a call is one that cuDNN computes.

    It refuses single queries and keys in training, and has no deterministic backward on every GPU.
    """
    rows, keys = call.lengths[0]
    if len(set(call.lengths)) > 1 or min(rows, keys) < 2 or torch.are_deterministic_algorithms_enabled():
        return False
    return call.left.limit is None and (call.right.limit is None or (call.right.limit == 0 and rows == keys))


def _forward(call: Call, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Partial:
    """``Operators.forward`` of flash_cuda.py, by cuDNN where it has the call."""
    if not _is_for_cudnn(call):
        return flash_cuda.FLASH.forward(call, q, k, v, scale)
    out, lse, *_ = _forward_cuda(
        *(_batched(call, x) for x in (q, k, v)), None, True, 0.0, call.right.limit == 0, False, scale=scale
    )
    return _tokens_first(out), lse.reshape(len(call.lengths), q.shape[1], -1).transpose(0, 1).flatten(1)


def _backward(
    call: Call, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``Operators.backward`` of flash_cuda.py, by cuDNN where it has the call."""
    if not _is_for_cudnn(call):
        return flash_cuda.FLASH.backward(call, dout, q, k, v, out, lse, scale)
    documents, (rows, keys) = len(call.lengths), call.lengths[0]
    own_lse = lse.unflatten(1, (documents, rows)).transpose(0, 1).unsqueeze(3).contiguous()
    dq, dk, dv = _backward_cuda(
        *(_batched(call, x) for x in (dout, q, k, v, out)), own_lse, None, None, None, None, None, rows, keys, 0.0,
        call.right.limit == 0, scale=scale,
    )  # fmt: skip
    return _tokens_first(dq), _tokens_first(dk), _tokens_first(dv)


def _batched(call: Call, x_SHD: Tensor) -> Tensor:
    """A view [documents, heads, tokens of a document, dim] of ``x_SHD``, the tokens of the call's documents."""
    view: Tensor = x_SHD.unflatten(0, (len(call.lengths), -1)).transpose(1, 2)
    return view


def _tokens_first(x_BHSD: Tensor) -> Tensor:
    """``x_BHSD`` [documents, heads, tokens of a document, dim] as [tokens, heads, dim]."""
    return x_BHSD.transpose(1, 2).flatten(0, 1)


OPERATORS = flash_cuda.Operators(_forward, _backward)
"""cuDNN's operators for the calls that they have, and flash attention's for the others."""


@lru_cache(maxsize=1)
@torch.no_grad()
def agrees_with_flash_attention() -> bool:
    """Whether a small causal call on this process's GPU, forward and backward, gives what flash attention gives.

    It is tried once, and waits for the device. A call that fails, or gives something else, is a warning.
    """
    try:
        device = _device()
        q, k, v, dout = (
            torch.arange(heads * TRIED * TRIED_DIM, device=device).sin().view(TRIED, heads, -1).bfloat16()
            for heads in (2, 1, 1, 2)
        )
        bands, scale = (Band(0, TRIED, 0, TRIED, 1 - TRIED, 0),), TRIED_DIM**-0.5
        found, wanted = (_results((q, k, v, dout), bands, scale, each) for each in (OPERATORS, flash_cuda.FLASH))
        worst = max(float((a.float() - b.float()).norm() / b.float().norm()) for a, b in zip(found, wanted))
    except Exception as error:  # whatever a driver or a library of this machine answers
        worst, why = math.inf, f": {error}".splitlines()[0]
    else:
        why = f": results differ by {worst:.1e}"
    if worst > TRIED_TOLERANCE:
        warnings.warn(f"cuDNN's attention failed a trial on this GPU, so that kernel='auto' takes another{why}", stacklevel=2)
    return worst <= TRIED_TOLERANCE


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


TRIED, TRIED_DIM, TRIED_TOLERANCE = 256, 64, 0.02
"""Tokens, head dim and largest relative error in bf16 of the trial."""


def _results(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor], bands: Sequence[Band], scale: float, operators: flash_cuda.Operators
) -> list[Tensor]:
    q, k, v, dout = inputs
    out, lse = flash_cuda.forward(q, k, v, bands, scale, operators)
    return [out, lse, *flash_cuda.backward(dout, q, k, v, out, lse, bands, scale, operators)]
