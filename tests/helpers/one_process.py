"""A world of one process, which ends as it began: for tests that make a ``ParallelMesh`` in the process of pytest."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist


@contextmanager
def world_of_one() -> Iterator[None]:
    """Context manager: what a ``ParallelMesh`` inside it makes is gone after it."""
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
