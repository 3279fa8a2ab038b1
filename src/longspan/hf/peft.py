"""Finds the Hugging Face model inside peft's wrapper, and refuses adapters that are not token-wise. Independent of meshes.

PeftModel(**part)     what the user calls, proves, shards and trains: LoRA and its kin work on each token by itself
    LoraModel
        LlamaForCausalLM(**part, longspan=BatchInfo)     what attends and forms the loss: it gets the mesh
"""

import sys
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from longspan.errors import ModelError
from longspan.hf.candidate import Candidate


def base_of(model: nn.Module) -> PreTrainedModel | None:
    """The Transformers model of ``model``: itself, or the one inside a PeftModel; None for any other module."""
    library = sys.modules.get("peft")  # a PeftModel exists only where peft was imported
    found: Any = model.get_base_model() if library is not None and isinstance(model, library.PeftModel) else model
    return found if isinstance(found, PreTrainedModel) else None


def has_adapters(model: nn.Module) -> bool:
    """Whether ``model`` is peft's wrapper, or has layers that peft put in the place of its own."""
    library: Any = sys.modules.get("peft")
    if library is None:
        return False
    return any(isinstance(module, library.PeftModel | library.tuners.tuners_utils.BaseTunerLayer) for module in model.modules())


def probe(candidate: Candidate) -> None:
    """Raise ModelError for a peft adapter that mixes tokens or adds some; otherwise return None: there is nothing to install.

    Refused: prompt learning, adaption prompts, activated LoRA.
    """
    for name, config in candidate.called.peft_config.items() if candidate.called is not candidate.model else ():
        reason = None
        if config.is_prompt_learning or config.is_adaption_prompt:
            reason = "puts learned tokens before the sequence, which would stand before every rank's part of it"
        if getattr(config, "alora_invocation_tokens", None):
            reason = "begins at tokens that it looks for in the whole sequence"
        if reason is not None:
            raise ModelError(
                f"adapter {name!r} ({config.peft_type.value}) {reason}; use one that works on each token alone, such as LoRA"
            )
