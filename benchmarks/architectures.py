"""Which language models of Transformers are exact on two ranks, and which are refused: benchmarks/architectures.py [NAME ...]

Every causal and masked language model and every encoder-decoder of the library that can be built from its config class at a
tiny size, with random weights: loss and all gradients on ulysses=2 against one device, on a row of 23 tokens, and 17 of the
decoder's. A verdict is one of

    exact     the largest relative error of a gradient        refused   with this sentence
    WRONG     the same, too large: a defect of longspan       skipped   it could not be built or run so small on one device
"""

import argparse
import os
import tempfile
import warnings
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
import transformers
from transformers.models.auto import modeling_auto

from longspan import LongspanError, ParallelMesh, cross_entropy, parallelize, shard_batch

TINY = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 48, "ffn_dim": 48, "d_model": 32,
    "n_heads": 4, "n_layers": 2, "num_layers": 2, "num_heads": 4, "embedding_size": 32, "word_embed_proj_dim": 32,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 2,
    "ffn_hidden_size": 48, "dim": 32, "hidden_dim": 48, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8, "v_head_dim": 8, "sliding_window": 5, "rotary_dim": 8, "n_group": 2, "topk_group": 1,
    "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48, "d_ff": 48, "d_kv": 8, "num_decoder_layers": 2, "decoder_start_token_id": 2,
    "shared_expert_intermediate_size": 16, "first_k_dense_replace": 1, "max_window_layers": 1, "vocab_size_per_layer_input": 97,
}  # fmt: skip
LARGEST = 3_000_000  # parameters
PAIRS = modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="model types, such as llama; default: all")
    names = parser.parse_args().names
    for name, model in _classes():
        if names and name not in names:
            continue
        with tempfile.TemporaryDirectory() as folder:
            try:
                mp.start_processes(_rank, (folder, name, model), nprocs=2, start_method="fork")
                verdict = Path(folder, "verdict").read_text()
            except Exception as error:
                verdict = f"died | {type(error).__name__}"
        print(f"| {name} | {model} | {verdict} |", flush=True)


def _classes() -> list[tuple[str, str]]:
    causal = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    masked = modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    single = {**{name: model for name, model in masked.items() if name not in causal}, **causal}
    return [*single.items(), *PAIRS.items()]


def _rank(rank: int, folder: str, name: str, model: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/rendezvous", 2), rank=rank, world_size=2)
    verdict = _verdict(name, model)
    if rank == 0:
        Path(folder, "verdict").write_text(" ".join(verdict.split()))
    dist.barrier()
    dist.destroy_process_group()


def _verdict(name: str, model_name: str) -> str:
    ids = torch.randint(3, 97, (1, 23), generator=torch.Generator().manual_seed(1))
    whole = {"input_ids": ids}
    if model_name in PAIRS.values():
        others = ids[:, :17].flip(1)
        masks = {"attention_mask": torch.ones_like(ids), "decoder_attention_mask": torch.ones_like(others)}
        whole |= masks | {"decoder_input_ids": others}
    try:
        reference = _build(name, model_name)
        model = deepcopy(reference)  # before a forward, which may leave states behind
        masked = "MaskedLM" in model_name or model_name in PAIRS.values()
        labels = ids[:, : next(reversed(whole.values())).shape[1]] if masked else F.pad(ids[:, 1:], (0, 1), value=-100)
        expected = cross_entropy(reference(**whole, return_dict=True).logits, labels)
        expected.backward()
    except Exception as error:
        return f"skipped | {type(error).__name__}: {str(error)[:120]}"
    mesh = ParallelMesh(ulysses=2)
    try:
        parallelize(model, mesh)
        part = shard_batch(whole | {"labels": labels if masked else ids}, mesh, shift=not masked)
        targets = part["labels" if masked else "shift_labels"]
        called = {key: value for key, value in part.items() if "labels" not in key}
        found = cross_entropy(model(**called).logits, targets, mesh=mesh, num_labels=part["longspan"].num_labels)
    except LongspanError as error:
        return f"refused | {error}"
    found.backward()
    total = torch.stack([p.grad.norm() for p in reference.parameters() if p.grad is not None]).norm().item()
    worst = abs(found.item() - expected.item()) / abs(expected.item())
    for mine, theirs in zip(model.parameters(), reference.parameters()):
        if theirs.grad is not None:
            got = torch.zeros_like(theirs) if mine.grad is None else mine.grad
            worst = max(worst, (got - theirs.grad).norm().item() / max(theirs.grad.norm().item(), 1e-3 * total))
    return f"{'exact' if worst < 2e-5 else 'WRONG'} | {worst:.1e}"


def _build(name: str, model_name: str) -> Any:
    torch.manual_seed(0)
    kind = transformers.CONFIG_MAPPING[name]
    default = kind()
    settings = {key: value for key, value in TINY.items() if isinstance(getattr(default, key, None), int)}
    settings |= {key: 0.0 for key in vars(default) if "dropout" in key or key.endswith(("pdrop", "layerdrop"))}
    with torch.device("meta"):
        size = sum(p.numel() for p in getattr(transformers, model_name)(kind(**settings)).parameters())
    if size > LARGEST:
        raise ValueError(f"its smallest size has {size:,} parameters")
    model = getattr(transformers, model_name)(kind(**settings))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    return model.float().train()


if __name__ == "__main__":
    main()
