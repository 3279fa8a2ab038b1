import torch

from longspan.models.rope import rope, rotate


def test_positions_stay_sharp_at_a_million_tokens():
    q, k = torch.randn(2, 1, 8, 1, 64, generator=torch.Generator().manual_seed(0)).unbind()
    near = torch.arange(8)[None]
    scores = []
    for positions in (near, near + 1_000_000):
        cos, sin = rope(positions, 64, 500_000.0, torch.float32)
        assert cos.dtype == sin.dtype == torch.float32
        scores.append(torch.einsum("bqhd,bkhd->bhqk", rotate(q, cos, sin), rotate(k, cos, sin)))
    torch.testing.assert_close(*scores, rtol=0, atol=3e-5)


def test_half_precision_is_rotated_in_fp32():
    x = torch.randn(1, 5, 2, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    cos, sin = rope(torch.arange(5)[None] + 777_777, 8, 1e4, torch.bfloat16)
    exact = rope(torch.arange(5)[None] + 777_777, 8, 1e4, torch.float64)
    rotated = rotate(x, cos, sin)
    assert rotated.dtype == torch.bfloat16
    assert torch.equal(rotated, rotate(x.double(), *exact).bfloat16())
