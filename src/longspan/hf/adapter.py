"""Adapter for Hugging Face models: ``parallelize`` calls its ``prove``, ``install`` and ``undo``.

    model(**part)   ->   embeddings, norms, MLPs, experts: this rank's tokens, the model's own code
                              |
                         attention(module, query, key, value, mask, ..., longspan=BatchInfo)      by the *name* "longspan" in
                              |                                                              Transformers' public registries
                         attend(...) over the mesh that the module's ``Layer`` holds              (attention.py)
                              |
                    ->   loss_function(logits, labels, ...)   the mean over the labels of all ranks (loss.py)

Nothing of the process or of another model changes: this model gets a copy of its config that names the attention, and
attributes and hooks on itself, which ``undo`` removes. Each way in which models deviate from that picture is one file with
``probe`` and ``install`` (candidate.py), listed in ``DEVIATIONS``.

In this folder "prove", "proof" and "proven" mean: tested on one rank, with small random inputs, before the model is changed.
"""

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from longspan.attention.api import refuse_kernel
from longspan.distributed.mesh import ParallelMesh
from longspan.distributed.pipeline_parallel import PipelinePlan
from longspan.distributed.tensor_parallel import TensorPlan
from longspan.errors import ModelError
from longspan.hf import (
    attention_layers,
    call_checks,
    chunked_loss,
    config_refusals,
    dummy_row,
    loss,
    moe_aux_loss,
    own_attention,
    peft,
    pipeline_stages,
    position_ids,
    position_probe,
    positional_arguments,
    registry_kernel,
    saving,
    t5_bias,
    tensor_weights,
)
from longspan.hf.attention_layers import AttentionLayers, attention_named
from longspan.hf.blocks import blocks
from longspan.hf.call_checks import CallChecks
from longspan.hf.candidate import Candidate, Deviation, F, Found, Undo
from longspan.hf.loss import Loss
from longspan.hf.names import is_encoder_decoder, is_norm
from longspan.hf.pipeline_stages import PipelineStages
from longspan.hf.position_probe import Counting
from longspan.hf.registry_kernel import PREFIX, refuse_name
from longspan.hf.tensor_weights import TensorWeights
from longspan.kernels.protocol import Kernel
from longspan.kernels.user_function import KernelFunction
from longspan.memory.options import MemoryOptions
from longspan.memory.tiling import routes_to_experts

DEVIATIONS: tuple[Deviation, ...] = (
    config_refusals,
    peft,
    attention_layers,
    tensor_weights,  # reads the heads that attention_layers finds
    pipeline_stages,
    registry_kernel,  # replaces what attention_layers installs
    positional_arguments,  # all later hooks read keywords
    dummy_row,  # its row is what all later hooks see
    call_checks,
    loss,
    chunked_loss,
    moe_aux_loss,
    position_probe,  # may gather ids: behind every hook that refuses
    position_ids,  # takes position_ids from stacks that count by themselves
    t5_bias,
    saving,
    own_attention,  # holds the keywords that all hooks before it gave the call
)
"""All deviations. Hooks on a module run in the order in which they are installed, which is this one."""


class PretrainedAdapter:
    """The ``ModelAdapter`` of a Transformers model, by which ``parallelize`` reads and changes it.

    Args:
        called: what the user calls: the model, or peft's wrapper of it.
        model: the Transformers model itself.
        kernel: what ``attend(kernel=)`` takes, or "hf:" and the name of an attention in Transformers' registry.
    """

    def __init__(self, called: nn.Module, model: PreTrainedModel, kernel: str | Kernel | KernelFunction = "auto") -> None:
        self.called, self.kernel = called, kernel
        self.model: Any = model
        configured = [module for module in called.modules() if isinstance(getattr(module, "config", None), PreTrainedConfig)]
        self.configs: list[tuple[Any, Any]] = [(module, module.config) for module in configured]
        self._findings: dict[type[Any], Found] = {}
        self._undo: list[Undo] = []

    def given_config(self) -> PreTrainedConfig:
        """The config that the user gave the model; the parallel model has a copy of it that names longspan's attention."""
        config: PreTrainedConfig = self.configs[0][1]
        return config

    def computes_loss(self) -> bool:
        """True if the model's forward, once installed, returns the loss over all ranks; False if labels are refused."""
        return self.loss_kind is not None

    def blocks(self) -> list[nn.Module]:
        """The layers that FSDP2 shards one by one, and that recomputation computes again."""
        return list(blocks(self.model).values())

    def token_wise(self) -> list[nn.Module]:
        """The modules that can be computed a tile of tokens at a time: norms, and the feed-forwards of the layers.

        Not those inside attention modules, nor feed-forwards that route tokens to experts.
        """
        attending = {module for module, _ in self.layers}
        inside = {part for module in attending for part in module.modules()}
        norms = [module for module in self.model.modules() if is_norm(module) and module not in inside]
        children = [child for block in self.blocks() for child in block.children()]
        feeds = [child for child in children if _is_feed_forward(child) and not attending & set(child.modules())]
        return [module for module in (*norms, *feeds) if _takes_one_argument(module)]

    def tensor_plan(self) -> TensorPlan:
        """The weights that the model's own ``base_model_tp_plan`` cuts over the tensor axis, as found by ``prove``.

        To be called on a mesh with tensor > 1, for which ``prove`` has refused a model without such a plan.
        """
        return self._found(TensorWeights).plan

    def pipeline_plan(self) -> PipelinePlan:
        """The stages that the model's own ``base_model_pp_plan`` describes, found by ``prove`` on a mesh with pipeline > 1."""
        return self._found(PipelineStages).plan

    def prove(self, mesh: ParallelMesh, memory: MemoryOptions) -> None:
        """Test on this rank every way in which Transformers models differ from one another, and keep what is found for
        ``install``.

        The tests are the functions ``probe`` of the files in DEVIATIONS; each runs small forwards. The model is not changed.

        Args:
            mesh: the ranks it will run on.
            memory: the memory options that it must be able to use.

        Raises:
            ModelError: the model cannot be parallel; the message names the module or config field.
            LayoutError: heads that do not fit the mesh.
            KernelError: a kernel that the model, or a ring, cannot use.
        """
        if isinstance(self.kernel, str) and self.kernel.startswith(PREFIX):
            refuse_name(self.kernel, self.model, mesh.coordinate)
        else:
            refuse_kernel(self.kernel, mesh.coordinate)
        candidate = Candidate(self.called, self.model, mesh, memory, self.kernel, self.configs)
        with attention_named(self.configs):
            for deviation in DEVIATIONS:
                found = deviation.probe(candidate)
                if found is not None:
                    candidate.findings[type(found)] = found
        self._findings = candidate.findings

    def install(self, mesh: ParallelMesh, memory: MemoryOptions) -> None:
        """Make the model compute over ``mesh``, in place: apply everything that ``prove`` found, in the order of DEVIATIONS.

        If one change fails, those before it are undone, and its exception is raised.
        """
        try:
            for found in self._findings.values():
                self._undo.append(found.install(self.model, mesh))
        except BaseException:
            self.undo()
            raise

    def refuse_call(self, keywords: Mapping[str, Any]) -> None:
        """Raise the LongspanError with which the parallel model refuses a call with these keywords; return if it accepts them.

        Refused are keywords that need the whole sequence on one rank, and tokens or decoder rows that the model does not know.
        """
        self._found(CallChecks).refuse(self.model, keywords)

    def undo(self) -> None:
        """Remove everything that ``install`` changed, in reverse order."""
        while self._undo:
            self._undo.pop()()

    @property
    def layers(self) -> tuple[tuple[Any, attention_layers.Layer], ...]:
        """(attention module, its ``Layer``) for every attention module that ``prove`` found, in the order of their calls.

        A Layer has the module's mask, its name for messages and which row of tokens it reads.
        """
        return self._found(AttentionLayers).layers

    @property
    def loss_kind(self) -> str | None:
        """The name of the model's loss in Transformers' table of losses, or ``loss.OWN`` for a model that computes it by
        itself.

        None if the loss cannot be computed over several ranks.
        """
        return self._found(Loss).kind

    def with_targets(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Add the decoder's inputs, which an encoder-decoder computes from ``labels``, to a batch of whole rows.

        Args:
            batch: whole rows.

        Returns:
            The batch with ``decoder_input_ids``, and ``decoder_attention_mask`` for a model that hides padding by its id;
            entries that it has already are kept. Unchanged for other models, and without labels [rows, tokens].

        Raises:
            ModelError: the model has no way to make ``decoder_input_ids``.
        """
        labels = batch.get("labels")
        if not is_encoder_decoder(self.model) or not isinstance(labels, Tensor) or labels.ndim != 2:
            return batch
        if not any(name in batch for name in ("decoder_input_ids", "decoder_inputs_embeds")):
            make = getattr(self.model, "prepare_decoder_input_ids_from_labels", None)
            if make is None:
                raise ModelError(f"{type(self.model).__name__} makes no decoder_input_ids of labels; put them into the batch")
            batch = batch | {"decoder_input_ids": make(labels)}
        padding = self.model.get_decoder().config.pad_token_id
        if self._found(Counting).hides_padding and padding is not None and "decoder_input_ids" in batch:
            batch = {"decoder_attention_mask": (batch["decoder_input_ids"] != padding).long()} | batch
        return batch

    def _found(self, kind: type[F]) -> F:
        """What the probe of the deviation whose finding is of class ``kind`` has found; it must have found something."""
        found = self._findings[kind]
        assert isinstance(found, kind)
        return found


def _is_feed_forward(module: nn.Module) -> bool:
    """Whether ``module`` has two or more weight matrices and routes to no experts: then it is a feed-forward if a layer
    holds it."""
    return sum(parameter.ndim > 1 for parameter in module.parameters()) > 1 and not routes_to_experts(module)


def _takes_one_argument(module: nn.Module) -> bool:
    """Whether the forward of ``module`` needs exactly one argument, as one that can be tiled does."""
    parameters = inspect.signature(module.forward).parameters.values()
    return sum(each.default is each.empty for each in parameters) == 1
