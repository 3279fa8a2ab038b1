"""Benchmark: balance of scores and traffic over the ranks: python benchmarks/balance.py [--tokens 131072] [--ring 4]

Integers alone, so it runs at once and is exact. For each mask and layout: the scores of the fullest ring rank over the mean
(1.00 is even), and the keys that the ranks send in one pass, over what "every key to every other rank" would send. What heads
add on the ulysses axis is a factor of its own, printed below: the query heads of the fullest rank over the mean.
"""

import argparse
import random

from longspan.attention.ring import plan_hops
from longspan.distributed.layout import Heads, Layout
from longspan.masks.bands import area, localize
from longspan.masks.constructors import Causal, Chunked, Documents, Full, Mask, PrefixLM, SinkTokens, Window


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=131_072)
    parser.add_argument("--ring", type=int, default=4)
    arguments = parser.parse_args()
    print(f"tokens={arguments.tokens:,} ring={arguments.ring}\n")
    print(f"{'':34}{'fullest / mean':^24}{'keys sent / all':^24}")
    print(f"{'mask':34}{'contiguous':>12}{'zigzag':>12}{'contiguous':>12}{'zigzag':>12}")
    for name, mask in _masks(arguments.tokens).items():
        found = [_share(mask, Layout(arguments.tokens, arguments.ring, zigzag=zigzag)) for zigzag in (False, True)]
        print(f"{name:34}" + "".join(f"{pair[i]:12.3f}" for i in (0, 1) for pair in found))
    print("\nquery heads of the fullest ulysses rank / mean")
    for heads, kv, ulysses in [(32, 8, 8), (28, 4, 8), (40, 8, 16), (3, 1, 2)]:
        dealt = Heads(heads, kv, ulysses)
        print(f"  {heads} query, {kv} key/value heads on {ulysses} ranks: {len(dealt.query_of(0)) * ulysses / heads:.3f}")


def _masks(tokens: int) -> dict[str, Mask]:
    draw = random.Random(0)
    short, mixed = ([min(int(draw.paretovariate(1.2) * scale), tokens) for _ in range(tokens)] for scale in (200, 2000))
    return {
        "Causal()": Causal(),
        "Full()": Full(),
        "Window(4095)": Window(4095),
        "Window(1023) | SinkTokens(4) & Causal()": Window(1023) | (SinkTokens(4) & Causal()),
        f"PrefixLM({tokens // 8})": PrefixLM(tokens // 8),
        "Chunked(8192) & Causal()": Chunked(8192) & Causal(),
        "documents of about 500, causal": Documents(_filled(short, tokens)) & Causal(),
        "documents of about 5,000, causal": Documents(_filled(mixed, tokens)) & Causal(),
        "one document of 3/4, then short": Documents([tokens * 3 // 4, *_filled(short, tokens - tokens * 3 // 4)]) & Causal(),
    }


def _filled(lengths: list[int], tokens: int) -> list[int]:
    """The first of ``lengths`` that fit into ``tokens``, the last one cut."""
    filled: list[int] = []
    for length in lengths:
        left = tokens - sum(filled)
        if left <= 0:
            break
        filled.append(min(length, left))
    return filled


def _share(mask: Mask, layout: Layout) -> tuple[float, float]:
    bands = mask.bands(layout.tokens, layout.tokens)
    held = [layout.runs(rank) for rank in range(layout.ring)]
    areas = [area(localize(bands, runs, (range(layout.tokens),))) for runs in held]
    sent = sum(len(run) for rank in range(layout.ring) for hop in plan_hops(bands, held, held, rank)[1:] for run in hop.leaving)
    return max(areas) * layout.ring / sum(areas), sent / (layout.tokens * (layout.ring - 1))


if __name__ == "__main__":
    main()
