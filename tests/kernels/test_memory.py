"""Peak memory of forward and backward of the kernels grows with the tokens, not with their square."""

import json
import os
import sys

import pytest

from tests.helpers import processes

_PEAK = """
import json, re, sys, torch
from longspan.kernels.table import KERNELS
from longspan.masks.bands import Band
from longspan.masks.constructors import *
torch.set_num_threads(1)

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024

def grown(kernel, mask, tokens):
    q, k, v, dout = torch.randn(4, tokens, 1, 16)
    bands = mask.bands(tokens, tokens)
    open("/proc/self/clear_refs", "w").write("5")
    before = peak()
    out, lse = kernel.forward(q, k, v, bands, 0.25)
    kernel.backward(dout, q, k, v, out, lse, bands, 0.25)
    return peak() - before

sizes, found = json.loads(sys.argv[1]), {}
for tokens in sizes:
    blocks = -(-tokens // 512)
    sparse = BlockSparse(512, [[j in (0, i) or (i * 7 + j * 3) % 31 == 0 for j in range(blocks)] for i in range(blocks)])
    documents = Documents([tokens // 16 - 3, tokens // 16 + 3, *[tokens // 128] * 112]) & Causal()
    for mask in (Causal(), Full(), Window(255), Window(4095), Window(63, 63), documents, PrefixLM(tokens // 3),
                 Chunked(1000), SinkTokens(64), Causal() & (Window(255) | SinkTokens(64)), Span(100, tokens // 4), sparse,
                 Bands([Band(0, tokens, 0, tokens, -999, -500)])):
        for kernel in ("sdpa", "online"):
            if kernel == "sdpa" or tokens <= 2**13:
                name = f"{kernel} {re.sub(r'[0-9]{4,}.*', '', repr(mask))}"
                found.setdefault(name, []).append(grown(KERNELS[kernel], mask, tokens))
print(json.dumps(found))
"""


def peaks(*sizes: int) -> dict[str, list[float]]:
    """MiB that forward and backward add, for each kernel, mask and number of tokens (1 head x 16)."""
    # without the threshold glibc keeps what was freed, and the peak shows nothing
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", _PEAK, json.dumps(sizes)]
    done = processes.run(command, env=environment, timeout=900)  # two minutes on two cores that do nothing else
    assert done.returncode == 0, done.stderr
    found: dict[str, list[float]] = json.loads(done.stdout)
    return found


def test_memory_is_that_of_the_tokens() -> None:
    """8,192 tokens: 2 MiB of inputs; the scores would be 256 MiB, a mask of theirs 64."""
    for name, (grown,) in peaks(2**13).items():
        assert grown < 56, name


@pytest.mark.long
def test_memory_grows_linearly_to_131072_tokens() -> None:
    """Four times the tokens, at most four times the memory beyond that of one chunk of work."""
    for name, (some, all_) in peaks(2**15, 2**17).items():
        assert all_ < 4 * some + 32, (name, some, all_)
        assert all_ < 200, name
