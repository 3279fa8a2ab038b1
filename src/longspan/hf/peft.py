"""The Hugging Face model inside peft's wrapper, and which adapters can hold a part of the tokens. Knows nothing of meshes.

PeftModel(**part)     what the user calls, proves, shards and trains: LoRA and its kin work on each token by itself
    LoraModel
        LlamaForCausalLM(**part, longspan=BatchInfo)     what attends and forms the loss: it gets the mesh
"""

import sys
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from longspan.errors import ModelError


def inner(model: nn.Module) -> PreTrainedModel | None:
    """The Transformers model that ``model`` is or, as a PeftModel, has inside; None where there is none."""
    library = sys.modules.get("peft")  # whoever has such a model has imported it
    found: Any = model.get_base_model() if library is not None and isinstance(model, library.PeftModel) else model
    return found if isinstance(found, PreTrainedModel) else None


def refuse_adapters(model: Any, base: PreTrainedModel) -> None:
    """Raise ModelError for adapters that look at the whole sequence, which a rank has a part of."""
    for name, config in model.peft_config.items() if model is not base else ():
        reason = None
        if config.is_prompt_learning or config.is_adaption_prompt:
            reason = "puts learned tokens before the sequence, which would stand before every rank's part of it"
        if getattr(config, "alora_invocation_tokens", None):
            reason = "begins at tokens that it looks for in the whole sequence"
        if reason is not None:
            raise ModelError(
                f"adapter {name!r} ({config.peft_type.value}) {reason}; use one that works on each token alone, such as LoRA"
            )
