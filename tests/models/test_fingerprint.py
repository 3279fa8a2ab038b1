import pytest
import torch
from torch import nn

from longspan.errors import ModelError
from longspan.models import fingerprint as module
from longspan.models.fingerprint import fingerprints

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.complex64, torch.complex128]


def _of(tensor: torch.Tensor) -> str:
    holder = nn.Module()
    holder.register_buffer("held", tensor)
    return fingerprints(holder)["held"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_bit_and_each_place_counts(dtype, monkeypatch):
    """Also across the pieces that are hashed at a time, of which the last is smaller."""
    monkeypatch.setattr(module, "PIECE", 8)
    x = (torch.arange(21) % 5 if dtype is not torch.bool else torch.arange(21) % 4 == 1).reshape(3, 7).to(dtype)
    found = {_of(x), _of(x.flip(0)), _of(x.roll(8)), _of(x[:, :6]), _of(x.reshape(7, 3))}
    bits = x.flatten().view(torch.uint8)
    for byte in range(0, len(bits), 5):
        changed = bits.clone()
        changed[byte] ^= 1
        found.add(_of(changed.view(dtype).reshape(3, 7)))
    assert len(found) == 5 + len(range(0, len(bits), 5))


def test_what_is_equal_has_one_hash_whatever_its_strides():
    x = torch.randn(5, 4)
    assert _of(x) == _of(x.clone()) == _of(x.T.contiguous().T) != _of(-x)
    assert _of(torch.zeros(4)) != _of(-torch.zeros(4))
    assert _of(torch.ones(4, dtype=torch.float64)) != _of(-torch.ones(4, dtype=torch.float64))


def test_a_hash_is_a_number_that_every_device_computes():
    """Worked out by Python's integers, which have no width."""
    signed = lambda x: (x + 2**63) % 2**64 - 2**63  # noqa: E731
    total = 0
    for place, value in enumerate([3, -1, 7]):
        mixed = signed((place + 1) * module.MIX)
        total += value * (signed((mixed ^ mixed >> 31) * module.STEP) | 1)
    assert _of(torch.tensor([3, -1, 7], dtype=torch.int32)).endswith(f"{total % 2**64:016x}")


def test_names_shapes_and_training_are_in_it_and_what_has_no_content_is_refused():
    model = nn.Linear(2, 3)
    model.bias.requires_grad_(False)
    assert [text[: text.rindex(" ")] for text in fingerprints(model).values()] == [
        "[3, 2] torch.float32 trained=True", "[3] torch.float32 trained=False"
    ]  # fmt: skip
    assert _of(torch.zeros(0, 3)).endswith("0" * 16)
    with pytest.raises(ModelError, match="the model is on the meta device"):
        fingerprints(nn.Linear(2, 3, device="meta"))
