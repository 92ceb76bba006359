"""Who has which bytes of the arena: kept on the host, from prompt lengths alone, so that all ranks agree."""

from __future__ import annotations

from bisect import insort


class Ledger:
    """Regions of an arena (`ArenaShape`), handed out first fit.

    Attributes:
        capacity, used: bytes of a layer, on average.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity, self.used = capacity, 0
        self._free = [(0, capacity)] if capacity else []  # start and end, in order, never adjacent
        self._taken: dict[str, slice] = {}

    def __len__(self) -> int:
        return len(self._taken)

    def region(self, owner: str) -> slice | None:
        """The region of ``owner``, if it has one."""
        return self._taken.get(owner)

    def reserve(self, owner: str, nbytes: int) -> bool:
        """Give ``owner`` a region; False if there is no room, and nothing has changed."""
        assert owner not in self._taken, owner
        for i, (start, end) in enumerate(self._free):
            if end - start >= nbytes:
                self._taken[owner] = slice(start, start + nbytes)
                self._free[i : i + 1] = [(start + nbytes, end)] if end - start > nbytes else []
                self.used += nbytes
                return True
        return False

    def release(self, owner: str) -> None:
        """Take back the region of ``owner``; nothing happens if it has none."""
        region = self._taken.pop(owner, None)
        if region is None:
            return
        self.used -= region.stop - region.start
        insort(self._free, (region.start, region.stop))
        joined: list[tuple[int, int]] = []
        for start, end in self._free:
            if joined and joined[-1][1] == start:
                joined[-1] = (joined[-1][0], end)
            else:
                joined.append((start, end))
        self._free = joined
