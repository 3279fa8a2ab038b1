"""Block sizes and thresholds that more than one file uses. Integers only, no torch."""

LOSS_TOKENS, LOSS_WORDS = 1024, 4096
"""Block of the chunked cross-entropy (tokens, vocabulary).

16 MiB of fp32 logits: small enough for a CPU's cache, large enough for an efficient GEMM.
"""
HEAD_TILE_BYTES = 64 * 2**20
"""Size of one tile of fp32 logits where a Hugging Face model's own head forms them."""
SCRATCH_BYTES = 256 * 2**20
"""Largest buffer that an exchange packs into and keeps for the next one, and as much received memory that is free."""
SMALLEST_KEPT_BYTES = 2**20
"""Smallest received tensor whose memory is kept; the C library keeps smaller ones itself."""
