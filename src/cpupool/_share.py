"""Sharing one large object with all workers, seen from the pool.

Theory of operation: the object is written once into a file of memory.  A handle of it that is pickled with a call says
which file is meant, and a worker that does not know it yet gets its descriptor along, and maps it.  When the share
ends, the idle workers are told to forget it, and the others once they are done.  The kernel frees the memory when
nobody looks at it any more, whatever has become of the processes.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, TypeVar

from . import _files
from ._apart import run_apart
from ._calls import async_waits
from ._parcels import Parcel, SharedFile, add_shared, pack, remove_shared
from ._shared import Shared

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Self

    from ._payload import Serializer

T = TypeVar("T")


class Share(Shared[T]):
    """A `Shared` that is a context manager: `with pool.share(array) as shared: await pool.run(fn, shared)`.

    Give it to calls as an argument, as it is or inside of something else, or bound by `functools.partial`; in the task
    `shared.get()` is the object.  It is written once, when the block is entered, and mapped, not copied, by the
    workers.  It lives until the block is left and the last call that uses it is done.

    `async with` does the same, and writes it apart from the event loop, which goes on meanwhile.
    """

    def __init__(self, value: T, serializer: Serializer, on_end: Callable[[int], object]) -> None:
        """Args: `on_end(number)` is called when workers are to forget it."""
        self._view = None
        self._head = 0
        self._value: list[T] = [value]
        self._serializer = serializer
        self._on_end = on_end
        self._file: SharedFile | None = None

    def __repr__(self) -> str:
        return super().__repr__() if self._file is not None else f"<{type(self).__name__} not open>"

    def __enter__(self) -> Self:
        return self._open(self._write(self._take_value()))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        file = self._file
        if file is not None:
            remove_shared(file)
            self._file = self._view = None
            self._on_end(file.number)

    async def __aenter__(self) -> Self:
        value = self._take_value()
        return self._open(await run_apart(lambda _: self._write(value), async_waits()))

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.__exit__(kind, error, traceback)

    def _take_value(self) -> T:
        try:
            return self._value.pop()
        except IndexError:
            raise RuntimeError("a share can be entered only once; make a new one: pool.share(...)") from None

    def _open(self, file: SharedFile) -> Self:
        self._file, self._view = file, file.view
        add_shared(file)
        return self

    def _write(self, value: Any) -> SharedFile:
        if isinstance(value, bytes | bytearray):
            value = memoryview(value)
        packed = pack(value, self._serializer.make_pickler, large=1, refers=False)
        parcel = packed if isinstance(packed, Parcel) else Parcel([packed], len(packed), [])
        file = _files.open_nameless_file()
        head = parcel.write_to(file).head
        self._head = os.fstat(file.number).st_size
        _files.write_all(file, [head], self._head)
        return SharedFile(file)
