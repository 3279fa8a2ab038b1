"""The layers of a Hugging Face model: the units of FSDP2 and of activation checkpointing."""

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
