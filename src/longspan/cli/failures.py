"""Which failure came first, found by the ranks themselves where a launcher started them, and printed by one of them.

    rank 1 is killed    ranks 0, 2, 3 lose the connection, and check in at the store    the first of them looks who did not
    rank 1 has a bug    it checks in first and prints the bug                           the others print nothing

Launchers differ in what they say of a failed rank, and none of them knows which lost connection has which cause. Where
longspan started the ranks itself, its agent (launch.py) knows it.
"""

import os
import re
import time
from contextlib import suppress
from datetime import timedelta
from typing import Any

from longspan.errors import LostRankError

GRACE_SECONDS = 5.0
"""How long the rank that prints waits for the others to check in, and the others for it to have printed."""
ATTEMPT = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
"""torchrun's store lives on when it starts ranks again; what they say of one attempt is apart from that of another."""
COUNT, PRINTED = f"longspan/{ATTEMPT}/failures", f"longspan/{ATTEMPT}/failure printed"


def first_failure(error: Exception) -> str:
    """Check in as a rank that ``error`` ends; on the first rank that does, a sentence about the failure, else "".

    Call it at once: torchrun's agent ends the store soon after a rank of its host has failed.

    Returns:
        The sentence: what ``error`` is, or, where it is a lost connection, which ranks have not checked in. A rank that is not
        the first gets one too where the first one, or the store, has ended before it was printed.
    """
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store, number = check_in()
    if is_lost_connection(error):
        text = _sentence([0] if store is None else _silent(store, rank, ranks), rank, error)
    else:
        text = f"rank {rank} failed with {type(error).__name__}: {_first_line(error)}"
    if number > 1:
        with suppress(Exception):
            store.wait([PRINTED], timedelta(seconds=2 * GRACE_SECONDS))
            return ""
    mark_printed(store)
    return text


def check_in() -> tuple[Any, int]:
    """Tell the other ranks that this one fails.

    Returns:
        The launcher's store and how many ranks have checked in, this one included; (None, 0) if it cannot be reached.
    """
    from longspan import _compat

    with suppress(Exception):
        store = _compat.tcp_store(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), seconds=2)
        store.set(f"{COUNT}/{os.environ['RANK']}", "")
        return store, store.add(COUNT, 1)
    return None, 0


def mark_printed(store: Any) -> None:
    """Tell the ranks that wait in ``first_failure`` that the failure is printed; ``store`` may be None."""
    with suppress(Exception):
        store.set(PRINTED, "")


def is_lost_connection(error: Exception) -> bool:
    """Whether ``error`` says that another rank has gone, and not what is wrong here: raised by longspan, torch or gloo."""
    import torch.distributed as dist

    return isinstance(error, LostRankError | dist.DistError) or (
        isinstance(error, RuntimeError) and "gloo/transport" in str(error)
    )


def _silent(store: Any, rank: int, ranks: int) -> list[int]:
    """The ranks that do not check in within ``GRACE_SECONDS``; it ends as soon as only one is left."""
    until = time.monotonic() + GRACE_SECONDS
    silent = [other for other in range(ranks) if other != rank]
    while len(silent) > 1 and time.monotonic() < until:
        time.sleep(0.1)
        with suppress(Exception):
            silent = [other for other in silent if not store.check([f"{COUNT}/{other}"])]
    return silent


def _sentence(silent: list[int], rank: int, error: Exception) -> str:
    named = " or ".join(f"rank {other}" for other in silent)
    if not silent:
        return f"the ranks lost their connection ({_first_line(error)})"
    return f"{named} has ended without a message, or does not answer; rank {rank} waited for it ({_first_line(error)})"


def _first_line(error: Exception) -> str:
    """The first sentence of an error, without the place in gloo's source that its errors begin with."""
    first = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return re.sub(r"^\[\S*\] ", "", first).split(". ")[0]
