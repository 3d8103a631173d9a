"""Which groups of streamed weights to have on the compute device, and where. Pure: names and integers only.

The staging buffer is used as a ring: walking through the groups in the order in which they are used, each has its place
after the one before it, and the walk starts again at the front where the end is reached. So a group's place never
changes, and the groups that are staged at one time are a few that follow each other.

The order is learnt from what happens: a pass is the run of layers up to the first that comes a second time. In the
first pass nothing is fetched ahead. Order is for speed only: a layer that comes out of order has its group fetched then
and there, and after a pass with a surprise its order is the new one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class Schedule:
    """For layers 0, 1, ...: `group_of[layer]` is the layer's group, `sizes[group]` its bytes in a ring of `capacity`.

    Raises `ValueError` when a group is larger than the ring.
    """

    def __init__(self, group_of: Sequence[int], sizes: Sequence[int], capacity: int) -> None:
        if max(sizes, default=0) > capacity:
            raise ValueError(f"a group of {max(sizes)} bytes does not fit {capacity} bytes")
        self._group_of, self._sizes, self._capacity = group_of, sizes, capacity
        self.version = 0
        """Changes with the offsets."""
        self._adopt(range(len(group_of)))
        self._is_learning = True
        # The layers of this pass, in their order; None while they are those of the known order.
        self._seen: dict[int, None] | None = {}

    def _adopt(self, order: Iterable[int]) -> None:
        """Expect layers in this order from now on. Nothing is staged then."""
        self._order = list(order)
        self._position = {layer: position for position, layer in enumerate(self._order)}
        self._last: dict[int, int] = {}  # group -> position of the last layer of it
        self._rank: dict[int, int] = {}  # group -> its number in the order of first use
        for position, layer in enumerate(self._order):
            group = self._group_of[layer]
            self._rank.setdefault(group, len(self._rank))
            self._last[group] = position
        self._groups = list(self._rank)
        others = (group for group in range(len(self._sizes)) if group not in self._rank)
        self.offsets = self._ring_offsets([*self._groups, *others])
        # Positions and ranks below go on counting from pass to pass.
        self._move(-1)
        self._next_fetch = 0
        self._needed_until: dict[int, int] = {}  # staged group -> position of the last layer that it is staged for
        self._is_learning = False
        self.version += 1

    def _ring_offsets(self, groups: Iterable[int]) -> dict[int, int]:
        offsets, end = {}, 0
        for group in groups:
            if end + self._sizes[group] > self._capacity:
                end = 0
            offsets[group] = end
            end += self._sizes[group]
        return offsets

    def _move(self, now: int) -> None:
        self._now = now
        self._expected = self._order[(now + 1) % len(self._order)] if self._order else None

    def enter(self, layer: int) -> Sequence[int]:
        """Groups to fetch before `layer` runs: its own, first, if it is not staged, and some of those after it."""
        group = self._group_of[layer]
        if layer == self._expected and self._seen is None:
            self._move(self._now + 1)
        else:
            self._follow(layer)
        if group in self._needed_until:
            return ()
        for other in self._overlapping(group):
            del self._needed_until[other]
        num_passes = self._now // len(self._order)
        self._needed_until[group] = num_passes * len(self._order) + self._last.get(group, 0)
        if self._is_learning or group not in self._rank:
            return (group,)
        self._next_fetch = num_passes * len(self._groups) + self._rank[group] + 1
        return (group, *self._fetch_ahead(self._next_fetch + len(self._groups) - 1))

    def leave(self, layer: int) -> Sequence[int]:
        """Groups to fetch now that `layer` has run: if it was the last of its group there is room for others."""
        group = self._group_of[layer]
        # Most layers are not the last of their group: that is asked first.
        if self._needed_until.get(group) != self._now or self._is_learning or group not in self._rank:
            return ()
        del self._needed_until[group]
        num_passes = self._now // len(self._order)
        return self._fetch_ahead((num_passes + 1) * len(self._groups) + self._rank[group] + 1)

    def forget_staged(self) -> None:
        """What is staged is not to be used: weights were written."""
        self._needed_until.clear()

    def _follow(self, layer: int) -> None:
        """Move to a layer that was not expected, or in a pass that brought one."""
        if self._seen is None:
            self._seen = dict.fromkeys(self._order[: self._now % len(self._order) + 1])
        if layer in self._seen:
            order, self._seen = list(self._seen), None
            # A pass that broke off says nothing new.
            if self._is_learning or order != self._order[: len(order)]:
                self._adopt(order)
            if layer == self._expected:
                self._move(self._now + 1)
                return
            self._seen = {}
        self._seen[layer] = None
        if layer == self._expected:
            self._move(self._now + 1)
        elif layer in self._position:
            length = len(self._order)
            self._move(self._now + ((self._position[layer] - self._now) % length or length))
            if not self._is_learning:
                # What was skipped is not waited for.
                self._needed_until = {g: until for g, until in self._needed_until.items() if until >= self._now}

    def _fetch_ahead(self, limit: int) -> list[int]:
        """Mark as staged what comes before the rank `limit`, as far as the ring has room."""
        fetched, num_groups, length = [], len(self._groups), len(self._order)
        while self._next_fetch < limit:
            num_passes, rank = divmod(self._next_fetch, num_groups)
            candidate = self._groups[rank]
            if candidate not in self._needed_until:
                if self._overlapping(candidate):
                    break
                self._needed_until[candidate] = num_passes * length + self._last[candidate]
                fetched.append(candidate)
            self._next_fetch += 1
        return fetched

    def _overlapping(self, group: int) -> list[int]:
        """Staged groups that lie where `group` would."""
        begin = self.offsets[group]
        end = begin + self._sizes[group]
        return [
            other
            for other in self._needed_until
            if begin < self.offsets[other] + self._sizes[other] and self.offsets[other] < end
        ]
