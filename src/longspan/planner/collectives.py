"""Time of a collective from its bytes, the ranks of its group and where they are. Numbers, or numpy arrays of them.

    all-gather, reduce-scatter   (n-1)/n · bytes / bandwidth + (n-1) · latency         a ring of n ranks
    all-reduce                   twice that, or a tree over nodes, whichever is shorter
    all-to-all                   each part over its own link: other ranks of the node, other nodes

An axis of degree n whose ranks are ``stride`` apart has r = min(n, gpus_per_node / stride) ranks in a node. A ring that crosses
nodes is limited by the network links of a node, which the groups of that node share.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from longspan.planner.closed_forms import Number
from longspan.planner.hardware import Cluster


@dataclass(frozen=True)
class Group:
    """The ranks along one axis, between which a collective runs.

    Attributes:
        ranks: the degree of the axis.
        stride: distance of two neighbours: the product of the degrees of the axes that vary faster.
        cluster: the cluster.
    """

    ranks: Number
    stride: Number
    cluster: Cluster

    @property
    def per_node(self) -> Number:
        """The number of ranks of the group in one node."""
        return np.minimum(self.ranks, np.maximum(1, self.cluster.gpus_per_node // self.stride))

    @property
    def crosses(self) -> Any:
        """Whether the group has ranks in several nodes."""
        return self.ranks > self.per_node

    @property
    def bandwidth(self) -> Number:
        """Bytes a second that one rank sends in a ring over the group.

        A node's links to the network are shared by the groups that cross it, one for each rank between two neighbours.
        """
        shared = np.minimum(self.stride, self.cluster.gpus_per_node)
        network = self.cluster.between.bandwidth * self.cluster.gpus_per_node / shared
        return np.where(self.crosses, np.minimum(network, self.cluster.inside.bandwidth), self.cluster.inside.bandwidth)

    @property
    def latency(self) -> Number:
        """Seconds of one hop from a rank to its neighbour, beside the bytes."""
        return np.where(self.crosses, self.cluster.between.latency, self.cluster.inside.latency)

    @property
    def nodes(self) -> Number:
        """The number of nodes that the group spans."""
        return np.ceil(self.ranks / self.per_node)


def gather_time(group: Group, size: Number) -> Number:
    """Seconds of an all-gather or reduce-scatter over ``group`` whose whole result, or input, is ``size`` bytes."""
    n = group.ranks
    return (n - 1) * (size / n / group.bandwidth + group.latency)


def all_reduce_time(group: Group, size: Number) -> Number:
    """Seconds of an all-reduce of ``size`` bytes over ``group``: a ring, or a tree over the nodes, whichever is shorter."""
    ring = 2 * gather_time(group, size)
    hops = 2 * (np.log2(np.maximum(group.nodes, 1)) * group.latency + (group.per_node - 1) * group.cluster.inside.latency)
    tree = 2 * size * (group.ranks - 1) / group.ranks / group.bandwidth + hops
    return np.minimum(ring, tree)


def all_to_all_time(group: Group, size: Number) -> Number:
    """Seconds of an all-to-all in which each rank has ``size`` bytes for all ranks of the group together."""
    n, near = group.ranks, group.per_node
    inside = size * (near - 1) / n / group.cluster.inside.bandwidth
    outside = size * (n - near) / n / group.cluster.between.bandwidth
    return np.where(n > 1, np.maximum(inside, outside) + group.latency, 0.0)


def send_time(group: Group, size: Number) -> Number:
    """Seconds in which a rank sends ``size`` bytes to its neighbour in the group."""
    bandwidth = np.where(group.crosses, group.cluster.between.bandwidth, group.cluster.inside.bandwidth)
    return np.where(group.ranks > 1, size / bandwidth + group.latency, 0.0)
