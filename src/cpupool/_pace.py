"""How many items go into a batch: as many as take a few hundredths of a second, by what the last ones took."""

from __future__ import annotations

import math

BUDGET = 0.05  # seconds after which a worker begins no further item of a batch, and gives back the rest
_TARGET = 0.03  # seconds that a batch should take
_LEAST_ROOM = 64  # items on their way in a stream without `buffersize`
_MOST_BUFFERED = 32 * 1024 * 1024  # of their bytes, as items or as results
_LEAST_SECONDS = 0.002  # for which it is worth while to keep a batch together at the end
_GROWTH = 16  # times as many items as in the last batch, at most: the next ones may take longer
_MOST_BYTES = 128 * 1024  # of pickled items; more do not fit into the buffer of a socket
_LONGEST_PICKLING = 0.002  # seconds for which the event loop may stand still for it
_WEIGHT = 0.5  # of the last batch in the average


class Pace:
    """Chooses the sizes of the batches of one map.

    Attributes:
        lanes: how many batches may run at once.
    """

    def __init__(self, lanes: int, chunksize: int | None, buffersize: int | None) -> None:
        """Args: as those of `CpuPool.stream`."""
        self.lanes = lanes
        self._chunksize = chunksize if chunksize is None or buffersize is None else min(chunksize, buffersize)
        self._most: float = math.inf if buffersize is None else max(buffersize // (2 * lanes), 1)
        self._item_seconds = math.inf
        self._last = 0
        self._most_pickled = math.inf
        self._buffersize = buffersize
        self._item_bytes = 1.0
        self._result_bytes = 1.0

    @property
    def budget(self) -> float:
        """Seconds that a batch may take before its worker begins no further item."""
        return BUDGET if self._chunksize is None else math.inf

    def choose_size(self, left: int | None) -> int:
        """Return how many items the next batch should have, if so many are left (None: unknown)."""
        if self._chunksize is not None:
            return self._chunksize
        size = min(_TARGET / self._item_seconds, _GROWTH * self._last, self._most_pickled, self._most)
        if left is not None:
            fair = math.ceil(left / (2 * self.lanes))  # so that all lanes end at about the same time
            size = min(size, max(fair, _LEAST_SECONDS / self._item_seconds))
        return max(int(size), 1)

    def note_run(self, items: int, seconds: float) -> None:
        """Note how long some items of a batch took."""
        new = max(seconds / items, 1e-9)
        old = self._item_seconds
        self._item_seconds = new if old == math.inf else old + _WEIGHT * (new - old)
        self._last = max(items, self._last // 2)

    def note_pickled(self, items: int, size: int, seconds: float) -> None:
        """Note how many bytes some items became, and how long that took."""
        self._most_pickled = items * min(_MOST_BYTES / size, _LONGEST_PICKLING / max(seconds, 1e-9))
        self._item_bytes = max(size / items, self._item_bytes / 2)

    def note_results(self, results: int, size: int) -> None:
        """Note how many bytes some results are."""
        self._result_bytes = max(size / results, self._result_bytes / 2)

    @property
    def room(self) -> int:
        """How many items of a stream may be on their way, or wait as results."""
        if self._buffersize is not None:
            return self._buffersize
        wanted = max(4 * self.lanes * self.choose_size(None), _LEAST_ROOM)
        fitting = _MOST_BUFFERED / max(self._item_bytes, self._result_bytes)
        return int(max(min(wanted, fitting), 2 * self.lanes, self._chunksize or 0))
