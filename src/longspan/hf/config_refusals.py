"""Refuses models by a config field, an option of an embedding, or because they are on the meta device, before any forward."""

from torch import nn

from longspan.errors import ModelError
from longspan.hf.candidate import Candidate
from longspan.hf.names import CAPACITY, SELECTING_FIELDS, is_layerdrop_field


def probe(candidate: Candidate) -> None:
    """Raise ModelError, naming the config field, if the candidate's config sets an option that longspan does not support.

    Refused: attention that selects keys by their content, a capacity limit of experts, attention probabilities as outputs,
    layer dropout, embeddings whose gradient is sparse or depends on how often a token occurs, and a model on the meta device.
    Otherwise it returns None: there is nothing to install.
    """
    model = candidate.model
    config = model.config.get_text_config()
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ModelError(f"{type(model).__name__} is on the meta device; give it weights before parallelize, which proves it")
    selecting = sorted(name for name in vars(config) if name.startswith(SELECTING_FIELDS))
    if selecting:
        raise ModelError(
            f"config.{selecting[0]} says that {type(model).__name__} selects or compresses keys by their content on long rows, "
            f"which it would do among this rank's tokens; such a model is not supported"
        )
    if any(hasattr(module, CAPACITY) for module in model.modules()):
        raise ModelError(
            f"config.{CAPACITY} lets each expert of {type(model).__name__} take so many tokens of a row and drops the rest, "
            f"which a rank would count among its own tokens; such a model is not supported"
        )
    if any(getattr(each, "output_attentions", False) for _, each in candidate.configs):
        raise ModelError(
            "config.output_attentions asks for the probabilities of all tokens, which attention over ranks never forms; set it "
            "to False"
        )
    dropped = sorted(name for name, value in vars(config).items() if is_layerdrop_field(name) and value)
    if dropped:
        raise ModelError(f"config.{dropped[0]} drops layers at random, other ones on every rank; set it to 0")
    for name, module in model.named_modules():
        if not isinstance(module, nn.Embedding):
            continue
        if module.max_norm is not None:
            raise ModelError(
                f"{name!r} has max_norm={module.max_norm:g}, with which a forward shortens the rows that it looks up, "
                f"other ones on every rank; set it to None"
            )
        for option in ("scale_grad_by_freq", "sparse"):
            if getattr(module, option):
                raise ModelError(
                    f"{name!r} has {option}=True, whose gradient is another one for the tokens of one rank than for those of "
                    f"all; set it to False"
                )
