"""What is known of Hugging Face's classes of models, by ``model_type``: the axes that split them, and which are encoders.

docs/plans.md   -> TENSOR, PIPELINE -> ModelShape.whole: the axes that stay at 1
docs/models.md  -> ENCODERS         -> refused

``parallelize`` refuses tensor or pipeline > 1 for all types that are not named here: they have no plan in Transformers, or one
that is not honoured. docs/plans.md has the reason of each; a test compares these names with the two pages.
"""

from collections.abc import Mapping
from typing import Any

TENSOR = frozenset((
    "apertus", "arcee", "aria_text", "cohere", "cohere2", "cohere_compass_text", "cwm", "dots1", "ernie4_5",
    "ernie4_5_moe", "exaone4", "gemma", "gemma2", "gemma3_text", "gemma4_text", "gemma4_unified_text", "glm4_moe",
    "gpt_neox", "granite", "helium", "hrm_text", "hy_v3", "hyperclovax", "internlm3", "iquestcoder", "jais2",
    "kolibri1", "llama", "mellum", "ministral", "ministral3", "mistral", "mixtral", "nanochat", "nemotron", "olmo",
    "phi", "qwen2", "qwen3", "qwen3_moe", "seed_oss", "smollm3", "starcoder2", "vaultgemma",
))  # fmt: skip
"""Model types that are exact with tensor > 1."""

PIPELINE = frozenset((
    "afmoe", "apertus", "arcee", "aria_text", "axk1", "beam", "cohere", "cohere2", "cohere2_moe", "cohere_compass_text",
    "cwm", "deepseek_v2", "deepseek_v3", "dots1", "ernie4_5", "ernie4_5_moe", "exaone4", "exaone_moe", "flex_olmo",
    "flint", "gemma", "gemma2", "gemma3_text", "gemma4_unified_text", "glm", "glm4", "glm4_moe", "glm4_moe_lite",
    "gpt_neox", "gpt_oss", "granite", "granite_swa", "helium", "hy_v3", "hyperclovax", "internlm3", "iquestcoder",
    "jais2", "kolibri1", "laguna", "llama", "longcat_flash", "mellum", "mimo_v2_flash", "minicpm3", "minimax_m2",
    "ministral", "ministral3", "mistral", "mixtral", "olmo", "olmo2", "olmo3", "phi", "phi3", "qwen2", "qwen2_moe",
    "qwen3", "qwen3_moe", "seed_oss", "smollm3", "solar_open", "starcoder2", "vaultgemma", "youtu",
))  # fmt: skip
"""Model types that are exact with pipeline > 1."""

ENCODERS = frozenset((
    "albert", "bert", "big_bird", "camembert", "convbert", "data2vec-text", "deberta", "deberta-v2", "distilbert",
    "electra", "ernie", "esm", "esmc", "eurobert", "fnet", "funnel", "gte", "ibert", "jina_embeddings_v3", "layoutlm",
    "longformer", "luke", "megatron-bert", "mobilebert", "modernbert", "modernvbert", "mpnet", "mra", "neomme",
    "nomic_bert", "nystromformer", "reformer", "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer",
    "squeezebert", "tapas", "ultrabert", "ultravbert", "xlm-roberta", "xlm-roberta-xl", "xmod", "yoso",
))  # fmt: skip
"""Model types whose usual class predicts masked tokens: their layers are not those of a decoder."""


def axes_left_whole(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The axes among "tensor" and "pipeline" that ``parallelize`` refuses above 1 for the model of a config's contents.

    A balance loss of experts (``output_router_logits``) is refused with both.
    """
    kind, balanced = str(config.get("model_type", "")), bool(config.get("output_router_logits", False))
    legal = {"tensor": TENSOR, "pipeline": PIPELINE}
    return tuple(axis for axis, kinds in legal.items() if balanced or kind not in kinds)
