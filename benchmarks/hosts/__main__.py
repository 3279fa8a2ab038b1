"""Comparisons on the wire, on several hosts of one machine: python -m benchmarks.hosts COMPARISON [--write]

    traffic       bytes of one layer, counted by the kernel, beside the closed forms; integers, also on a busy machine
    doubled       Ulysses' bytes of a link when tokens and ranks double from 20 to 40 hosts; a quarter of an hour, 20 GB
    throughput    a training step of each method over the rate of the links; on a quiet machine only
    accumulated   the same at 200 Mbit/s with eight rows a step, whose gradients are averaged once; ten minutes, quiet too
    latency       the time that Ulysses adds to a layer, beside its closed form; on a quiet machine only

``--write`` puts tables and figures into docs/wire.md. Needs root and iproute2 (Linux), without which it says so and ends.
"""

import argparse
import signal
import sys
from dataclasses import replace

from benchmarks.hosts import latency, page, throughput, traffic
from benchmarks.hosts.namespaces import why_not


def main() -> None:
    """Run one comparison."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.hosts", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("comparison", choices=sorted(COMPARISONS))
    parser.add_argument("--write", action="store_true", help="write the result into docs/wire.md")
    parser.add_argument(
        "--small", action="store_true", help="a few seconds of everything, to try the command; its times mean nothing"
    )
    arguments = parser.parse_args()
    reason = why_not()
    if reason is not None:
        print(f"skipped: {reason}")
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the hosts are removed
    COMPARISONS[arguments.comparison](arguments)


def _traffic(arguments: argparse.Namespace) -> None:
    rows = traffic.measure(((2, 1),)) if arguments.small else traffic.measure()
    _report(arguments, "traffic", traffic.text(rows), traffic.figure(rows))


def _doubled(arguments: argparse.Namespace) -> None:
    rows = traffic.measure_doubled((2, 4) if arguments.small else (20, 40))
    _report(arguments, "doubled", traffic.text(rows), None)


def _throughput(arguments: argparse.Namespace) -> None:
    found = throughput.measure(throughput.SMALL if arguments.small else throughput.WHOLE)
    _report(arguments, "throughput", throughput.text(found), throughput.figure(found))


def _accumulated(arguments: argparse.Namespace) -> None:
    found = throughput.measure(replace(throughput.ACCUMULATED, tokens=512) if arguments.small else throughput.ACCUMULATED)
    _report(arguments, "accumulated", f"{throughput.table(found)}\n\n{throughput.collectives(found)}", None)


def _latency(arguments: argparse.Namespace) -> None:
    found = latency.measure(latency.SMALL if arguments.small else latency.WHOLE)
    _report(arguments, "latency", latency.text(found), None)


def _report(arguments: argparse.Namespace, part: str, text: str, svg: str | None) -> None:
    print(text)
    if arguments.write:
        page.replace(part, text)
        if svg is not None:
            page.draw(f"wire-{part}.svg", svg)


COMPARISONS = {
    "traffic": _traffic, "doubled": _doubled, "throughput": _throughput, "accumulated": _accumulated, "latency": _latency,
}  # fmt: skip

if __name__ == "__main__":
    main()
