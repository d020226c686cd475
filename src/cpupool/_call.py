"""One call on its way: checked, pickled, and turned back into a value or an error."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from . import _payload
from ._errors import ResultNotPicklable, WorkerDied, decode_error, describe_callable
from ._frames import Kind

if TYPE_CHECKING:
    from collections.abc import Callable

    from ._frames import Frame
    from ._worker import Death

_ASYNC_CODE = inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR


class Call:
    """A function and its arguments: checked and pickled once, however often it is tried."""

    __slots__ = ("_fn", "body")

    def __init__(self, fn: Callable[..., object], args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        code = getattr(fn, "__code__", None)
        if code is None or code.co_flags & _ASYNC_CODE:
            _check_function(fn)
        self._fn = fn
        self.body = _payload.dumps_call(fn, args, kwargs)

    def outcome(self, reply: Frame) -> Any:
        """Return the value in a reply, or raise the error in it."""
        if reply.kind is not Kind.RESULT:
            raise decode_error(reply.body, describe_callable(self._fn))
        try:
            return _payload.loads_result(reply.body)
        except _payload.RebuildFailed as failed:
            error = failed.__cause__
            reason = f"it was pickled in the worker but cannot be rebuilt here: {type(error).__name__}: {error}"
            result_type = _payload.first_type(reply.body) or "a value"
            raise ResultNotPicklable(describe_callable(self._fn), result_type, reason) from error

    def death(self, death: Death) -> WorkerDied:
        """Describe the death of the worker that ran it."""
        task = describe_callable(self._fn)
        return WorkerDied(death.pid, death.exitcode, death.signal, None, task, death.stack)


def _check_function(fn: object) -> None:
    """Raise unless `fn` can be called and returns a value, not something to await."""
    if inspect.iscoroutine(fn):
        fn.close()  # or Python would warn that it was never awaited
        raise TypeError(
            f"pool.run() takes a function and its arguments, not the coroutine {fn.__qualname__}(...). A worker runs "
            f"plain functions: write 'def' instead of 'async def', and pool.run({fn.__name__}, ...)."
        )
    if not callable(fn):
        raise TypeError(f"pool.run() takes a function and its arguments, not {fn!r}; write pool.run(fn, 1), not fn(1)")
    call = type(fn).__call__ if not inspect.isroutine(fn) else fn
    if any(inspect.iscoroutinefunction(each) or inspect.isasyncgenfunction(each) for each in (fn, call)):
        raise TypeError(
            f"{describe_callable(fn)} is an 'async def' function; a worker has no event loop and runs plain functions. "
            "Await it here, or move its CPU-bound part to a function made with 'def' and run that."
        )
