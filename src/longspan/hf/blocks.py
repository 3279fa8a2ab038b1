"""The units of FSDP2 in a Hugging Face model: its layers, which activation checkpointing has too, and its embedding."""

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from longspan.hf._compat import block_class_names


def blocks(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The layers of the model as {name: module}, in its order: the outermost instances of the classes that it says not to
    split.

    Those classes are the model's ``_no_split_modules``. Modules that share a parameter with the rest of the model (BERT's
    embeddings with its head) are left out, because FSDP2 must gather shared parameters together.
    """
    kinds = block_class_names(model)
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        inner = any(name.startswith(f"{outer}.") for outer in found)
        shares = any(not other.startswith(f"{name}.") for parameter in module.parameters() for other in names[parameter])
        if type(module).__name__ in kinds and not inner and not shares:
            found[name] = module
    return found


def own_embedding(model: Any) -> nn.Embedding | None:
    """The embedding of tokens, if its forward alone reads its weight and is that of ``nn.Embedding``; else None.

    It is None where the weight is tied, where a layer of ``blocks`` holds the embedding, and for a model without a head of its
    own, whose code may multiply by the weight of the embedding.
    """
    embedding = model.get_input_embeddings()
    if type(embedding).forward is not nn.Embedding.forward or "forward" in vars(embedding):
        return None
    named = [name for name, each in model.named_parameters(remove_duplicate=False) if each is embedding.weight]
    inside = any(module is embedding for block in blocks(model).values() for module in block.modules())
    if inside or len(named) != 1 or model.get_output_embeddings() is None:
        return None
    assert isinstance(embedding, nn.Embedding)
    return embedding
