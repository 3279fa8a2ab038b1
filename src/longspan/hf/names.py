"""Names by which modules and config fields of Transformers are recognised where no type tells: one table for the folder.

Transformers copies each architecture into a modeling file of its own, so that most of its modules share no base class, only a
way to name them. Such names stand here, "Router" in memory/tiling.py besides; our own classes are recognised by ``isinstance``.
"""

import inspect
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

ATTENTION = ("Attention",)
"""Parts of the class names of attention modules. One that does not reach the registry would see only this rank's tokens."""
NORM = ("Norm",)
"""Parts of the class names of norms, which are token-wise."""
POSITION_TABLE = ("PositionalEmbedding",)
"""Parts of the class names of tables of learned or sinusoidal positions that are looked up by ``position_ids``."""
SELECTING_FIELDS = ("index_topk", "index_block", "index_n_heads", "compress_rate")
"""Prefixes of config fields of layers that select keys by content. On rows as short as the proof's they see every key."""
CAPACITY = "expert_capacity"
"""The attribute of a router that drops the tokens of a row beyond the capacity of their expert, and its config field."""
EXPERT_COUNT_FIELDS = ("num_local_experts", "num_experts", "n_routed_experts")
"""The config fields that hold the number of experts."""
REACH_PARTS = ("window", "local", "attention_types")
"""Parts of the names of config fields that limit how far a query sees; the proof's short rows may be within the limit."""
BLOCK_PARTS = ("block_size", "chunk_length", "num_hashes")
"""Parts of the names of config fields of attention that runs other code on rows longer than a block."""
WHOLE_ATTENTION = ("original_full",)
"""The ``attention_type`` of configs whose attention runs the same code for every length, in spite of such fields."""
SINK_PARAMETERS = ("sinks",)
"""Names of the parameter of an attention module that holds its sinks, which attention functions read from the module."""


def is_encoder_decoder(model: Any) -> bool:
    """Whether the model has an encoder and a decoder, each with its own row of tokens."""
    return bool(getattr(model.config, "is_encoder_decoder", False)) and model.get_encoder() is not model.get_decoder()


def is_attention(module: nn.Module) -> bool:
    """Whether the module is an attention module, by the name of its class."""
    return _is_named(module, ATTENTION)


def is_norm(module: nn.Module) -> bool:
    """Whether the module is a norm: an instance of PyTorch's norms, or of a class with a norm's name."""
    return isinstance(module, nn.LayerNorm | nn.RMSNorm) or _is_named(module, NORM)


def is_position_table(module: nn.Module) -> bool:
    """Whether the module is a table of position embeddings: one that is called with positions (BART), or counts them from
    ids."""
    given = "position_ids" in inspect.signature(module.forward).parameters
    return _is_named(module, POSITION_TABLE) and (given or counts_from_ids(module))


def counts_from_ids(module: nn.Module) -> bool:
    """Whether the module is a sinusoidal position table that counts positions from token ids and can lengthen itself
    (M2M100)."""
    return (
        _is_named(module, POSITION_TABLE)
        and isinstance(getattr(module, "weights", None), Tensor)
        and hasattr(module, "make_weights")
    )


def is_dropout_field(name: str) -> bool:
    """Whether a config field holds a dropout rate that a language model applies in training."""
    return ("dropout" in name or name.endswith("_pdrop")) and not name.startswith(("classifier", "summary"))


def is_layerdrop_field(name: str) -> bool:
    """Whether a config field holds the rate at which whole layers are dropped."""
    return "layerdrop" in name


def reach_fields(configs: Sequence[Any]) -> list[str]:
    """The names, sorted, of the fields set in any of the configs that may limit how far a query sees, such as a window."""
    return _set_fields(configs, REACH_PARTS)


def block_fields(configs: Sequence[Any]) -> list[str]:
    """The names, sorted, of the fields set in any of the configs for attention that runs other code on rows longer than a
    block.

    A config whose ``attention_type`` says that it runs the same code for every length is left out.
    """
    return _set_fields([each for each in configs if getattr(each, "attention_type", None) not in WHOLE_ATTENTION], BLOCK_PARTS)


def number_of_experts(text_config: Any) -> int:
    """The number of experts in the config of a language model; 0 for a dense model."""
    return next((count for name in EXPERT_COUNT_FIELDS if (count := getattr(text_config, name, None))), 0)


def _set_fields(configs: Sequence[Any], parts: tuple[str, ...]) -> list[str]:
    """The names, sorted, of the config fields that contain one of ``parts`` and have a value in any of the configs."""
    fields = [(name, value) for config in configs for name, value in vars(config).items()]
    return sorted({name for name, value in fields if value and any(part in name for part in parts)})


def _is_named(module: nn.Module, parts: tuple[str, ...]) -> bool:
    """Whether the name of the module's class contains one of ``parts``."""
    return any(part in type(module).__name__ for part in parts)


def tensor_names(model: nn.Module) -> list[list[str]]:
    """For each tensor of the state dict, the list of its names: a tied tensor has several."""
    names: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)
    return list(names.values())
