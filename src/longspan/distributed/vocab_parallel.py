"""Vocabulary parallel: the embedding table and the output head, cut by rows of the vocabulary over the tensor axis.

    embedding   ids [B, my tokens] --all-gather--> [B, gathered tokens] --look up my rows, 0 for other ids--> a partial sum
                --reduce-scatter--> [B, my tokens, M]
    loss        hidden [B, my tokens, M], labels --all-gather--> gathered tokens --my rows of the head--> my part of the logits
                --log-sum-exp and the label's logit, for each token--all-to-all--> of my tokens from all ranks, combined
    logits      the head's rows are gathered; each rank forms the whole logits of its own tokens

Outside of these a rank holds its own tokens, as everywhere on the tensor axis. A rank's loss is that of its own tokens; the
all-to-all has an all-to-all as its adjoint. A tied weight is one tensor, which is cut once. A vocabulary that the tensor degree
does not divide is stored whole on each rank, which computes with its own rows. Sees ids, hidden states and numbers of tokens;
knows nothing of models or batches. Source: arXiv:1909.08053.

    B rows   N gathered tokens   S my tokens   M hidden   T tensor ranks   K terms of a token's loss
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from longspan.distributed.collectives import all_gather, reduce_scatter
from longspan.distributed.mesh import ParallelMesh
from longspan.distributed.tensor_cuts import Cut
from longspan.errors import ModelError


def vocabulary_cut(rows: int) -> Cut:
    """How an embedding table or a head with ``rows`` rows is cut over the tensor ranks."""
    return Cut(dim=0, units=rows, uneven=True)


def is_on_tensor_axis(parameter: Tensor, mesh: ParallelMesh | None) -> bool:
    """Whether ``parameter`` is a DTensor on the tensor axis of ``mesh`` and on no other (FSDP2 has gathered its shards)."""
    if mesh is None or mesh.coordinate.tensor == 1 or not isinstance(parameter, DTensor):
        return False
    return bool(parameter.device_mesh.ndim == 1 and parameter.device_mesh == mesh.tensor_mesh)


@dataclass(frozen=True)
class VocabularyRegion:
    """The exchanges of one call in which each tensor rank computes with its own rows of the vocabulary, for all their tokens.

    Attributes:
        mesh: the ranks.
        sizes: for each tensor rank, the tokens that it holds of a row.
    """

    mesh: ParallelMesh
    sizes: Sequence[int]

    @property
    def my_tokens(self) -> int:
        """The tokens of a row that this rank holds."""
        return self.sizes[self.mesh.tensor_group.rank()]

    def first_row(self, vocab: int) -> int:
        """The row of a vocabulary of ``vocab`` entries at which those of this rank begin."""
        group = self.mesh.tensor_group
        return vocabulary_cut(vocab).pieces(vocab, group.size(), group.rank())[0].start

    def gathered(self, x: Tensor) -> Tensor:
        """``x`` [B, my tokens, ...] of all tensor ranks, concatenated over tokens: [B, gathered tokens, ...]."""
        return all_gather(x, self.mesh.tensor_group, self.mesh.transport, 1, self.sizes).contiguous()

    def of_my_tokens(self, terms_KBN: Float[Tensor, "terms rows gathered"]) -> Float[Tensor, "terms rows my_tokens"]:
        """The terms of this rank's tokens over the whole vocabulary, from those that each rank has over its own rows.

        Differentiable.

        Args:
            terms_KBN: for each gathered token the log-sum-exp of this rank's logits, the label's logit (0 on the ranks that do
                not have its row) and what else is summed.

        Returns:
            The log-sum-exp over all ranks' logits, and the sums of the other terms.
        """
        terms_TKBS: Tensor = _ToOwners.apply(terms_KBN, self)  # type: ignore[no-untyped-call]
        return torch.cat([terms_TKBS[:, :1].logsumexp(0), terms_TKBS[:, 1:].sum(0)])


class _ToOwners(torch.autograd.Function):
    """Autograd function: each rank sends its terms of a token to the rank that holds the token; the backward sends back."""

    @staticmethod
    def forward(ctx: Any, terms_KBN: Tensor, region: VocabularyRegion) -> Tensor:
        ctx.region, group = region, region.mesh.tensor_group
        row, mine = terms_KBN.shape[:2].numel(), region.my_tokens
        send = torch.cat([piece.reshape(-1) for piece in terms_KBN.split(list(region.sizes), 2)])
        splits = [row * size for size in region.sizes]
        received = region.mesh.transport.all_to_all(send, splits, [row * mine] * group.size(), group).wait()
        return received.view(group.size(), *terms_KBN.shape[:2], mine)

    @staticmethod
    def backward(ctx: Any, grad_TKBS: Tensor) -> tuple[Tensor, None]:
        region: VocabularyRegion = ctx.region
        shape, group = grad_TKBS.shape[1:3], region.mesh.tensor_group
        splits = [shape.numel() * size for size in region.sizes]
        mine = [shape.numel() * region.my_tokens] * group.size()
        received = region.mesh.transport.all_to_all(grad_TKBS.reshape(-1).contiguous(), mine, splits, group).wait()
        pieces = [piece.view(*shape, size) for piece, size in zip(received.split(splits), region.sizes)]
        return torch.cat(pieces, 2), None


class EmbeddingRows:
    """The forward of an embedding that looks up the rows of this rank, for the tokens of all tensor ranks.

    It takes the place of the module's own forward, so that hooks of the user see this rank's ids and embeddings, as elsewhere.

    Args:
        name: of the module, for messages.
        module: its ``weight`` is the whole table now, and this rank's rows while it runs.
    """

    def __init__(self, name: str, module: nn.Embedding) -> None:
        self._name, self._module = name, module
        self._padding, self._vocab = module.padding_idx, len(module.weight)

    def look_up(self, forward: Callable[..., Tensor], args: tuple[Any, ...], region: VocabularyRegion) -> Tensor:
        """The embeddings [B, my tokens, M] of this rank's tokens, by the module's own ``forward`` over this rank's rows.

        Raises:
            ModelError: the first of ``args`` is not the ids of this rank's tokens.
        """
        ids = args[0] if args else None
        if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.shape[1] != region.my_tokens:
            shape = list(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
            raise ModelError(
                f"'{self._name}' was given {shape} instead of ids [batch, {region.my_tokens} tokens of this rank], which "
                f"tensor > 1 gathers there; use tensor=1 with ulysses or ring"
            )
        module, first = self._module, region.first_row(self._vocab)
        rows, is_mine, module.padding_idx = self.rows(region.gathered(ids), len(module.weight), first)
        try:
            found = forward(rows, *args[1:])
        finally:
            module.padding_idx = self._padding
        partial_sum, mesh = found.masked_fill(~is_mine[..., None], 0), region.mesh
        return reduce_scatter(partial_sum, mesh.tensor_group, mesh.transport, 1, region.sizes).contiguous()

    def rows(self, ids: Int[Tensor, "*tokens"], held: int, first: int) -> tuple[Int[Tensor, "*tokens"], Tensor, int | None]:
        """Where ids lie in the ``held`` rows of the table that begin at row ``first``.

        Returns:
            (the row of each id, 0 for one that is not there; whether it is there; the row of the padding id, or None).
        """
        is_mine = (ids >= first) & (ids < first + held)
        padding = None if self._padding is None or not 0 <= self._padding - first < held else self._padding - first
        return (ids - first).where(is_mine, 0), is_mine, padding
