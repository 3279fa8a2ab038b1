"""Hugging Face models: ``load`` and ``save`` are public, ``parallelize`` finds the rest by itself. Needs the extra ``hf``.

Map of the folder: candidate.py is the protocol of a deviation (``probe``, ``install``), adapter.py holds their ordered registry
DEVIATIONS, probe.py is the single-rank test, and each deviation (a Hugging Face quirk) is one more file.

Imported lazily: ``adapter_for`` must be importable without Transformers.
"""

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from longspan.hf.adapter import PretrainedAdapter
    from longspan.hf.export import save
    from longspan.hf.weights import load

__all__ = ["load", "save"]


def __getattr__(name: str) -> Any:
    """The public function ``name``, ``load`` of weights.py or ``save`` of export.py, imported at its first use.

    Raises:
        AttributeError: any other name.
    """
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from longspan.hf import export, weights

    return export.save if name == "save" else weights.load


def adapter_for(model: "nn.Module", kernel: Any = "auto") -> "PretrainedAdapter | None":
    """The ``ModelAdapter`` of a Transformers model, or of peft's wrapper of one, by which ``parallelize`` reads and changes it.

    Args:
        model: any module.
        kernel: the attention kernel: a name, "auto", "hf:" and a name of Transformers' registry, a ``Kernel`` or a function.

    Returns:
        The adapter; None for a module of another kind.
    """
    if "transformers" not in sys.modules:  # such a model exists only where the library was imported
        return None
    from longspan.hf.adapter import PretrainedAdapter
    from longspan.hf.peft import base_of

    base = base_of(model)
    return None if base is None else PretrainedAdapter(model, base, kernel)
