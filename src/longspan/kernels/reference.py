"""The reference kernel: dense attention computed in fp64 for every input dtype. Independent of tiles and fused operators.

Memory is heads x queries x keys, so it is meant for tests and small inputs.

The suffix of a tensor's name gives its dims: Q queries, K keys, H heads, D head dim.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from longspan.kernels.protocol import (
    BoundBias,
    Gradients,
    Need,
    Partial,
    accumulation_dtype,
    add_bias_gradients,
    bias_gradients,
)
from longspan.masks.bands import Band


def visible(bands: Sequence[Band], queries: int, keys: int, device: torch.device) -> Bool[Tensor, "queries keys"]:
    """The bands as a dense boolean mask on ``device``: True where some band lets query q (row) attend to key k (column)."""
    q = torch.arange(queries, device=device)[:, None]
    k = torch.arange(keys, device=device)
    seen = torch.zeros(queries, keys, dtype=torch.bool, device=device)
    for band in bands:
        rectangle = (q >= band.q_start) & (q < band.q_stop) & (k >= band.k_start) & (k < band.k_stop)
        seen |= rectangle & (k - q >= band.lo) & (k - q <= band.hi)
    return seen


class Reference:
    """Kernel "reference": softmax(softcap(scale * q @ k.T) + bias) @ v over the visible keys, as a dense matrix in fp64."""

    name = "reference"

    def lacks(self, need: Need) -> str | None:
        """Always None, because this kernel supports every attention. (Other kernels return the reason why they do not.)"""
        return None

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
        scores, _ = _scores(q, k, bands, scale, softcap, bias)
        lse = torch.logsumexp(scores, 2) if k.shape[0] else scores.new_full(scores.shape[:2], -torch.inf)
        out = torch.einsum("HQK,KHD->QHD", _weights(scores, lse), _heads(v, q))
        dtype = accumulation_dtype(q.dtype)
        return out.to(dtype), lse.to(dtype)

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
        scores, slope = _scores(q, k, bands, scale, softcap, bias)
        weights = _weights(scores, lse.double())
        dout, out = dout.double(), out.double()
        dweights = torch.einsum("QHD,KHD->HQK", dout, _heads(v, q))
        dscores = weights * (dweights - (dout * out).sum(2).T.unsqueeze(2))
        dbias = bias_gradients(bias)
        if bias is not None:
            with torch.enable_grad():
                added = bias(*_indices(q.shape[0], k.shape[0], q.device))
            add_bias_gradients(dbias, bias.parameters, added, dscores)
        dscores = dscores * slope * scale
        dq = torch.einsum("HQK,KHD->QHD", dscores, _heads(k, q))
        dk = torch.einsum("HQK,QHD->KHD", dscores, q.double())
        dv = torch.einsum("HQK,QHD->KHD", weights, dout)
        dtype, kv_heads, group = accumulation_dtype(q.dtype), k.shape[1], q.shape[1] // k.shape[1]
        dk, dv = (x.reshape(len(x), kv_heads, group, x.shape[2]).sum(2) for x in (dk, dv))
        return dq.to(dtype), dk.to(dtype), dv.to(dtype), dbias


def _heads(x_KHD: Tensor, q: Tensor) -> Tensor:
    """Keys or values [keys, kv_heads, dim] as fp64 [keys, heads, dim]: each kv head repeated for each query head that reads it.

    The number of query heads is taken from ``q`` [queries, heads, dim].
    """
    return x_KHD.double().repeat_interleave(q.shape[1] // x_KHD.shape[1], 1)


def _scores(
    q: Tensor, k: Tensor, bands: Sequence[Band], scale: float, softcap: float | None, bias: BoundBias | None
) -> tuple[Tensor, Tensor | float]:
    """The attention scores, and the derivative of the softcap at each of them.

    Args:
        q, k: [queries, heads, dim] and [keys, kv_heads, dim].
        bands: which of these keys each query sees.
        scale: the factor of the scores.
        softcap: c of c·tanh(s/c); None: no softcap.
        bias: added after the softcap; None: no bias.

    Returns:
        (scores, slope): fp64 scores [heads, queries, keys] after softcap and bias, -inf at keys that the bands hide; the
        derivative of the softcap, of the same shape, or 1.0 without a softcap.
    """
    scores: Tensor = torch.einsum("QHD,KHD->HQK", q.double(), _heads(k, q)) * scale
    slope: Tensor | float = 1.0
    if softcap is not None:
        tanh = torch.tanh(scores / softcap)
        scores, slope = softcap * tanh, 1 - tanh**2
    if bias is not None:
        with torch.no_grad():
            scores = scores + bias(*_indices(q.shape[0], k.shape[0], q.device))
    return scores.masked_fill(~visible(bands, q.shape[0], k.shape[0], q.device), -torch.inf), slope


def _weights(scores_HQK: Tensor, lse_HQ: Tensor) -> Tensor:
    """The attention probabilities exp(score - lse) [heads, queries, keys]; all 0 for a query that sees no key (lse = -inf)."""
    return torch.exp(scores_HQK - lse_HQ.masked_fill(lse_HQ == -torch.inf, 0).unsqueeze(2))


def _indices(queries: int, keys: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The indices 0, 1, 2, ... of all queries and of all keys, as two tensors on ``device``."""
    return torch.arange(queries, device=device), torch.arange(keys, device=device)
