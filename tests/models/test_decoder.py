import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from longspan.attention.api import attend
from longspan.batch.shard import shard_local
from longspan.distributed.coordinate import MeshCoordinate
from longspan.errors import LayoutError, ModelError
from longspan.masks.constructors import Causal, Window
from longspan.models.decoder import Decoder
from longspan.models.decoder_config import PRESETS, DecoderConfig
from tests.helpers.ranks import on_ranks

CONFIG = DecoderConfig(vocab=13, layers=2, hidden=12, heads=4, kv_heads=2, head_dim=6, ffn=20)


def _ids(rows: int = 2, tokens: int = 9) -> torch.Tensor:
    return torch.randint(CONFIG.vocab, (rows, tokens), generator=torch.Generator().manual_seed(3))


def _decoder(**changes) -> Decoder:
    """In fp64, with weights large enough that attention is not uniform."""
    decoder = Decoder(DecoderConfig(**{**vars(CONFIG), **changes})).double()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.mul_(10)
    return decoder


def _written_out(decoder: Decoder, ids: torch.Tensor) -> torch.Tensor:
    """The logits by the textbook: complex rotations, every head alone, an explicit softmax over the past."""
    config, weights = decoder.config, dict(decoder.named_parameters())
    tokens, half, group = ids.shape[1], config.head_dim // 2, config.heads // config.kv_heads

    def norm(x, weight):
        return weight * x / (x.square().mean(-1, keepdim=True) + config.norm_eps).sqrt()

    def rotate(x):
        speed = torch.tensor([config.rope_theta ** (-2 * i / config.head_dim) for i in range(half)], dtype=torch.float64)
        spin = torch.polar(torch.ones(tokens, half, dtype=torch.float64), torch.arange(tokens)[:, None] * speed)
        rotated = torch.complex(x[..., :half], x[..., half:]) * spin
        return torch.cat((rotated.real, rotated.imag), -1)

    past = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    x = weights["embed.weight"][ids]
    for layer in range(config.layers):
        block = {name.removeprefix(f"blocks.{layer}."): weight for name, weight in weights.items()}
        n = norm(x, block["attention_norm.weight"])
        heads = []
        for head in range(config.heads):
            mine = slice(head * config.head_dim, (head + 1) * config.head_dim)
            kv = slice(head // group * config.head_dim, (head // group + 1) * config.head_dim)
            q, k = rotate(n @ block["attention.query.weight"][mine].T), rotate(n @ block["attention.key.weight"][kv].T)
            scores = (q @ k.mT / config.head_dim**0.5).masked_fill(~past, -torch.inf)
            heads.append(scores.softmax(-1) @ (n @ block["attention.value.weight"][kv].T))
        x = x + torch.cat(heads, -1) @ block["attention.out.weight"].T
        n = norm(x, block["ffn_norm.weight"])
        gate = n @ block["feed.gate.weight"].T
        x = x + (gate * gate.sigmoid() * (n @ block["feed.up.weight"].T)) @ block["feed.down.weight"].T
    return norm(x, weights["norm.weight"]) @ weights["embed.weight" if config.tied else "head.weight"].T


@pytest.mark.parametrize("changes", [{}, {"tied": True}, {"heads": 3, "kv_heads": 1}, {"kv_heads": 4, "rope_theta": 100.0}])
def test_it_is_the_textbook_decoder(changes):
    decoder, ids = _decoder(**changes), _ids()
    output = decoder(ids, labels=ids)
    loss, logits = output.loss, output.logits
    expected = _written_out(decoder, ids)
    torch.testing.assert_close(logits, expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(loss, F.cross_entropy(expected[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))

    loss.backward()
    found = {name: parameter.grad.clone() for name, parameter in decoder.named_parameters()}
    decoder.zero_grad()
    F.cross_entropy(_written_out(decoder, ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    expected_grads = {name: parameter.grad for name, parameter in decoder.named_parameters()}
    torch.testing.assert_close(found, expected_grads, rtol=1e-10, atol=1e-12)


def test_the_loss_predicts_the_next_token_of_its_own_row():
    decoder, ids = _decoder(), _ids()
    mine = ids.clone()
    mine[0, :4] = -100
    output = decoder(ids, labels=mine)
    loss, logits = output.loss, output.logits
    rows = [F.cross_entropy(logits[row, :-1], mine[row, 1:], reduction="sum") for row in range(2)]
    torch.testing.assert_close(loss, sum(rows) / (5 + 8))
    assert decoder(ids).loss is None
    shifted = F.pad(mine[:, 1:], (0, 1), value=-100)
    torch.testing.assert_close(decoder(ids, labels=mine, shift_labels=shifted).loss, loss)


def test_only_differences_of_positions_count():
    decoder, ids = _decoder(), _ids()
    positions = torch.arange(ids.shape[1]).expand(ids.shape)
    torch.testing.assert_close(decoder(ids, position_ids=positions).logits, decoder(ids).logits, rtol=0, atol=0)
    far = decoder(ids, position_ids=positions + 1_000_000).logits
    torch.testing.assert_close(far, decoder(ids).logits, rtol=1e-8, atol=1e-8)
    assert not torch.allclose(decoder(ids, position_ids=positions * 2).logits, far, rtol=1e-3)


def test_its_parameters_depend_on_the_seed_alone():
    torch.manual_seed(1)
    first = Decoder(CONFIG, seed=5).state_dict()
    torch.manual_seed(2)
    same, other = Decoder(CONFIG, seed=5).state_dict(), Decoder(CONFIG, seed=6).state_dict()
    torch.set_default_dtype(torch.float64)
    try:
        wide = Decoder(CONFIG, seed=5).state_dict()
    finally:
        torch.set_default_dtype(torch.float32)
    for name, weight in first.items():
        assert torch.equal(weight, same[name])
        assert torch.equal(weight, wide[name].float())
        assert torch.equal(weight, other[name]) == (weight.ndim == 1)


def test_what_is_added_to_the_residual_stream_starts_small():
    config = DecoderConfig(vocab=64, layers=8, hidden=64, heads=4, kv_heads=4, head_dim=16, ffn=128)
    for name, weight in Decoder(config).named_parameters():
        if weight.ndim == 2:
            expected = 0.005 if name.endswith(("out.weight", "down.weight")) else 0.02
            assert weight.std().item() == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_parameters_they_promise(name):
    published = {"llama-1b": 1_235_814_400, "llama-8b": 8_030_261_248, "llama-70b": 70_553_706_496}
    with torch.device("meta"):
        decoder = Decoder(PRESETS[name])
    assert sum(parameter.numel() for parameter in decoder.parameters()) == PRESETS[name].parameters
    assert PRESETS[name].parameters == published.get(name, PRESETS[name].parameters)


@pytest.mark.parametrize("tied", [True, False])
def test_flops_are_those_that_pytorch_counts(tied):
    def dense(q, k, v, **_):
        q, k, v = (x.transpose(1, 2) for x in (q, *(x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))))
        return ((q @ k.mT).softmax(-1) @ v).transpose(1, 2)

    tokens = 16
    decoder = Decoder(DecoderConfig(**{**vars(CONFIG), "tied": tied}), attention=dense)
    ids = _ids(1, tokens)
    with FlopCounterMode(display=False) as counter:
        F.cross_entropy(decoder(ids).logits.flatten(0, 1), ids.flatten()).backward()
    # Dense attention computes every pair of tokens; a causal one sees (tokens + 1) / 2 keys, so twice the tokens, less one.
    assert counter.get_total_flops() == tokens * decoder.config.flops_per_token(2 * tokens - 1)


def test_it_calls_the_attention_and_the_loss_it_is_given():
    calls = []

    def attention(q, k, v, **keywords):
        calls.append((tuple(q.shape), tuple(k.shape), keywords))
        return attend(q, k, v, **keywords)

    def loss(hidden, weight, labels, *, longspan):
        calls.append(longspan.num_labels)
        return hidden.sum() * 0 + 7

    decoder = Decoder(CONFIG, attention=attention)
    decoder.cross_entropy = loss
    step = shard_local({"input_ids": _ids(), "labels": _ids()}, MeshCoordinate(), mask=Window(3))["longspan"]
    assert decoder(_ids(), shift_labels=_ids(), longspan=step).loss.item() == 7
    assert calls == [((2, 9, 4, 6), (2, 9, 2, 6), {"mask": Window(3) & Causal(), "tokens": 9})] * 2 + [16]
    calls.clear()
    decoder(_ids())
    assert calls[0][2] == {"mask": Causal(), "tokens": None}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_checkpointed_blocks_give_the_same_gradients(dtype):
    plain, again = _decoder().to(dtype), _decoder().to(dtype)
    for block in again.blocks:
        block.forward = _checkpointed(block.forward)
    for decoder in (plain, again):
        decoder(_ids(), labels=_ids()).loss.backward()
    for one, other in zip(plain.parameters(), again.parameters()):
        assert torch.equal(one.grad, other.grad)


def _checkpointed(forward):
    return lambda *args: checkpoint(forward, *args, use_reentrant=False)


def test_a_batch_without_rows_has_zero_loss_and_zero_gradients():
    decoder = _decoder()
    output = decoder(_ids(0), labels=_ids(0))
    loss = output.loss
    loss.backward()
    assert output.logits.shape == (0, 9, CONFIG.vocab)
    assert loss.item() == 0
    assert all(torch.equal(parameter.grad, torch.zeros_like(parameter)) for parameter in decoder.parameters())


def test_autocast_trains_in_bfloat16():
    decoder = Decoder(CONFIG)
    with torch.autocast("cpu", torch.bfloat16):
        output = decoder(_ids(), labels=_ids())
        loss, logits = output.loss, output.logits
    loss.backward()
    assert (loss.dtype, logits.dtype, decoder.embed.weight.grad.dtype) == (torch.float32, torch.bfloat16, torch.float32)
    torch.testing.assert_close(loss, Decoder(CONFIG)(_ids(), labels=_ids()).loss, rtol=1e-2, atol=0)


def test_labels_that_were_cut_without_a_shift_are_refused():
    step = shard_local({"input_ids": _ids()}, MeshCoordinate())["longspan"]
    with pytest.raises(ModelError, match="shift=True"):
        _decoder()(_ids(), labels=_ids(), longspan=step)


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"layers": 0}, ModelError, "layers=0 must be at least 1"),
        ({"head_dim": 7}, ModelError, "head_dim=7 must be even"),
        ({"kv_heads": 3}, LayoutError, "multiple of the key/value heads"),
    ],
)
def test_a_shape_that_cannot_be_built_is_refused(changes, error, text):
    with pytest.raises(error, match=text):
        DecoderConfig(**{**vars(CONFIG), **changes})


def test_every_rank_builds_the_same_decoder(tmp_path):
    first, *others = on_ranks(3, _weights, tmp_path=tmp_path)
    for weights in others:
        torch.testing.assert_close(weights, first, rtol=0, atol=0)


def _weights():
    torch.manual_seed(torch.distributed.get_rank())
    return Decoder(CONFIG).state_dict()
