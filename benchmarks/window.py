"""How much faster a window is than full causal attention: the kernel alone, forward and backward, CPU seconds of one thread.

    python benchmarks/window.py --help
    python benchmarks/window.py --tokens 32768 --heads 8 --dim 64 --windows 255 1023 4095 --dtypes float32 bfloat16

The causal run is long, so it is timed on one head between the windows' runs and multiplied by the heads, which the operator
treats one after another; --whole times all heads. "ideal" is the ratio of the areas: what a kernel without any overhead gets.
"""

import argparse
import statistics
import time
from collections.abc import Sequence

import torch

from longspan.bands import Band, area
from longspan.kernels.sdpa import SDPA
from longspan.masks import Causal, Window


def seconds(tensors: Sequence[torch.Tensor], bands: Sequence[Band]) -> float:
    """CPU seconds of one forward and backward: one thread's own time, whatever else the machine does."""
    q, k, v, dout = tensors
    kernel, scale = SDPA(), q.shape[2] ** -0.5
    start = time.process_time()
    out, lse = kernel.forward(q, k, v, bands, scale)
    kernel.backward(dout, q, k, v, out, lse, bands, scale)
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--windows", type=int, nargs="+", default=[255, 1023, 4095], help="keys to the left of a query")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=3, help="medians are printed; causal and windows take turns")
    parser.add_argument("--whole", action="store_true", help="time causal on all heads")
    args = parser.parse_args()
    torch.set_num_threads(1)
    causal = Causal().bands(args.tokens, args.tokens)
    windows = {left: Window(left).bands(args.tokens, args.tokens) for left in args.windows}
    causal_heads = args.heads if args.whole else 1
    shape = f"{args.tokens} tokens, {args.heads} heads x {args.dim}"
    print(f"{shape}, one thread, torch {torch.__version__}; causal on {causal_heads} of the heads")
    print("| dtype | mask | CPU seconds | x faster than causal | ideal |")
    print("| --- | --- | --- | --- | --- |")
    for dtype in args.dtypes:
        tensors = torch.randn(4, args.tokens, args.heads, args.dim).to(getattr(torch, dtype)).unbind()
        part = [x[:, :causal_heads] for x in tensors]
        times: dict[int | None, list[float]] = {None: [], **{left: [] for left in windows}}
        for _ in range(args.repeats):
            times[None].append(seconds(part, causal) * args.heads / causal_heads)
            for left, bands in windows.items():
                times[left].append(seconds(tensors, bands))
        whole = statistics.median(times[None])
        print(f"| {dtype} | Causal() | {whole:.2f} | 1.0 | 1.0 |", flush=True)
        for left, bands in windows.items():
            took = statistics.median(times[left])
            ideal = area(causal) / area(bands)
            print(f"| {dtype} | Window({left}) | {took:.2f} | {whole / took:.1f} | {ideal:.1f} |", flush=True)


if __name__ == "__main__":
    main()
