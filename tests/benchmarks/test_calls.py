"""The Python function calls of a training step stay at most those before plans were cached by shape (c3abed5)."""

import re
import sys
from pathlib import Path

import pytest
import torch
import transformers

from tests.helpers import processes

STEP, LAYER = 19_992, 4_639
"""Calls of a step of 4 layers, and of each further layer, with torch 2.13 and transformers 5.23."""
ROOT = Path(__file__).parents[2]
COUNTED = torch.__version__.startswith("2.13.") and transformers.__version__.startswith("5.23.")


@pytest.mark.long
@pytest.mark.skipif(not COUNTED, reason="other versions of torch and transformers make other numbers of calls themselves")
def test_a_step_makes_no_more_calls_than_before() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "benchmarks/calls.py"]
    done = processes.run(command, cwd=ROOT, timeout=240)
    assert done.returncode == 0, done.stderr
    step, layer = (int(number.replace(",", "")) for number in re.findall(r"\d+,\d+", done.stdout))
    assert (step <= STEP, layer <= LAYER) == (True, True), done.stdout
