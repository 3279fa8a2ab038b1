"""Errors of predictions on published runs by kind of layout and source, as make validate-planner writes them."""

Row = tuple[str, str, int, float]
"""Kind of layout, source, number of runs, median relative error."""

STEP_TIME: tuple[Row, ...] = (
    ("offload", "HF blog ulysses-sp (huggingface/blog ulysses-sp.md)", 3, 0.461),
    ("offload", "ALST arXiv:2506.13996 (+ArcticTraining b28638e)", 4, 0.062),
    ("model", "Korthikanti et al. arXiv:2205.05198", 5, 0.17),
    ("model", "NeMo docs performance_long_sequence.md", 2, 0.167),
    ("model", "Megatron-LM d98e8a6 README model_table.png", 3, 0.126),
    ("model", "torchtitan b5bcd76 benchmarks/llama3_h100_202412", 2, 0.097),
    ("model", "NeMo 24.07 performance summary (DGX-H100 FP8)", 9, 0.066),
    ("sequence", "XTuner b934f46 docs legacy/acceleration/benchmark.rst", 2, 0.046),
    ("data", "Ultrascale playbook (vinjn mirror 924e4d0)", 6, 0.207),
    ("data", "Megatron-Bridge 067f987 performance-summary-archive 26.04", 2, 0.124),
    ("data", "torchtune bd2a0fc README", 3, 0.123),
    ("data", "Megatron-Bridge 067f987 performance-summary-archive 26.04.01", 2, 0.116),
    ("data", "Megatron-Bridge 067f987 performance-summary-archive 26.02", 2, 0.109),
    ("data", "Megatron-Bridge 067f987 performance-summary-archive 26.02.01", 2, 0.1),
    ("data", "mosaicml/llm-foundry 8c8dd48 scripts/train/benchmarking/README.md", 78, 0.1),
    ("data", "XTuner b934f46 docs legacy/acceleration/benchmark.rst", 2, 0.083),
    ("data", "NeMo 24.07 performance summary (DGX-H100 FP8)", 2, 0.077),
    ("data", "InternEvo c628a8c doc/en/train_performance.md", 16, 0.06),
    ("data", "Megatron-Bridge 067f987 performance-summary-archive 25.09", 4, 0.054),
    ("data", "torchtitan b5bcd76 benchmarks/llama3_h100_202412", 4, 0.054),
    ("data", "Megatron-Bridge 067f987 performance-summary-archive 25.11", 6, 0.032),
)
MEMORY: tuple[Row, ...] = (
    ("offload", "HF blog ulysses-sp (huggingface/blog ulysses-sp.md)", 3, 0.631),
    ("data", "torchtitan b5bcd76 benchmarks/llama3_h100_202412", 4, 0.052),
    ("data", "torchtune bd2a0fc README", 3, 0.039),
)
