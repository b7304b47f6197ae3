"""Sums of gradients, in an order that does not depend on the number of ranks.

Floating-point sums depend on their order. The gradients of an optimizer step are one leaf for each
chunk of rows (dealing.py): the chunk's micro-steps, added one after the other. Leaves are added in
a binary tree over all n of them, which splits a run of leaves in the middle, the larger half first:

    sum of leaves [a, b) = sum of [a, m) + sum of [m, b)        m = a + ceil((b - a) / 2)

A rank adds what lies within its run of leaves; for 2, 4, 8, ... ranks that divide n this is one
whole subtree. Then the ranks' partial sums are added in the same tree: each rank gets a slice of
all of them, adds it, and the slices are put together again. That moves as many bytes as a plain
all-reduce, and 1, 2, 4 or 8 ranks add the same numbers in the same order.

A rank holds at most log2(n) + 2 sums at once, each of the size of the trained parameters. With
`run.reduction` "all_reduce" leaves are added one after the other in one buffer, and over the ranks
by torch.distributed's all-reduce, whose order is its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from flowgrpo.distributed.dealing import Dealing
from flowgrpo.distributed.world import World, all_gather

Node = tuple[int, int]
"""Leaves [first, behind the last) of a subtree."""
Values = list[Tensor | None]
"""Gradients of the parameters; None for one that the loss does not reach."""


def middle(node: Node) -> int:
    """First leaf of the second half of a subtree."""
    return node[0] + (node[1] - node[0] + 1) // 2


def children(node: Node) -> tuple[Node, Node]:
    """Split a subtree of two leaves or more into its halves."""
    m = middle(node)
    return (node[0], m), (m, node[1])


def whole_nodes(leaves: range, node: Node) -> Iterator[Node]:
    """List the largest subtrees of `node` that lie within a run of leaves, in order."""
    first, last = node
    if first >= leaves.stop or last <= leaves.start:
        return
    if first >= leaves.start and last <= leaves.stop:
        yield node
        return
    for child in children(node):
        yield from whole_nodes(leaves, child)


class GradientSum:
    """Adds the gradients of one optimizer step: `add` after each leaf, `finish` after the last."""

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        world: World,
        dealing: Dealing,
        fixed: bool = False,
        tree: bool = True,
        summed: bool = False,
    ) -> None:
        """
        Args:
            fixed: gradients stay at their addresses, as a graph has recorded them.
            tree: in the order of the tree, else as they come.
            summed: over leaves and ranks already, as FSDP does.
        """
        self.parameters, self.world, self.dealing = list(parameters), world, dealing
        self.fixed, self.tree = fixed, tree
        self._parts: list[tuple[Node, Values]] = []
        self._extra: Values | None = None
        # One leaf in one process: its gradients are the sum.
        self._alone = summed or (not world.joined and (dealing.leaves == 1 or not tree))

    def add(self, leaf: int) -> None:
        """Add the parameters' gradients, which hold the leaf number `leaf`, and clear them."""
        if self._alone or not self.tree:
            return
        node = (leaf, leaf + 1)
        values = self._take()
        while self._parts and (merged := self._parent(self._parts[-1][0], node)) is not None:
            values = _sum(self._parts.pop()[1], values)
            node = merged
        self._parts.append((node, values))

    def add_extra(self) -> None:
        """Add the parameters' gradients, which hold something beside the leaves, at the very end.

        One rank does so, the last.
        """
        if self._alone or not self.tree:
            return
        self._extra = self._take()

    def finish(self, extra: bool = False) -> None:
        """Put the sum of all ranks into the parameters' gradients.

        Args:
            extra: the last rank has called `add_extra`.
        """
        if self._alone:
            return
        if not self.tree:
            self._all_reduce()
            return
        root, parts = (0, self.dealing.leaves), dict(self._parts)
        if self.world.joined:
            self._exchange(root, extra)
            return
        total = parts[root]
        if self._extra is not None:
            total = _sum(total, self._extra)
        self._put(total)

    def _parent(self, left: Node, right: Node) -> Node | None:
        """The subtree whose halves these are; None if there is none."""
        node: Node = (0, self.dealing.leaves)
        whole = (left[0], right[1])
        while node[1] - node[0] > whole[1] - whole[0]:
            node = children(node)[whole[0] >= middle(node)]
        return node if node == whole and middle(node) == right[0] == left[1] else None

    def _take(self) -> Values:
        """Take the gradients off the parameters; where their addresses are fixed, a copy."""
        gradients = [p.grad for p in self.parameters]
        if self.fixed:
            copies = [None if g is None else g.clone() for g in gradients]
            torch._foreach_zero_([g for g in gradients if g is not None])
            return copies
        for parameter in self.parameters:
            parameter.grad = None
        return gradients

    def _put(self, values: Values) -> None:
        """Make `values` the gradients of the parameters."""
        for parameter, value in zip(self.parameters, values, strict=True):
            if self.fixed and parameter.grad is not None and value is not None:
                parameter.grad.copy_(value)
            else:
                parameter.grad = value

    def _all_reduce(self) -> None:
        """Sum over ranks by torch.distributed's all-reduce."""
        if not self.world.joined:
            return
        for i in self._reached([[p.grad for p in self.parameters]]):
            if self.parameters[i].grad is None:
                self.parameters[i].grad = torch.zeros_like(self.parameters[i])
        reached = [p.grad for p in self.parameters if p.grad is not None]
        if not reached:
            return
        flat = torch.cat([g.flatten() for g in reached])
        # As a ring sends them: every slice around once to be added, and once to be known.
        with self.world.exchanging(2 * flat.nbytes * (1 - 1 / self.world.size)):
            dist.all_reduce(flat)
        torch._foreach_copy_(reached, _split(flat, reached))

    def _exchange(self, root: Node, extra: bool) -> None:
        """Sum the partial sums of all ranks, each rank a slice of them."""
        world, size = self.world, self.world.size
        nodes = [list(whole_nodes(run, root)) for run in self.dealing.runs]
        if extra:
            # Behind the leaves, so in no subtree.
            nodes[-1].append((root[1], root[1] + 1))
        sums = [values for _, values in self._parts]
        if self._extra is not None:
            sums.append(self._extra)
        reached = self._reached(sums)
        if not reached:
            self._put([None] * len(self.parameters))
            return
        like = [self.parameters[i] for i in reached]
        count = sum(g.numel() for g in like)
        part = -(-count // size)
        most = max(map(len, nodes))
        # Rank r gets the r-th part of each sum. What is missing is -0, which changes no number that
        # it is added to, not even the sign of a 0.
        send = like[0].detach().new_full((most, size * part), -0.0)
        for row, values in zip(send, sums, strict=False):
            for i, place in zip(reached, _split(row[:count], like), strict=True):
                if values[i] is not None:
                    place.copy_(values[i])
        send = send.view(most, size, part).transpose(0, 1).contiguous()
        received = torch.empty_like(send)
        with world.exchanging(send.nbytes * (1 - 1 / size)):
            dist.all_to_all_single(received, send)
        values = {
            node: received[rank, i]
            for rank, parts in enumerate(nodes)
            for i, node in enumerate(parts)
        }
        total = _total(root, values)
        if extra:
            total = total + values[(root[1], root[1] + 1)]
        whole = total.new_empty(size * part)
        with world.exchanging(total.nbytes * (size - 1)):
            all_gather(whole, total.contiguous())
        totals: Values = [None] * len(self.parameters)
        for i, value in zip(reached, _split(whole[:count], like), strict=True):
            totals[i] = value
        self._put(totals)

    def _reached(self, sums: Sequence[Values]) -> list[int]:
        """List the parameters that the loss of any leaf reaches, in any rank."""
        here = [i for i in range(len(self.parameters)) if any(v[i] is not None for v in sums)]
        return sorted({i for there in self.world.gather(here) for i in there})


def _total(node: Node, values: dict[Node, Tensor]) -> Tensor:
    """Add the subtrees in `values` to that of `node`."""
    if node in values:
        return values[node]
    left, right = (_total(child, values) for child in children(node))
    return left + right


def _sum(left: Values, right: Values) -> Values:
    """Add gradients, in the memory of the left ones."""
    pairs = [(a, b) for a, b in zip(left, right, strict=True) if a is not None and b is not None]
    if pairs:
        torch._foreach_add_([a for a, _ in pairs], [b for _, b in pairs])
    return [b if a is None else a for a, b in zip(left, right, strict=True)]


def _split(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Cut a flat tensor into tensors of the shapes of `like`."""
    parts = flat.split([g.numel() for g in like])
    return [part.view(g.shape) for part, g in zip(parts, like, strict=True)]
