"""One large object that any number of calls use, without a copy for each: how it looks to a task.

It runs in the workers too: stdlib and layer 0 only.
"""

from __future__ import annotations

from pickle import PickleBuffer
from typing import Generic, TypeVar

from ._parcels import unpack

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

T = TypeVar("T")


class ShareNotOpen(ValueError):
    """A share is used before its block, or after it."""

    advice = "Give it to calls inside of its block: 'with pool.share(...) as shared:'."

    def __str__(self) -> str:
        return f"{self.args[0]}. {self.advice}"


class Shared(Generic[T]):
    """An object in memory that all workers can read; `CpuPool.share` makes it."""

    def __init__(self, view: memoryview, head: int) -> None:
        """Args: `view` is the memory, `head` where the object's description begins in it."""
        self._view: memoryview | None = memoryview(view).toreadonly()
        self._head = head

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.nbytes:,} bytes>"

    @property
    def nbytes(self) -> int:
        """How many bytes it takes."""
        return self._memory().nbytes

    def get(self) -> T:
        """Return the object, whose buffers are read-only views of the shared memory.

        What is no buffer in it (the index of a frame, the keys of a dict) is made anew each time.  `bytes` and
        `bytearray` are shared as a `memoryview`.  The arrays in it can be given to calls themselves: they are not
        copied then, as long as the share lives.

        Raises:
            ValueError: the share has ended, or has not begun.
        """
        view = self._memory()
        value: T = unpack(view[self._head :], memory=view)
        return value

    def _memory(self) -> memoryview:
        if self._view is None:
            raise ShareNotOpen("this share is not open")
        return self._view

    def __reduce__(self) -> tuple[Any, ...]:
        return Shared, (PickleBuffer(self._memory()), self._head)
