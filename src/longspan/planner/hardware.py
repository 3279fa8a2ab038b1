"""Accelerators, nodes and networks: peak rates, memory, links, each figure with its source. Numbers only.

    Accelerator   peak and measured matrix rate by dtype, measured attention rate, memory, memory bandwidth
    Link          bandwidth of one direction that collectives were measured to reach, latency of one hop
    Cluster       accelerators in nodes: links inside a node and between nodes, host memory, link to the host

"Measured" figures are from other people's benchmarks (``source``), not from longspan: nothing of longspan has run on a GPU.
Bandwidths are in bytes a second and direction, rates in operations a second, sizes in bytes.
"""

from dataclasses import dataclass, field, replace
from difflib import get_close_matches

from longspan.errors import LayoutError

TERA, GIGA, MICRO = 1e12, 1e9, 1e-6
MOST_GPUS = 1 << 20
"""Accelerators of the largest cluster that is searched."""

SPEC = "the vendor's data sheet (dense rates, without sparsity)"
MAMF = "stas00/ml-engineering, maximum achievable matmul rate"
FLASH2 = "Dao-AILab/flash-attention, kernel figures, head dim 128, causal, 16,384 tokens"
MAGI = "SandAI MagiAttention, kernel and context-parallel benchmarks (FlashAttention-3 on H100, cuDNN on B200)"
NCCL = "nccl-tests: all-gather and reduce-scatter bus bandwidth (stas00/ml-engineering, 16 GiB, 8 GPUs)"


@dataclass(frozen=True)
class Link:
    """A link of one accelerator: to the others of its node, to the network, or to its host.

    Attributes:
        name: what the plan calls it.
        bandwidth: bytes a second in one direction that collectives reach on it.
        latency: seconds that one hop of a collective costs beside its bytes.
        source: where the figures are from.
    """

    name: str
    bandwidth: float
    latency: float
    source: str


@dataclass(frozen=True)
class Attention:
    """Measured rates of a fused attention kernel at many keys a query.

    Attributes:
        forward, backward: operations a second, counted on the area of the mask.
        source: where the figures are from.
    """

    forward: float
    backward: float
    source: str


@dataclass(frozen=True)
class Accelerator:
    """One device.

    Attributes:
        name: what a user calls it.
        peak: dense operations a second by dtype, from the data sheet; a share of peak refers to it.
        matmul: operations a second that large matrix products were measured to reach, by dtype.
        attention: measured rates of attention kernels by name: "flash" (FlashAttention-2, what PyTorch runs), "fused" (the
            vendor's or FlashAttention-3).
        memory: bytes that a process can allocate.
        bandwidth: bytes a second of the device's memory.
        elementwise: bytes a second that element-wise operators were measured to reach; None: ``bandwidth``.
        multiprocessors: units over which the tiles of a matrix product are spread.
        source: where the figures are from.
    """

    name: str
    peak: dict[str, float] = field(hash=False)
    matmul: dict[str, float] = field(hash=False)
    attention: dict[str, Attention] = field(hash=False)
    memory: float
    bandwidth: float
    multiprocessors: int
    source: str
    elementwise: float | None = None


@dataclass(frozen=True)
class Cluster:
    """Nodes of equal accelerators.

    Attributes:
        accelerator: the device.
        gpus: accelerators of the whole cluster.
        gpus_per_node: accelerators with a fast link to each other.
        inside: link of one accelerator to the others of its node.
        between: link of one accelerator to other nodes (its share of the node's network).
        to_host: link of one accelerator to the memory of its host.
        host_memory: bytes of memory of one node's host.
        host_bandwidth: bytes a second of one node's host memory.
        price: cost of one accelerator for an hour, in any currency; None where it is not known.
    """

    accelerator: Accelerator
    gpus: int
    gpus_per_node: int
    inside: Link
    between: Link
    to_host: Link
    host_memory: float
    host_bandwidth: float
    price: float | None = None

    def __post_init__(self) -> None:
        if self.gpus < 1 or self.gpus_per_node < 1:
            raise LayoutError(f"gpus={self.gpus} and gpus_per_node={self.gpus_per_node} must both be at least 1")
        if self.gpus > MOST_GPUS:
            raise LayoutError(f"gpus={self.gpus:,} is more than a plan searches; use at most {MOST_GPUS:,}")
        if self.price is not None and not 0 < self.price < float("inf"):
            raise LayoutError(
                f"price={self.price:g} must be above 0 and finite; leave it out where the price of a GPU hour is not known"
            )

    @property
    def nodes(self) -> int:
        """The number of nodes, the last of which may be partly used."""
        return -(-self.gpus // self.gpus_per_node)


def _accelerator(
    name: str,
    bf16: float,
    fp8: float | None,
    reached: float,
    reached_fp8: float | None,
    flash: tuple[float, float],
    fused: tuple[float, float] | None,
    gib: float,
    bandwidth: float,
    multiprocessors: int,
    *,
    fp32: float,
    reached_source: str = MAMF,
    attention_source: str = FLASH2,
    memory_source: str = SPEC,
) -> Accelerator:
    """An Accelerator, a row of this file's tables, from rates in tera-operations a second, GiB of memory and TB/s.

    Args:
        name: what a user calls it.
        bf16, fp8, fp32: peak rates from the data sheet; None: it lacks the dtype.
        reached, reached_fp8: rates that large matrix products were measured to reach.
        flash, fused: measured (forward, backward) rates of attention kernels.
        gib, bandwidth, multiprocessors: memory, its bandwidth, and the units that compute.
        reached_source, attention_source, memory_source: where these figures are from.
    """
    peak = {"fp32": fp32 * TERA, "bf16": bf16 * TERA} | ({"fp8": fp8 * TERA} if fp8 else {})
    matmul = {"fp32": 0.85 * fp32 * TERA, "bf16": reached * TERA} | ({"fp8": reached_fp8 * TERA} if reached_fp8 else {})
    attention = {"flash": Attention(flash[0] * TERA, flash[1] * TERA, attention_source)}
    if fused is not None:
        attention["fused"] = Attention(fused[0] * TERA, fused[1] * TERA, MAGI)
    return Accelerator(
        name=name,
        peak=peak,
        matmul=matmul,
        attention=attention,
        memory=gib * 2**30,
        bandwidth=bandwidth * TERA,
        multiprocessors=multiprocessors,
        source=f"peak, bandwidth: {SPEC}; memory: {memory_source}; matmul: {reached_source}; attention: {attention_source}",
    )


_SCALED = "scaled from the nearest measured part by peak: nobody published it"

# A flash figure of FLASH2 is for forward and backward together; its parts are those with the measured ratio 1.15 : 0.95.
A100_40 = _accelerator(
    "A100-40GB", 312, None, 271.2, None, (205, 183), None, 39.4, 1.555, 108, fp32=19.5,
)  # fmt: skip
A100_80 = _accelerator(
    "A100-80GB", 312, None, 271.2, None, (205, 183), None, 79.3, 2.039, 108, fp32=19.5,
)  # fmt: skip
H100 = _accelerator(
    "H100", 989, 1979, 794.5, 1402.6, (390, 315), (650, 560), 79.3, 3.35, 132, fp32=67,
)  # fmt: skip
H200 = _accelerator(
    "H200", 989, 1979, 794.5, 1453.4, (390, 315), (650, 560), 139.8, 4.8, 132, fp32=67,
    reached_source=f"{MAMF} (fp8; bf16 as H100)",
)  # fmt: skip
B200 = _accelerator(
    "B200", 2250, 4500, 1745, 3432.5, (1170, 820), (1170, 820), 178.4, 8.0, 148, fp32=75, attention_source=MAGI,
)  # fmt: skip
GB200 = _accelerator(
    "GB200", 2500, 5000, 1822, 3584, (1230, 860), (1230, 860), 184.0, 8.0, 152, fp32=80,
    reached_source=f"{MAMF} (bf16; fp8 {_SCALED})", attention_source=f"{MAGI}, {_SCALED}",
)  # fmt: skip
GB300 = _accelerator(
    "GB300", 2500, 5000, 1822, 3584, (1230, 860), (1230, 860), 277.0, 8.0, 152, fp32=80,
    reached_source=f"{MAMF} (as GB200)", attention_source=f"{MAGI}, {_SCALED}",
)  # fmt: skip
MI300X = _accelerator(
    "MI300X", 1307, 2614, 708, 1160, (420, 300), None, 191.0, 5.3, 304, fp32=163,
    reached_source=f"{MAMF} of MI300X", attention_source=f"as H100's FlashAttention-2, {_SCALED}",
)  # fmt: skip
MI355X = _accelerator(
    "MI355X", 2516, 5033, 1700, 3300, (900, 640), None, 287.0, 8.0, 256, fp32=157,
    reached_source=_SCALED, attention_source=_SCALED,
)  # fmt: skip
L20 = _accelerator(
    "L20", 119.5, 239, 100, 190, (82, 70), None, 46_068 / 1024, 0.864, 92, fp32=59.8, reached_source=_SCALED,
    memory_source="nvidia-smi: 46,068 MiB of an L20",
)  # fmt: skip
H100_500W = replace(
    H100,
    name="H100-96GB-500W",
    matmul={name: rate * 500 / 700 for name, rate in H100.matmul.items()},
    attention={n: Attention(a.forward * 5 / 7, a.backward * 5 / 7, a.source) for n, a in H100.attention.items()},
    memory=95.0 * 2**30,
    bandwidth=2.4 * TERA,
    source="H100 with HBM2e at 500 W: rates of an H100 limited by its power, times 500/700; memory from torchtitan's report",
)

NVLINK3 = Link("NVLink 3", 230 * GIGA, 4 * MICRO, f"300 GB/s by the data sheet, the share of it that H200 reaches: {NCCL}")
NVLINK4 = Link("NVLink 4", 362 * GIGA, 4 * MICRO, f"450 GB/s by the data sheet, 362 measured: {NCCL}")
NVLINK4_H800 = Link("NVLink 4 of H800", 160 * GIGA, 4 * MICRO, "DeepSeek-V3 report: 160 GB/s effective")
NVLINK5 = Link("NVLink 5", 680 * GIGA, 4 * MICRO, f"900 GB/s by the data sheet, 682 measured: {NCCL}")
INFINITY = Link("Infinity Fabric", 330 * GIGA, 6 * MICRO, "448 GB/s by the data sheet (MI300X), the share that NVLink reaches")
PCIE4 = Link("PCIe 4 x16", 25 * GIGA, 10 * MICRO, "31 GB/s by the standard, about 80 % of it by copies")
PCIE5 = Link("PCIe 5 x16", 50 * GIGA, 8 * MICRO, "63 GB/s by the standard, about 80 % of it by copies")
C2C = Link("NVLink-C2C", 380 * GIGA, 4 * MICRO, "450 GB/s by the data sheet, about 85 % of it")
HDR200 = Link("200 Gbit/s a GPU", 24 * GIGA, 12 * MICRO, "25 GB/s by the standard, 0.97 of it measured (nccl-tests, NDR)")
NDR400 = Link("400 Gbit/s a GPU", 48.5 * GIGA, 12 * MICRO, "50 GB/s by the standard, 48.5 measured (nccl-tests, all-to-all)")
EFA = Link("EFA, 400 Gbit/s a GPU", 46 * GIGA, 30 * MICRO, "nccl figure of the Ultrascale playbook: 2 to 64 nodes, 256 MB")


def _node(accelerator: Accelerator, inside: Link, between: Link, to_host: Link, gpus: int = 8) -> Cluster:
    """A cluster that is one node of ``gpus`` accelerators, with 2 TB of host memory at 400 GB/s.

    Args:
        accelerator: the device.
        inside, between, to_host: its links to the others of the node, to other nodes, and to the host's memory.
        gpus: accelerators of the node.
    """
    return Cluster(
        accelerator=accelerator,
        gpus=gpus,
        gpus_per_node=gpus,
        inside=inside,
        between=between,
        to_host=to_host,
        host_memory=2e12,
        host_bandwidth=400 * GIGA,
    )


CLUSTERS = {
    "a100-40gb": _node(A100_40, NVLINK3, HDR200, PCIE4),
    "a100-80gb": _node(A100_80, NVLINK3, HDR200, PCIE4),
    "h100": _node(H100, NVLINK4, NDR400, PCIE5),
    "h100-efa": _node(H100, NVLINK4, EFA, PCIE5),
    "h200": _node(H200, NVLINK4, NDR400, PCIE5),
    "b200": _node(B200, NVLINK5, NDR400, PCIE5),
    "gb200": _node(GB200, NVLINK5, NDR400, C2C, gpus=72),
    "gb300": _node(GB300, NVLINK5, NDR400, C2C, gpus=72),
    "mi300x": _node(MI300X, INFINITY, NDR400, PCIE5),
    "mi355x": _node(MI355X, INFINITY, NDR400, PCIE5),
    "l20": _node(L20, PCIE4, HDR200, PCIE4),
}
"""Nodes by name. Networks are those of the reference designs; change them by ``between`` of a Cluster."""


def cluster(name: str, gpus: int, price: float | None = None) -> Cluster:
    """The cluster of ``gpus`` accelerators called ``name``.

    Args:
        name: a key of ``CLUSTERS``, in any case; "a100" is the 80 GB one.
        gpus: accelerators of the whole cluster.
        price: cost of one accelerator for an hour; None: it is not known.

    Returns:
        A Cluster; its nodes have at most the usual number of accelerators.

    Raises:
        LayoutError: the name is unknown, or ``gpus`` or ``price`` is not above 0.
    """
    key = {"a100": "a100-80gb"}.get(name.lower(), name.lower())
    if key not in CLUSTERS:
        near = "".join(f" (did you mean {other}?)" for other in get_close_matches(key, CLUSTERS, 1))
        raise LayoutError(f"the hardware {name!r} is unknown{near}; known are {', '.join(CLUSTERS)}")
    known = CLUSTERS[key]
    return replace(known, gpus=gpus, gpus_per_node=max(1, min(known.gpus_per_node, gpus)), price=price)


def named(device: str) -> str | None:
    """The key of ``CLUSTERS`` for a driver's name of a device ("NVIDIA H100 80GB HBM3"); None if it is not known."""
    name = device.lower()
    found = [key for key in CLUSTERS if all(part in name for part in key.split("-"))]
    return max(found, key=len, default=None)
