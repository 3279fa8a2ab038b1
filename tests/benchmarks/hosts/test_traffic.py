"""Bytes that the kernel counts on two hosts, within 3% of the closed forms, and the tables of the three commands."""

import sys
from xml.etree import ElementTree

import pytest

from benchmarks.hosts import latency, namespaces, ranks, throughput, traffic
from benchmarks.hosts.forms import Size
from benchmarks.hosts.methods import BY_NAME, COUNTED, MEGATRON, TIMED, ULYSSES
from tests.helpers import processes


def _row(hosts: int, method: str, scale: float) -> traffic.Row:
    size = Size(tokens=256 * hosts, hidden=192, hosts=hosts)
    form = traffic.Row(method=BY_NAME[method], size=size, wire=(0, 0), payload=(0, 0)).form
    wire = (scale * form[0], scale * form[1])
    return traffic.Row(method=BY_NAME[method], size=size, wire=wire, payload=(float(form[0]), float(form[1])))


def names_in(svg: str) -> set[str | None]:
    return {text.text for text in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")}


def test_tables_and_figure_of_counted_bytes() -> None:
    rows = [_row(hosts, method, 1.01) for hosts in (2, 4) for method in (ULYSSES.name, MEGATRON.name)]
    assert rows[0].apart == pytest.approx((0.01, 0.01))
    text = traffic.text(rows)
    assert "| 4 x 1 | 4.00 | 4 |" in text
    assert "| 2 to 4 | 1.500 | 1.500 | 1.0000 |" in text
    assert {ULYSSES.name, MEGATRON.name} <= names_in(traffic.figure(rows))


def test_the_rate_of_a_cluster_is_that_of_equal_bytes_per_flop() -> None:
    cluster = throughput.Cluster(name="", flops=100e12, bytes_per_second=10e9)
    assert throughput.equal_rate(40e9, cluster) == pytest.approx(4e6 * 8 / 1e6)


def test_tables_of_throughput_and_where_it_crosses() -> None:
    def point(mbit: float) -> throughput.Point:
        slopes = {method.name: 100 + 400 * index for index, method in enumerate(TIMED)}
        methods = {
            name: throughput.Timed(seconds=[8 + slope / mbit], sent=2**20, collectives={}) for name, slope in slopes.items()
        }
        return throughput.Point(name="link", mbit=mbit, layers=8, flops_a_rank=40e9, tokens=8192, methods=methods)

    points = [point(50), point(200), point(1000)]
    text = throughput.text(points)
    assert "| link (200 Mbit/s) | 8 | Ulysses | 8.50 | 964 |" in text
    assert "Ulysses is 2.5 x Megatron-SP below 20.8 Mbit/s; " in text  # 8 + 500 x = 2.5 (8 + 100 x)
    assert {method.name for method in TIMED} <= names_in(throughput.figure(points))


def test_the_latency_is_fitted_on_other_sizes_than_those_it_is_compared_on() -> None:
    case = latency.WHOLE
    assert not set(case.fitted) & set(case.compared)
    assert len(case.compared) == 6
    empty = latency.Found(mbit=200, seconds={}, layer={}, case=case)
    both = {
        tokens: tuple(latency.COLLECTIVES[way] * 0.002 + empty.sent(tokens, way) / 24e6 for way in (0, 1))
        for tokens in case.fitted
    }
    measured, layer = dict.fromkeys(case.compared, (1.0, 2.0)), dict.fromkeys(case.compared, 5.0)
    found = latency.Found(mbit=200, seconds=both | measured, layer=layer, case=case)  # type: ignore[arg-type]
    assert found.line.offset == pytest.approx(0.002)
    assert found.predicted(4096, 0) == pytest.approx(0.004 + empty.sent(4096, 0) / 24e6)
    assert "2.00 ms a collective and 192 Mbit/s" in latency.text([found])
    assert latency.text([found]).count("| 40% |") == 6


@pytest.mark.long
@pytest.mark.skipif(namespaces.why_not() is not None, reason=str(namespaces.why_not()))
def test_counted_bytes_are_the_closed_forms_on_two_hosts() -> None:
    rows = traffic.measure(((2, 1),))
    assert [row.method for row in rows] == list(COUNTED)
    for row in rows:
        assert all(0 < apart < 0.03 for apart in row.apart), traffic.line(row)
        for payload, form in zip(row.payload, row.form):
            assert payload == pytest.approx(form, rel=0.01)


@pytest.mark.long
@pytest.mark.skipif(namespaces.why_not() is not None, reason=str(namespaces.why_not()))
@pytest.mark.parametrize(
    ("comparison", "printed"), [("accumulated", "| Megatron-SP | "), ("latency", "fitted on 256, 1,024 tokens")]
)
def test_a_timed_comparison_runs_to_its_table(comparison: str, printed: str) -> None:
    command = [sys.executable, "-m", "benchmarks.hosts", comparison, "--small"]
    done = processes.run(command, cwd=ranks.ROOT, env=ranks.environment(), timeout=300)
    assert done.returncode == 0, done.stderr
    assert printed in done.stdout
