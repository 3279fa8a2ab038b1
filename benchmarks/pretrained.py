"""Peak resident memory of a rank as a model is made parallel with zero=3: read in slices, drawn, or loaded whole and sharded.

MALLOC_MMAP_THRESHOLD_=65536 OMP_NUM_THREADS=1 python benchmarks/pretrained.py
"""

import gc
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parent.parent))
from longspan import ParallelMesh, parallelize
from longspan.hf.export import save
from longspan.hf.weights import load
from tests.helpers.ranks import on_ranks

RANKS = 4
CONFIG = LlamaConfig(
    vocab_size=8192, hidden_size=1024, intermediate_size=2816, num_hidden_layers=12, num_attention_heads=16,
    num_key_value_heads=4, architectures=["LlamaForCausalLM"],
)  # fmt: skip


def resident(name: str) -> float:
    """MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) / 1024


def reset() -> float:
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def peaks(how: str, folder: str) -> list[float]:
    """Of making the model parallel, and of saving it."""
    mesh, before = ParallelMesh(), reset()
    whole = how == "whole"
    parallelize(model := LlamaForCausalLM.from_pretrained(folder) if whole else load(folder), mesh, zero=3)
    made, before_saving = resident("VmHWM") - before, reset()
    save(model, f"{folder}-{how}", mesh)
    return [made, resident("VmHWM") - before_saving]


def main() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with torch.device("meta"):
        model = LlamaForCausalLM(CONFIG)
    sizes = [sum(p.nbytes for p in part.parameters()) / 2**20 for part in (model, model.model.layers[0], model.lm_head)]
    print("whole {:.0f} MiB, a block {:.0f}, the embedding and the head {:.0f} each".format(*sizes))
    with tempfile.TemporaryDirectory() as scratch:
        for folder in ("files", "seed"):
            CONFIG.save_pretrained(f"{scratch}/{folder}")
        LlamaForCausalLM(CONFIG).save_pretrained(f"{scratch}/files")
        for how, folder in {"read": "files", "drawn": "seed", "whole": "files"}.items():
            found = on_ranks(RANKS, peaks, how, f"{scratch}/{folder}", tmp_path=Path(scratch))
            made, saved = (max(column) for column in zip(*found))
            print(f"{how:<6} peak of a rank {made:.0f} MiB, saving {saved:.0f} MiB more")


if __name__ == "__main__":
    main()
