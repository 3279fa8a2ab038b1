"""Compile a parallel Hugging Face llama over 2 ranks and compare it with one device (test_compile.py).

Run as a program: FOLDER plain|packed|chunked|sharded (plain rows and zero=3). Plain rows must compile without a graph break
(but before PyTorch 2.13); packed rows, a chunked loss and FSDP2 may break the graph. It prints the number of graphs after each
step, then "exact". The backend aot_eager runs PyTorch's own kernels, because inductor's rounding of fp32 norms is not covered
by the guarantee.
"""

import sys
from copy import deepcopy
from pathlib import Path

import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

from longspan import MemoryOptions, ParallelMesh, parallelize, shard_batch
from longspan._compat import PLANS_ARE_CONSTANTS
from tests.helpers.ranks import on_ranks

CONFIG = LlamaConfig(
    vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2
)  # fmt: skip


def compiled_is_one_device(then_packed: bool, chunked: bool, zero: int) -> None:
    """Two steps with plain rows, then two with packed ones if ``then_packed``; assert the gradients of one device in each.

    ``chunked``: the loss is computed without logits, outside of the graph. ``zero``: of ``parallelize``.
    """
    torch.manual_seed(0)
    reference = LlamaForCausalLM(CONFIG).double()
    mesh = ParallelMesh(ulysses=2)
    model = parallelize(deepcopy(reference), mesh, zero=zero, memory=MemoryOptions(chunked_loss=chunked))
    model.compile(backend="aot_eager")
    graphs = []
    for step, packed in enumerate([False, False, True, True] if then_packed else [False, False]):
        ids = torch.randint(3, 97, (2, 24), generator=torch.Generator().manual_seed(step))
        batch = {"input_ids": ids}
        if packed:
            batch["position_ids"] = torch.cat([torch.arange(5 + step), torch.arange(19 - step)]).expand(2, 24)
        logits = reference(**batch, use_cache=False).logits
        F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        model(**shard_batch(batch | {"labels": ids}, mesh)).loss.backward()
        for mine, one in zip(model.parameters(), reference.parameters()):
            assert mine.grad is not None
            assert one.grad is not None
            torch.testing.assert_close(
                mine.grad.full_tensor() if isinstance(mine.grad, DTensor) else mine.grad, one.grad, rtol=1e-9, atol=1e-10
            )
        reference.zero_grad()
        model.zero_grad()
        assert packed or chunked or zero or not PLANS_ARE_CONSTANTS or not counters["graph_break"]
        graphs.append(counters["stats"]["unique_graphs"])
    assert not any("attrgetter" in reason for reason in counters["graph_break"])  # longspan's look at the hooks of parameters
    # The second graph is torch's own, of the hooks behind the backward.
    assert chunked or zero or not PLANS_ARE_CONSTANTS or graphs[0] <= 2
    print(graphs)


if __name__ == "__main__":
    folder, rows = sys.argv[1:]
    asked = (rows == "packed", rows == "chunked", 3 if rows == "sharded" else 0)
    on_ranks(2, compiled_is_one_device, *asked, tmp_path=Path(folder), seconds=240)
    print("exact")
