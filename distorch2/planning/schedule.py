"""Which groups of streamed weights to have on the compute device, and where. Pure: names and integers only.

The staging buffer is a ring: each group has a fixed place in it, after the one that is used before it, and the places
start again at the front where the end is reached. So the groups that are staged at one time follow each other in the
order of use.

The order is learnt. It is the sequence of layers in one pass, in which a layer may come several times; a pass begins
with the layer that began the first. In the first pass nothing is fetched ahead. From then on:

- A pass that leaves layers out is no news. What two passes in a row left out is not fetched ahead any more, until
  some group has to be fetched late.
- What a pass runs in addition, or once more, is added to the order.

Order is for speed only: a group that is not staged when one of its layers runs is fetched late, then and there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

_PASSES_UNTIL_UNEXPECTED = 2
"""One pass says little: every second step of a cached model is one that leaves most layers out."""
_PASSES_UNTIL_LAID_OUT_ANEW = 8
_LONGEST_ORDER = 4
"""In visits for each layer. What is longer is no pass: its first layer does not come again."""


class Schedule:
    """For layers 0, 1, ...: `group_of[layer]` is the layer's group, `sizes[group]` its bytes in a ring of `capacity`.

    `order` is one that has been learnt before, if there is one.
    Raises `ValueError` when a group is larger than the ring.
    """

    def __init__(
        self, group_of: Sequence[int], sizes: Sequence[int], capacity: int, order: Sequence[int] | None = None
    ) -> None:
        if max(sizes, default=0) > capacity:
            raise ValueError(f"a group of {max(sizes)} bytes does not fit {capacity} bytes")
        self._group_of, self._sizes, self._capacity = group_of, sizes, capacity
        self.version = 0
        """Changes with the offsets."""
        self.offsets: dict[int, int] = {}
        self._expect(order or range(len(group_of)))
        self._is_learning = not order
        # None: this pass has followed the order so far. A list: the layers of a pass that differs, or of the first.
        self._seen: list[int] | None = None if order else []

    @property
    def order(self) -> Sequence[int] | None:
        """The layers of a pass, those that have run where the first has not ended, None where there are none."""
        return (self._seen or None) if self._is_learning else self._order

    def _expect(self, order: Iterable[int]) -> None:
        """Expect layers in this order from now on. Nothing counts as staged then.

        Consecutive layers of one group are a run. Positions and runs go on counting from pass to pass.
        """
        self._order = list(order)
        self._positions: dict[int, list[int]] = {}  # layer -> where it comes in a pass
        self._runs: list[int] = []  # the group of each
        self._run_of: list[int] = []  # by position
        layers_of: list[set[int]] = []  # by run
        for position, layer in enumerate(self._order):
            self._positions.setdefault(layer, []).append(position)
            if not self._runs or self._runs[-1] != self._group_of[layer]:
                self._runs.append(self._group_of[layer])
                layers_of.append(set())
            self._run_of.append(len(self._runs) - 1)
            layers_of[-1].add(layer)
        self._ends_run = [run != after for run, after in zip(self._run_of, [*self._run_of[1:], None])]
        self._held_until = self._last_of_neighbours(layers_of)
        self._needed_until: dict[int, int] = {}  # staged group -> the last run that it is staged for
        self._lay_out(self._runs)
        self._passes_missed: dict[int, int] = {}  # run -> how many passes in a row have left it out
        self._unexpected: set[int] = set()  # runs that too many have
        self._move(-1)
        self._next_fetch = 0  # a run
        self._pass_after_surprise = 0
        self._is_learning = False

    def _last_of_neighbours(self, layers_of: Sequence[set[int]]) -> list[int]:
        """Run -> the last run for which its group stays staged: what runs between has room beside it.

        Layers are grouped as they are registered, and do not always run in that order. A run of the same layers again
        is one by itself.
        """
        held_until = list(range(len(self._runs)))
        for run in reversed(held_until):
            group, between = self._runs[run], set[int]()
            for later in range(run + 1, len(self._runs)):
                if self._runs[later] == group:
                    if not layers_of[run] & layers_of[later]:
                        held_until[run] = held_until[later]
                    break
                between.add(self._runs[later])
                if self._sizes[group] + sum(self._sizes[each] for each in between) > self._capacity:
                    break
        return held_until

    def _lay_out(self, groups: Iterable[int]) -> None:
        """Give these groups their places, and then the others. Where that changes any, nothing is staged any more."""
        offsets, end = {}, 0
        for group in dict.fromkeys([*groups, *self._runs, *range(len(self._sizes))]):
            if end + self._sizes[group] > self._capacity:
                end = 0
            offsets[group] = end
            end += self._sizes[group]
        if offsets != self.offsets:
            self.offsets = offsets
            self.version += 1
            self._needed_until = {}

    def _move(self, now: int) -> None:
        """`now` is the position of the last layer."""
        self._now = now
        self._expected = self._order[(now + 1) % len(self._order)] if self._order else None

    def _run(self) -> int:
        """The run that the last layer belongs to."""
        num_passes, position = divmod(self._now, len(self._order))
        return num_passes * len(self._runs) + self._run_of[position]

    def _held(self, run: int) -> int:
        num_passes, of_pass = divmod(run, len(self._runs))
        return num_passes * len(self._runs) + self._held_until[of_pass]

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
        run = self._run()
        self._needed_until[group] = self._held(run)
        if self._unexpected:
            self._unexpected.clear()
            self._passes_missed.clear()
        if self._is_learning or layer not in self._positions:
            return (group,)
        self._next_fetch = run + 1
        return (group, *self._fetch_ahead(run + len(self._runs), group))

    def leave(self, layer: int) -> Sequence[int]:
        """Groups to fetch now that `layer` has run: if it was the last of its group there is room for others."""
        # Most layers are not: that is asked first.
        if not self._ends_run[self._now % len(self._order)] or self._is_learning:
            return ()
        group, run = self._group_of[layer], self._run()
        if self._needed_until.get(group) != run or layer not in self._positions:
            return ()
        del self._needed_until[group]
        return self._fetch_ahead(run + len(self._runs) + 1)

    def forget_staged(self) -> None:
        """What is staged is not to be used: weights were written."""
        self._needed_until.clear()

    def _follow(self, layer: int) -> None:
        """Note a layer that differs from the order, or follows one that did in the same pass, and move to it."""
        if self._is_learning and self._seen is not None and layer in self._seen:
            self._expect(self._seen)
            # Either it is the first layer again, or the pass goes on with one that comes several times.
            self._seen = None if layer == self._order[0] else [*self._order]
        elif self._seen is None:
            self._seen = self._order[: self._now % len(self._order) + 1] if self._now >= 0 else []
            if self._now // len(self._order) > self._pass_after_surprise:
                self._passes_missed.clear()
        if self._seen and layer == self._order[0] and not self._is_learning:
            self._end_pass(self._seen)
            self._seen = None
        if self._seen is not None:
            self._seen.append(layer)
            if len(self._seen) > _LONGEST_ORDER * len(self._group_of) and layer in self._seen[:-1]:
                self._expect_what_recurs(self._seen)
                self._seen = None
        self._move_to(layer)
        if self._seen is None:
            self._pass_after_surprise = self._now // len(self._order)

    def _move_to(self, layer: int) -> None:
        """Where it comes next in the order. What is skipped by that is not waited for."""
        positions, length, group = self._positions.get(layer), len(self._order), self._group_of[layer]
        if positions is None:
            return
        position = self._now % length if self._now >= 0 else -1
        begin = self._now - position
        self._move(next((begin + each for each in positions if each > position), begin + length + positions[0]))
        run = self._run()
        if group in self._needed_until:
            self._needed_until[group] = max(self._held(run), self._needed_until[group])
        if not self._is_learning:
            self._needed_until = {each: until for each, until in self._needed_until.items() if until >= run}
        self._next_fetch = max(self._next_fetch, run + 1)

    def _end_pass(self, seen: Sequence[int]) -> None:
        """Learn from a pass that was not the order."""
        merged: list[int] = []
        used: set[int] = set()  # runs
        end, is_new = 0, False
        for layer in seen:
            position = next((each for each in self._positions.get(layer, ()) if each >= end), None)
            if position is None:
                merged.append(layer)
                is_new = True
            else:
                merged += self._order[end : position + 1]
                used.add(self._run_of[position])
                end = position + 1
        merged += self._order[end:]
        if is_new:
            self._expect(merged if len(merged) <= _LONGEST_ORDER * len(self._group_of) else seen)
            return
        self._passes_missed = {
            run: self._passes_missed.get(run, 0) + 1 for run in range(len(self._runs)) if run not in used
        }
        self._unexpected = {run for run, num in self._passes_missed.items() if num >= _PASSES_UNTIL_UNEXPECTED}
        self._needed_until = {
            group: until
            for group, until in self._needed_until.items()
            if until % len(self._runs) not in self._unexpected
        }
        # Groups that come elsewhere in the order than they did.
        moved = {self._runs[run] for run, num in self._passes_missed.items() if num == _PASSES_UNTIL_LAID_OUT_ANEW}
        expected = [group for run, group in enumerate(self._runs) if run not in self._unexpected]
        if moved & set(expected):
            self._lay_out(expected)

    def _expect_what_recurs(self, seen: Sequence[int]) -> None:
        """The first layer of `seen` does not come again; what lies between two visits of the last one is a pass."""
        *before, last = seen
        begin = len(before) - 1 - before[::-1].index(last)
        self._expect(before[begin:])

    def _fetch_ahead(self, limit: int, entering: int | None = None) -> list[int]:
        """Mark as staged what comes before the run `limit`, as far as the ring has room beside the group `entering`."""
        fetched, num_runs = [], len(self._runs)
        while self._next_fetch < limit:
            run = self._next_fetch % num_runs
            group = self._runs[run]
            if run not in self._unexpected:
                if group not in self._needed_until:
                    in_the_way = self._overlapping(group)
                    if any(other == entering or self._needed_until[other] < self._next_fetch for other in in_the_way):
                        break
                    for other in in_the_way:  # they are needed later; they were staged while this run was not expected
                        del self._needed_until[other]
                    fetched.append(group)
                self._needed_until[group] = max(self._held(self._next_fetch), self._needed_until.get(group, 0))
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


class LearntOrder:
    """The order in which a module's layers run, by name: what one schedule has learnt, for the next.

    Which layers are streamed changes when there is more or less room on the compute device.
    """

    def __init__(self) -> None:
        self._names: list[str] = []

    def note(self, names: Iterable[str]) -> None:
        """Learn that `names` run in this order.

        If that agrees with what is known, nothing changes; else it replaces all that is known.
        """
        noted = list(names)
        among = set(noted)
        if [name for name in self._names if name in among] != noted:
            self._names = noted

    def of(self, names: Sequence[str], registered: Iterable[str]) -> list[int] | None:
        """In which order the layers `names` run, by their numbers in it; None where nothing is known.

        A layer that has not been seen is taken to run after the one that is before it in `registered`.
        """
        if not self._names:
            return None
        number = {name: index for index, name in enumerate(names)}
        order = [name for name in self._names if name in number]
        known, before = set(order), -1
        for name in registered:
            if name in number:
                if name not in known:
                    order.insert(before + 1, name)
                    before += 1
                else:
                    before = order.index(name)
        return [number[name] for name in order]
