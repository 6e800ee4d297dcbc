"""In what order the units of a masked network can be computed while its inputs become known one after another.

The level of an input is 1 + the largest level of the inputs that its parameters depend on; the degree of a unit is the
largest level of the inputs that it depends on, 0 for none. Step s takes the inputs of level s, then the units of degree
s: each unit once, when its last input is known (Germain et al. 2015, MADE, arXiv:1502.03509, eq. 13-14, where the
degrees come first and the masks from them). With a full autoregressive order there is one input to a level.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from pygen.ops.masked_network import MaskedNetwork

Integers = NDArray[np.int64]
Booleans = NDArray[np.bool_]

# A block of steps ends when a node has this many rows in it: enough for whole panels, few beside the network.
BLOCK_ROWS = 48


def masks_of(network: MaskedNetwork) -> dict[int, Booleans]:
    """For each linear node (units, sources): which weights count. A mask with other numbers than 0 and 1 is refused."""
    masks: dict[int, Booleans] = {}
    for index, node in enumerate(network.nodes):
        if node.kind == "linear":
            mask = getattr(node.layer, "mask", None)
            if mask is None:
                masks[index] = np.ones((node.units, network.nodes[node.sources[0]].units), np.bool_)
            else:
                mask = mask.detach()[:, slice(*node.columns)]
                other = mask[(mask != 0) & (mask != 1)]
                if len(other):
                    raise ValueError(
                        f"the mask of {type(node.layer).__name__}, node {index} of network, has {other[0].item()}, but "
                        "expected zeros and ones"
                    )
                masks[index] = (mask != 0).cpu().numpy()
    return masks


def dependencies(network: MaskedNetwork, masks: dict[int, Booleans]) -> dict[int, Booleans]:
    """For each node that x has a part in, (units, features): which inputs a unit depends on."""
    reached: dict[int, Booleans] = {0: np.eye(network.features, dtype=np.bool_)}
    for index, node in enumerate(network.nodes):
        known = [reached[source] for source in node.sources if source in reached]
        if known and node.kind == "linear":
            paths = torch.from_numpy(masks[index]).float() @ torch.from_numpy(known[0]).float()
            reached[index] = (paths > 0).numpy()
        elif known:
            reached[index] = np.logical_or.reduce(known)
    return reached


def levels_of(reach: Booleans) -> Integers:
    """The level of each input, from 1, where output i depends on the inputs reach[i]; a cycle is refused."""
    missing = reach.sum(1)
    levels = np.zeros(len(reach), np.int64)
    level = 0
    while (ready := np.flatnonzero((missing == 0) & (levels == 0))).size:
        level += 1
        levels[ready] = level
        missing = missing - reach[:, ready].sum(1)
    stuck = levels == 0
    if stuck.any():
        _refuse(reach & stuck[:, None] & stuck)
    return levels


def _refuse(reach: Booleans) -> None:
    own = np.flatnonzero(reach.diagonal())
    if own.size:
        raise ValueError(f"network is not autoregressive: output {own[0]} depends on input {own[0]}, its own")
    # Every output that is left depends on an input that is left, so that a walk along them comes back.
    path = [int(np.flatnonzero(reach.any(1))[0])]
    while (following := int(np.flatnonzero(reach[path[-1]])[-1])) not in path:
        path.append(following)
    cycle = path[path.index(following) :]
    i, j = next((i, j) for i, j in zip(cycle, [*cycle[1:], cycle[0]], strict=True) if i < j)
    others = " through others" if len(cycle) > 2 else ""
    raise ValueError(
        f"network is not autoregressive: output {i} depends on input {j}, and output {j} on input {i}{others}"
    )


class Placement:
    """A row for every unit that x has a part in: those of a node together, in the order of their steps.

    unit_of: (features, per input), the output unit that is the k-th parameter of input i.
    """

    def __init__(self, network: MaskedNetwork, unit_of: Integers) -> None:
        features, per_input = unit_of.shape
        if features != network.features or unit_of.size != network.outputs:
            raise ValueError(
                f"network has {network.outputs} outputs for {network.features} features, but expected {per_input} for "
                "each feature"
            )
        self.masks = masks_of(network)
        reached = dependencies(network, self.masks)
        self.output = len(network.nodes) - 1
        if self.output not in reached or self.output == 0:
            raise ValueError("the last node of network does not depend on x, but expected the parameters of the map")
        self.levels = levels_of(np.logical_or.reduce(reached[self.output][unit_of], axis=1))
        self.last = int(self.levels.max())
        self.nodes = sorted(reached)
        self.order: dict[int, Integers] = {}  # the units of a node in the order of their rows
        self.steps: dict[int, Integers] = {}  # the step of each of these, ascending
        self.base: dict[int, int] = {}  # the first row of a node
        self.row_of: dict[int, Integers] = {}  # the row of a unit
        self.rows = 0
        for index in self.nodes:
            if index == self.output:
                by_level = np.argsort(self.levels, kind="stable")
                order = unit_of[by_level].reshape(-1)
                steps = np.repeat(self.levels[by_level], per_input)
            else:
                degrees = (reached[index] * self.levels).max(1)
                order = np.argsort(degrees, kind="stable")
                steps = degrees[order]
            self.base[index], self.order[index], self.steps[index] = self.rows, order, steps
            self.row_of[index] = np.empty_like(order)
            self.row_of[index][order] = self.rows + np.arange(len(order))
            self.rows += len(order)
        self.blocks = self._blocks()

    def range(self, index: int, first: int, last: int) -> tuple[int, int]:
        """The rows of a node, from 0, whose steps are first .. last. Units of the last step serve no output: none."""
        if index not in (0, self.output):
            last = min(last, self.last - 1)
        begin, end = np.searchsorted(self.steps[index], (first, last + 1))
        return int(begin), max(int(begin), int(end))

    def locate(self, index: int, units: Integers | slice, columns: dict[int, int]) -> Integers:
        """Operands for units of a node: rows, or ~column for a node that has columns of the samples instead."""
        if index in self.row_of:
            return self.row_of[index][units]
        return ~(columns[index] + np.asarray(units))

    def _blocks(self) -> Sequence[tuple[int, int]]:
        """Consecutive steps from 0 on, the first and the last of each block."""
        counts = (np.bincount(steps, minlength=self.last + 1) for steps in self.steps.values())
        rows = np.maximum.reduce(list(counts))
        blocks, first, total = [], 0, 0
        for step in range(self.last + 1):
            total += int(rows[step])
            if total >= BLOCK_ROWS or step == self.last:
                blocks.append((first, step))
                first, total = step + 1, 0
        return blocks
