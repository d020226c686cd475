"""What every pool can do, whatever stands behind it: for annotations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, ParamSpec, Protocol, TypeVar, overload

from ._settings import UNSET, Unset

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, Callable, Iterable

    from ._statistics import Statistics
    from ._stream import Stream

P = ParamSpec("P")
T = TypeVar("T")


class Calls(Protocol):
    """What a pool and its views can run; `CpuPool` says what each does, and raises."""

    async def run(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Run `fn(*args, **kwargs)` and return what it returns."""
        ...

    @overload
    async def map(
        self,
        fn: Callable[..., T],
        /,
        *iterables: Iterable[Any] | AsyncIterable[Any],
        return_exceptions: Literal[False] = False,
        chunksize: int | None = None,
        on_progress: Callable[[int, int | None], object] | None = None,
    ) -> list[T]: ...

    @overload
    async def map(
        self,
        fn: Callable[..., T],
        /,
        *iterables: Iterable[Any] | AsyncIterable[Any],
        return_exceptions: bool,
        chunksize: int | None = None,
        on_progress: Callable[[int, int | None], object] | None = None,
    ) -> list[T | Exception]: ...

    async def map(
        self,
        fn: Callable[..., Any],
        /,
        *iterables: Iterable[Any] | AsyncIterable[Any],
        return_exceptions: bool = False,
        chunksize: int | None = None,
        on_progress: Callable[[int, int | None], object] | None = None,
    ) -> list[Any]:
        """Call `fn` with each of the items, and return the results in order."""
        ...

    @overload
    def stream(
        self,
        fn: Callable[..., T],
        /,
        *iterables: Iterable[Any] | AsyncIterable[Any],
        ordered: bool = True,
        return_exceptions: Literal[False] = False,
        chunksize: int | None = None,
        buffersize: int | None = None,
    ) -> Stream[T]: ...

    @overload
    def stream(
        self,
        fn: Callable[..., T],
        /,
        *iterables: Iterable[Any] | AsyncIterable[Any],
        ordered: bool = True,
        return_exceptions: bool,
        chunksize: int | None = None,
        buffersize: int | None = None,
    ) -> Stream[T | Exception]: ...

    def stream(
        self,
        fn: Callable[..., Any],
        /,
        *iterables: Iterable[Any] | AsyncIterable[Any],
        ordered: bool = True,
        return_exceptions: bool = False,
        chunksize: int | None = None,
        buffersize: int | None = None,
    ) -> Stream[Any]:
        """Do as `map`, but give the results while they come."""
        ...

    def options(
        self,
        *,
        timeout: float | Unset | None = UNSET,
        queue_timeout: float | Unset | None = UNSET,
        retries: int | Unset = UNSET,
        label: str | Unset | None = UNSET,
        on_report: Callable[[Any], object] | Unset | None = UNSET,
    ) -> Calls:
        """Return a view whose calls have other options."""
        ...


class Pool(Calls, Protocol):
    """What every pool can do: `CpuPool`, the one without workers (`cpupool.testing.InlinePool`), and others to come.

    For annotations of code that works with any of them.
    """

    async def warm_up(self) -> None:
        """Start all workers and wait until they are ready."""
        ...

    async def aclose(self, drain: float | None = None) -> None:
        """Take no more calls, let the accepted ones finish, and stop the workers."""
        ...

    def statistics(self) -> Statistics:
        """Return what is known of the pool now."""
        ...
