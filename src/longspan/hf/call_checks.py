"""Checks of each call of a parallel Hugging Face model: refuses arguments that need the whole sequence on one rank."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from longspan.batch.context import BatchInfo, refuse_unknown_tokens
from longspan.distributed.mesh import ParallelMesh
from longspan.errors import ModelError
from longspan.hf.candidate import Candidate, Undo, remove_all
from longspan.hf.names import is_encoder_decoder
from longspan.hf.probe import TOKENS, Probe, forward, proving

WHOLE_SEQUENCE = (
    "past_key_values", "output_attentions", "logits_to_keep", "use_cache", "attention_mask", "decoder_attention_mask",
    "encoder_outputs", "encoder_hidden_states", "start_positions", "end_positions",
    "cache_params", "cache", "mems", "state", "padding_cache", "past_buckets_states", "encoder_past_key_values",
    "encoder_cache", "shared_kv_states",
)  # fmt: skip
"""Keywords of a call that refer to the whole sequence, and are refused."""
MEDIA = (
    "pixel_values", "pixel_values_videos", "image_pixel_values", "image_patches", "image_hidden_states", "input_features",
    "input_values", "audio_input_features", "mm_encoder_outputs", "cross_attention_states", "encoder_inputs_embeds",
)  # fmt: skip
"""Keywords of a call that hold images and sounds, or what an encoder made of them, and are refused."""
OF_ATTENTION = (
    "is_causal", "sliding_window", "softcap", "s_aux", "dropout", "scaling", "position_bias", "head_mask", "score_mod",
    "block_mask", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k",
)  # fmt: skip
"""Arguments of attention functions, to which models pass on keywords that they do not know; a test had each layer's own."""
POSITIONS = "position_ids"
TYPES = "token_type_ids"
"""The keyword that tells some models which tokens are an image's."""
TOKENS_OF_ROWS = ("input_ids", "inputs_embeds", TYPES)


@dataclass(frozen=True)
class CallChecks:
    """Checks of the keywords with which a parallel model is called.

    Attributes:
        types_unmask: whether the model lets tokens see others by their ``token_type_ids``.
    """

    types_unmask: bool

    def install(self, model: Any, mesh: ParallelMesh) -> Undo:
        """Register hooks that check the keywords of each call of ``model`` before its forward, and that refuse to generate.

        ``generate`` calls the model, but the encoder of an encoder-decoder before it, by itself.

        Returns:
            A function that removes the hooks.
        """
        handles = [model.register_forward_pre_hook(partial(_check, self.types_unmask), with_kwargs=True)]
        if is_encoder_decoder(model):
            handles.append(model.get_encoder().register_forward_pre_hook(_refuse_whole_rows, with_kwargs=True))
        return remove_all(handles)

    def refuse(self, model: Any, keywords: Mapping[str, Any]) -> None:
        """Raise the LongspanError with which ``model`` refuses a call with these keywords; return if it accepts them."""
        _check(self.types_unmask, model, (), dict(keywords))


def probe(candidate: Candidate) -> CallChecks:
    """The checks of calls, which every model gets.

    Test forwards find only whether the model lets tokens see others by their ``token_type_ids``.
    """
    if TYPES not in inspect.signature(candidate.model.forward).parameters:
        return CallChecks(False)
    typed, plain = Probe(), Probe()
    types: dict[str, Any] = {TYPES: torch.ones(1, TOKENS, dtype=torch.long, device=candidate.model.device)}
    with proving(candidate.called):
        forward(candidate.called, probe=plain)
        try:
            forward(candidate.called, probe=typed, **types)
        except ModelError:  # of fewer types than two
            return CallChecks(False)
    ends = [(0, TOKENS - 1), (TOKENS - 1, 0)]
    calls = [(a.mask, b.mask) for a, b in zip(typed.calls, plain.calls) if a.tokens == (TOKENS, TOKENS)]
    return CallChecks(any(a.sees(*at) != b.sees(*at) for a, b in calls for at in ends))


def _check(types_unmask: bool, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook: raise ModelError for keywords that need the whole sequence on one rank, or for a batch that was not
    cut.

    ``types_unmask`` is that of ``CallChecks``; rows and tokens that the model does not know are refused too.
    """
    _refuse_whole_rows(model, args, kwargs)
    step = kwargs["longspan"]
    for keyword in WHOLE_SEQUENCE:
        value = kwargs.get(keyword)
        if value is not None and value is not False and not (isinstance(value, int) and value == 0):
            raise ModelError(f"{keyword}= means the whole sequence, and a rank has a part of it; leave it out of model(...)")
    for keyword in OF_ATTENTION:
        if kwargs.get(keyword) is not None and keyword not in inspect.signature(model.forward).parameters:
            raise ModelError(
                f"{keyword}= would reach the attention of {type(model).__name__}, whose layers were proven with arguments of "
                f"their own; leave it out of model(...), and give masks and documents by shard_batch(batch, mesh, mask=...)"
            )
    _refuse_uncut(model, kwargs, step)
    for keyword in MEDIA:
        if kwargs.get(keyword) is not None:
            raise ModelError(
                f"{keyword}= is no tensor of tokens: each rank would place all of it among its own part; give the "
                f"model text alone, or inputs_embeds of the whole row, which shard_batch(...) cuts"
            )
    if types_unmask and kwargs.get(TYPES) is not None:
        raise ModelError(
            f"{TYPES}= lets the tokens of an image see one another in {type(model).__name__}, and each rank would see those of "
            f"its own part; leave it out of shard_batch(...), as for text"
        )
    _refuse_other_rows(model, type(model).__name__, step)
    _refuse_other_tokens(model, type(model).__name__, step)


def _refuse_whole_rows(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook: raise ModelError for a call without the BatchInfo of ``shard_batch``, as ``generate`` makes them."""
    if kwargs.get("longspan") is None:
        raise ModelError(
            "the batch was not cut by shard_batch, which gives each rank its tokens and counts the labels of all ranks; call "
            "model(**shard_batch(batch, mesh)). A parallel model does not generate: call longspan.hf.save(model, folder, mesh) "
            "on every rank and generate with what from_pretrained(folder) loads, or at zero=0 and tensor=1 "
            "unparallelize(model) first"
        )


def _refuse_uncut(model: Any, kwargs: Mapping[str, Any], step: BatchInfo) -> None:
    """Raise ModelError if the tokens of the call are not those that ``step`` describes, or have lost their positions."""
    if kwargs.get("input_ids") is not None and kwargs.get("inputs_embeds") is not None:
        raise ModelError("input_ids and inputs_embeds are both given, and each is all the tokens; leave one out")
    for name in (*TOKENS_OF_ROWS, "labels", "shift_labels"):
        row = step.target if step.target is not None and "labels" in name else step
        value, mine = kwargs.get(name), [row.rows, sum(map(len, row.positions))]
        if value is not None and value.ndim > 1 and list(value.shape[:2]) != mine:
            raise ModelError(
                f"{name} of shape {list(value.shape)} is not this rank's part of the batch, which is {mine}; pass all of one "
                f"part to one call: model(**shard_batch(batch, mesh))"
            )
    if kwargs.get(POSITIONS) is None and POSITIONS in inspect.signature(model.forward).parameters:
        raise ModelError(
            f"{POSITIONS} of the part is missing from the call, and each rank would count its own tokens from 0; pass all "
            f"of the part: model(**shard_batch(batch, mesh))"
        )


def _refuse_other_rows(model: Any, name: str, step: BatchInfo) -> None:
    """Raise ModelError if an encoder-decoder gets no decoder rows, or another model gets some.

    ``name`` is the model's class, and ``step`` the BatchInfo of the call.
    """
    if is_encoder_decoder(model) and step.target is None:
        raise ModelError(
            f"{name} is an encoder-decoder, and the batch had no decoder_input_ids; make them before the cut, by "
            f"model.prepare_decoder_input_ids_from_labels(labels) or longspan.shift_right(labels, start, padding)"
        )
    if step.target is not None and not is_encoder_decoder(model):
        raise ModelError(
            f"the batch had decoder_input_ids, and {name} has no decoder apart; leave them out of shard_batch(...)"
        )


def _refuse_other_tokens(model: Any, name: str, step: BatchInfo) -> None:
    """Raise BatchError if a token of any rank is beyond the vocabulary of the model's encoder or decoder."""
    stacks = [(model, step)] if step.target is None else [(model, step), (model.get_decoder(), step.target)]
    for stack, row in stacks:
        refuse_unknown_tokens(row, getattr(stack.get_input_embeddings(), "num_embeddings", None), name)
