"""Check the shapes of public signatures while the tests run (jaxtyping + beartype); compile tests unload it themselves."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch.distributed as dist
from hypothesis import settings

import tests.helpers.shapes  # noqa: F401  # before longspan
from tests.helpers.device import DEVICE, MadeOn
from tests.helpers.examples import MANY
from tests.helpers.ranks import Ranks

settings.register_profile("few", deadline=None)  # on two busy cores an example takes what it takes
settings.register_profile(MANY, deadline=None)
settings.load_profile("few")


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], Ranks]]:
    """The same ranks for all tests of a file, by their number; of one file, because what a body leaves behind stays on them."""
    pools: dict[int, Ranks] = {}

    def of(ranks: int) -> Ranks:
        if ranks not in pools:
            pools[ranks] = Ranks(ranks, tmp_path_factory.mktemp("ranks"))
        return pools[ranks]

    yield of
    for ranks in pools.values():
        ranks.close()


@pytest.fixture(autouse=True)
def _follow_the_device() -> Iterator[None]:
    """With LONGSPAN_TEST_DEVICE=cuda a test makes its tensors on the GPU."""
    with nullcontext() if DEVICE.type == "cpu" else MadeOn(DEVICE):
        yield


@pytest.fixture(autouse=True)
def _leave_no_group_behind() -> Iterator[None]:
    """Ranks that are forked later would inherit the world of one that a ``ParallelMesh()`` makes here."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture(scope="session")
def _fork_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One for all tests, which has imported what their ranks need: a rank then starts in a tenth of a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[1]), prepend=os.pathsep)
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        verbs = [f"longspan.cli.{verb}" for verb in ("train", "evaluate", "check")]
        library = [f"transformers.models.{kind}.modeling_{kind}" for kind in ("llama", "mixtral", "bert")]
        forkserver.set_forkserver_preload([*verbs, "longspan.hf.source", *library, "pytest"])
        forkserver.ensure_running()
        yield


@pytest.fixture
def launcher(_fork_server: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """For tests that start ranks as a user does: the environment and the signal handlers are as before when they end."""
    for name in ("OMP_NUM_THREADS", "GLOO_SOCKET_IFNAME", "TORCHELASTIC_SIGNALS_TO_HANDLE"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
        monkeypatch.delenv(name)
    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    handlers = [signal.getsignal(number) for number in signals]
    yield
    for number, handler in zip(signals, handlers):
        signal.signal(number, handler)
