"""``save_pretrained`` of a model whose parameters are sharded: it would write the shards of one rank, and is refused."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch.distributed.tensor import DTensor

from longspan.distributed.grad_norm import STAGES
from longspan.distributed.mesh import ParallelMesh
from longspan.errors import RunError
from longspan.hf.candidate import Candidate, Undo


@dataclass(frozen=True)
class Saving:
    """Replaces ``save_pretrained`` of a parallel model by one that refuses sharded parameters.

    Attributes:
        owners: the objects on which a user may call it: the model, its parts that can be saved, and peft's wrapper of it.
    """

    owners: tuple[Any, ...]

    def install(self, model: Any, mesh: ParallelMesh) -> Undo:
        """Replace ``save_pretrained`` of each owner by one that raises RunError where parameters are sharded.

        Returns:
            A function that undoes it.
        """
        for owner in self.owners:
            vars(owner)["save_pretrained"] = partial(_save, owner, owner.save_pretrained)

        def undo() -> None:
            for owner in self.owners:
                del vars(owner)["save_pretrained"]

        return undo


def probe(candidate: Candidate) -> Saving:
    """A Saving, which every model gets; whether parameters are sharded is checked when ``save_pretrained`` is called."""
    return Saving(tuple(module for module in candidate.called.modules() if callable(getattr(module, "save_pretrained", None))))


def _save(owner: Any, save: Callable[..., Any], *args: Any, **keywords: Any) -> Any:
    """Call ``save``, the ``save_pretrained`` of ``owner``, with the other arguments.

    Raises:
        RunError: ``owner`` has sharded parameters or one pipeline stage, and no ``state_dict`` of whole tensors is given.
    """
    state_dict = keywords.get("state_dict", args[2] if len(args) > 2 else None)
    if state_dict is None and STAGES in vars(owner):
        raise RunError(
            "save_pretrained would write the layers of one pipeline stage; call longspan.hf.save(model, folder, mesh) on every "
            "rank, which writes the files of the whole model"
        )
    if state_dict is None and any(isinstance(parameter, DTensor) for parameter in owner.parameters()):
        raise RunError(
            "save_pretrained would write the shards of one rank, because zero=2 or 3, or tensor > 1, shards the parameters; "
            "call longspan.hf.save(model, folder, mesh) on every rank, which writes the same files, or pass a whole state_dict="
        )
    return save(*args, **keywords)
