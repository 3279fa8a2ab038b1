"""Bodies that measure one rank by the code of ``longspan rehearse``: in a fake world, or among real ranks."""

import contextlib
import io
from typing import Any

import torch.distributed as dist

from longspan.cli import model_source
from longspan.cli.main import main
from longspan.cli.rehearsal import Measured, measure_alone, measure_rank, mesh_of
from longspan.cli.rehearse import RehearseSettings
from longspan.distributed.fake_world import fake_world
from tests.helpers.settled import Settled


def rehearsed(settings: RehearseSettings, rank: int) -> Measured:
    """``rank`` of the settings' world, alone in this process."""
    dist.destroy_process_group()
    return measure_alone(settings, rank)


def real(settings: RehearseSettings) -> Measured:
    """This rank, with all others of its world; what gloo's threads free is waited for."""
    return measure_rank(settings, model_source.from_name(settings.model), mesh_of(settings, Settled()))


def command(*flags: str) -> tuple[int, str, str]:
    """``longspan rehearse`` in this process: (exit code, output, errors)."""
    dist.destroy_process_group()
    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        code = main(["rehearse", *flags])
    return code, out.getvalue(), errors.getvalue()


def in_fake_world(rank: int, world: int, body: Any, *args: Any) -> Any:
    """``body(*args)`` as ``rank`` of a world of which no other rank exists."""
    dist.destroy_process_group()
    with fake_world(rank, world):
        return body(*args)
