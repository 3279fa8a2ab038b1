"""A program of a test that takes too long leaves nothing behind."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers import processes


def test_what_takes_too_long_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    """torchrun starts each rank in a session of its own, so the group of torchrun is not enough."""
    sleep = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(600)"
    program = f"""
import subprocess, sys, time
for apart in (False, True):
    subprocess.Popen([sys.executable, "-c", {sleep!r}, f"{tmp_path}/{{apart}}"], start_new_session=apart)
time.sleep(600)
"""
    with pytest.raises(subprocess.TimeoutExpired):
        processes.run([sys.executable, "-c", program], timeout=4)
    for name in ("False", "True"):
        assert _ends(Path("/proc", (tmp_path / name).read_text(), "stat")), "still running"


def _ends(stat: Path, seconds: float = 10) -> bool:
    """Whether the process is gone, or a zombie, within ``seconds``: a killed one may have to finish a system call first."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            if stat.read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.01)
    return False
