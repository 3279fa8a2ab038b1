"""longspan beside the libraries that people use today: python -m benchmarks.peers [--only a b ...] [--full]

    a  the exchange         quiet     b  an attention layer   quiet     c  a training step    quiet
    d  peak memory                    e  longest sequence               f  who is right

Each writes its section of docs/peers.md as soon as it is done. Times mean something only while nothing else runs; d, e and f
count bytes and errors, which other work does not change. Without --full: what one hour holds. With it: the larger sizes alone.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import replace

from benchmarks.peers import machine, page
from benchmarks.peers.contest import progress
from benchmarks.peers.items import exchange, layer, longest, memory, step, truth
from benchmarks.peers.page import Section

ITEMS: dict[str, tuple[str, Callable[[str], Section]]] = {
    "f": ("truth", truth.run),
    "a": ("exchange", exchange.run),
    "b": ("layer", layer.run),
    "c": ("step", step.run),
    "d": ("memory", memory.run),
    "e": ("longest", longest.run),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=sorted(ITEMS), default=sorted(ITEMS), help="work items")
    parser.add_argument("--full", action="store_true", help="the larger sizes, which take longer than an hour")
    parser.add_argument("--dry-run", action="store_true", help="print the tables and leave docs/peers.md as it is")
    arguments = parser.parse_args()
    scale = "full" if arguments.full else "quick"
    for letter, (name, run) in ITEMS.items():
        if letter not in arguments.only or (letter == "f" and arguments.full and len(arguments.only) > 1):
            continue
        progress(f"{letter}: {name}, {scale}")
        began = time.monotonic()
        section = run(scale)
        minutes = (time.monotonic() - began) / 60
        command = f'make bench{"-full" * arguments.full} ARGS="--only {letter}"'
        section = replace(section, text=f"{section.text}\n\n*{machine.describe()} `{command}`, {minutes:.0f} min.*")
        print(section.text, flush=True)
        if not arguments.dry_run:
            page.write(name if scale == "quick" or name == "truth" else f"{name}-full", section)


if __name__ == "__main__":
    main()
