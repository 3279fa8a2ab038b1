"""Block sizes and thresholds that more than one file uses. Integers only, no torch."""

LOSS_TOKENS, LOSS_WORDS = 1024, 4096
"""Block of the chunked cross-entropy (tokens, vocabulary).

16 MiB of fp32 logits: small enough for a CPU's cache, large enough for an efficient GEMM.
"""
LOSS_TOKENS_ON_GPU, LOSS_WORDS_ON_GPU = 8192, 16384
"""The same on an accelerator: a block is about twelve launches, whose kernels must be long compared with a launch.

512 MiB of fp32 logits. Assumed, not measured: nothing has run on a GPU.
"""
HEAD_TILE_BYTES, HEAD_TILE_BYTES_ON_GPU = 64 * 2**20, 512 * 2**20
"""Size of one tile of fp32 logits where a Hugging Face model's own head forms them, on a CPU and on an accelerator.

Assumed for the accelerator, as above.
"""
SCRATCH_BYTES = 256 * 2**20
"""Largest buffer that an exchange packs into and keeps for the next one, and as much received memory that is free."""
SMALLEST_KEPT_BYTES = 2**20
"""Smallest received tensor whose memory is kept; the C library keeps smaller ones itself."""
BUCKET_BYTES = 25 * 2**20
"""Bytes of gradients in one all-reduce: large enough that its latency is negligible, small compared with the model."""
