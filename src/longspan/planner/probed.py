"""A measured machine: the JSON that ``longspan probe`` writes, read as a Cluster that a plan can use.

    longspan probe  ->  {"name", "ranks", "matmul": {dtype: {size: rate}}, "attention", "bandwidth", "links", ...}  ->  Cluster

Rates are operations a second, bandwidths bytes a second, times seconds, sizes bytes. The best size counts as what large
products reach. One kind of link was measured: the plan uses it inside a node and between nodes.
"""

import json
import math
from pathlib import Path
from typing import Any, cast

from longspan.errors import LayoutError
from longspan.planner.hardware import Accelerator, Attention, Cluster, Link
from longspan.planner.setting import Constants

KEYS = ("name", "ranks", "memory", "host_memory", "matmul", "attention", "bandwidth", "to_host", "links")
"""What the file must have."""


def read_cluster(path: str | Path, gpus: int | None = None, price: float | None = None) -> Cluster:
    """Read the file that ``longspan probe`` wrote.

    Args:
        path: the file.
        gpus: devices of the cluster (default: the ranks that were measured).
        price: cost of one device for an hour.

    Returns:
        A Cluster of devices like the one measured.

    Raises:
        LayoutError: the file cannot be read, or lacks a figure.
    """
    found = _read(path)
    source = f"longspan probe, {path}"
    matmul = {dtype: max(rates.values()) for dtype, rates in found["matmul"].items()}
    # the formulas slow a kernel down by the ratio of the dtypes' matrix rates; attention was measured in fp32
    ratio = matmul["bf16"] / matmul["fp32"]
    rates = found["attention"]
    device = Accelerator(
        name=found["name"],
        peak=matmul,
        matmul=matmul,
        attention={"flash": Attention(rates["forward"] * ratio, rates["backward"] * ratio, source)},
        memory=found["memory"],
        bandwidth=found["bandwidth"],
        multiprocessors=1,
        source=source,
        elementwise=found.get("training", {}).get("elementwise"),
    )
    links = found["links"].values()
    link = Link(
        "measured",
        min((one["bandwidth"] for one in links), default=found["bandwidth"]),
        max((one["latency"] for one in links), default=0.0),
        source,
    )
    count = gpus or int(found["ranks"])
    return Cluster(
        accelerator=device,
        gpus=count,
        gpus_per_node=min(count, int(found["ranks"])),
        inside=link,
        between=link,
        to_host=Link("host", found["to_host"], 0.0, source),
        host_memory=found["host_memory"],
        host_bandwidth=found["bandwidth"],
        price=price,
    )


def read_constants(path: str | Path) -> Constants:
    """The constants of a machine that ``longspan probe`` measured, in place of those fitted to published measurements.

    Nothing is reserved beside the tensors. A file of an earlier version keeps the fitted ``matmul`` and ``attention_keys``.

    Args:
        path: the file.

    Raises:
        LayoutError: the file cannot be read, or lacks a figure.
    """
    found, fitted = _read(path), Constants()
    return Constants(
        matmul=found.get("training", {}).get("matmul_share", {}).get("fp32", fitted.matmul),
        attention_keys=found["attention"].get("keys", fitted.attention_keys),
        dispatch=found.get("dispatch", fitted.dispatch),
        host_update=fitted.host_update,
        reserve=0.0,
    )


def _read(path: str | Path) -> dict[str, Any]:
    """The contents of the file. Raises LayoutError for one that cannot be read, or lacks a figure or has one that is none."""
    try:
        found: Any = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise LayoutError(f"the hardware {path} cannot be read ({error}); name a file that longspan probe wrote") from error
    missing = [key for key in KEYS if not isinstance(found, dict) or key not in found]
    if missing:
        raise LayoutError(f"the hardware {path} lacks {', '.join(missing)}; name a file that longspan probe wrote")
    try:
        figures = _figures(found)
    except (AttributeError, KeyError, TypeError) as bad:
        raise LayoutError(
            f"the hardware {path} is not as longspan probe writes it ({type(bad).__name__}: {bad}); probe this machine again"
        ) from bad
    for name, value in figures.items():
        if isinstance(value, bool) or not (isinstance(value, int | float) and 0 < value < math.inf):
            raise LayoutError(
                f"the hardware {path} has {name} = {value!r}, which must be a number above 0; probe this machine again"
            )
    return cast("dict[str, Any]", found)


def _figures(found: dict[str, Any]) -> dict[str, Any]:
    """What a plan divides by, by name."""
    figures = {name: found[name] for name in ("ranks", "memory", "host_memory", "bandwidth", "to_host")}
    figures |= {f"attention {way}": found["attention"][way] for way in ("forward", "backward")}
    for dtype in ("fp32", "bf16"):
        figures |= {f"matmul {dtype} {size}": rate for size, rate in found["matmul"][dtype].items()}
    return figures | {
        f"links {name} {one}": link[one] for name, link in found["links"].items() for one in ("bandwidth", "latency")
    }
