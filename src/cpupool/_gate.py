"""How many bytes the calls of a pool may hold at once, and who waits until there is room.

Rules: the dispatcher uses it, under its lock.  It is first come, first served: a large call is not overtaken for ever
by small ones.  One that is larger than the limit goes alone.  One whose size is not known yet takes all the room that
is left until it is known, so that only one at a time can turn out to be too large.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._lease import Lease


_SWEEP_AT_LEAST = 64


class Gate:
    """Counts the bytes of the calls that are in.

    Attributes:
        most: how many bytes there may be.
        inside: how many there are.
        queue: the leases of the calls that wait; some may have given up.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.inside = 0
        self.queue: deque[tuple[Lease[Any], int | None]] = deque()
        self._sweep_at = _SWEEP_AT_LEAST

    def enter(self, lease: Lease[Any], size: int | None) -> bool:
        """Let a call in with its bytes (None: not known yet), or let it wait; returns True if it is in."""
        self._drop_withdrawn()
        if not self.queue and self._has_room(size):
            self._count(lease, size)
            return True
        if len(self.queue) >= self._sweep_at:
            self.queue = deque(each for each in self.queue if each[0].is_waiting)
            self._sweep_at = max(2 * len(self.queue), _SWEEP_AT_LEAST)
        self.queue.append((lease, size))
        return False

    def resize(self, lease: Lease[Any], size: int) -> None:
        """Note the size of a call that is in, now that it is known; or that it is 0, because it is over."""
        self.inside += size - lease.weight
        lease.weight = size

    def let_in(self) -> list[Lease[Any]]:
        """Let those in who can come in now, and return them: their tickets are to be settled."""
        entered: list[Lease[Any]] = []
        while True:
            self._drop_withdrawn()
            if not self.queue or not self._has_room(self.queue[0][1]):
                return entered
            lease, size = self.queue.popleft()
            self._count(lease, size)
            entered.append(lease)

    def _has_room(self, size: int | None) -> bool:
        return not self.inside or self.inside + (size or 1) <= self.most

    def _count(self, lease: Lease[Any], size: int | None) -> None:
        lease.weight = max(self.most - self.inside, 1) if size is None else size
        self.inside += lease.weight

    def _drop_withdrawn(self) -> None:
        while self.queue and not self.queue[0][0].is_waiting:
            self.queue.popleft()
