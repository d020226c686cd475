"""What travels in a frame's body: pickle, protocol 5.

Everything that pickles a task, a result or an error goes through here, so that another serializer, or buffers that
travel beside the pickle, have one place to go.  It runs in the workers too: stdlib only.
"""

from __future__ import annotations

import io
import os
import pickle
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from typing import Any

PROTOCOL = 5
SERIALIZERS = ("pickle", "cloudpickle")


def check_serializer(name: object) -> None:
    """Raise unless `name` is a serializer that is installed here."""
    if name not in SERIALIZERS:
        raise ValueError(f"serializer must be one of {', '.join(map(repr, SERIALIZERS))}, not {name!r}")
    if name == "cloudpickle":
        import importlib.util

        if importlib.util.find_spec("cloudpickle") is None:
            raise ValueError("serializer='cloudpickle' needs that package: pip install 'cpupool[cloudpickle]'")


def get_dumps(serializer: str) -> Callable[[object], bytes]:
    """Return the `dumps` of that name.  What any of them makes, `loads` rebuilds."""
    return _dumps_by_value if serializer == "cloudpickle" else dumps


def dumps(value: object, _dumps: Callable[[object, int], bytes] = pickle.dumps, _protocol: int = PROTOCOL) -> bytes:
    """Pickle `value`; whatever its reducers raise comes out as it is."""
    return _dumps(value, _protocol)  # as defaults they are found faster: this is called for each item of a map


def _dumps_by_value(value: object) -> bytes:
    """Pickle `value`, and with it the code of functions and classes that workers cannot import by their names."""
    file = io.BytesIO()
    _make_pickler(file).dump(value)
    return file.getvalue()


def _make_pickler(file: io.BytesIO) -> Any:
    """Make a pickler of cloudpickle's, but with one difference.

    It takes the code of all that the main module defines along.  Workers import that module, if it has a file; what
    their initializer has set there, a copy of the code with globals of its own would not see.
    """
    global _pickler_type  # noqa: PLW0603  # made once
    if _pickler_type is None:
        import cloudpickle

        class Pickler(cloudpickle.Pickler):  # type: ignore[misc]
            def reducer_override(self, value: Any) -> Any:
                if getattr(value, "__module__", None) == "__main__" and _workers_import(value):
                    return NotImplemented  # as plain pickle does
                return super().reducer_override(value)

        _pickler_type = Pickler
    return _pickler_type(file, PROTOCOL)


_pickler_type: Any = None


def _workers_import(value: object) -> bool:
    """Return True if a worker finds `value`, of the main module, in its own main module, under its name."""
    import types

    if not isinstance(value, type | types.FunctionType):
        return False
    main = sys.modules["__main__"]
    module_name = getattr(main.__spec__, "name", None)  # if it was run by -m; then a package's __main__ is not imported
    if module_name is None:
        is_imported = os.path.exists(getattr(main, "__file__", None) or "")
    else:
        is_imported = module_name.rpartition(".")[2] != "__main__"
    found: Any = main
    for name in value.__qualname__.split("."):
        found = getattr(found, name, None)
    return is_imported and found is value


def dumps_for_start(value: object, serializer: str) -> bytes:
    """Pickle what goes to a new process, while that is started: locks and queues of multiprocessing are allowed."""
    from multiprocessing.reduction import ForkingPickler

    if serializer == "pickle":
        return bytes(ForkingPickler.dumps(value, PROTOCOL))
    import collections

    file = io.BytesIO()
    pickler = _make_pickler(file)
    pickler.dispatch_table = collections.ChainMap(ForkingPickler._extra_reducers, pickler.dispatch_table)  # type: ignore[attr-defined]
    pickler.dump(value)
    return file.getvalue()


def loads(data: memoryview | bytes, buffers: Iterable[Any] = ()) -> Any:
    """Rebuild what `dumps` took; `buffers` are the out-of-band ones, in order."""
    return pickle.loads(data, buffers=buffers)


class RebuildFailed(Exception):
    """Something that a worker has sent cannot be rebuilt here; its `__cause__` says why."""


def loads_result(data: memoryview | bytes) -> Any:
    """Rebuild what a worker has sent.  The code that does it is the user's, and may raise anything.

    Raises:
        RebuildFailed: it did; also where that was `SystemExit` or the like, which must not end the program.
        BaseException: what a signal handler raised meanwhile: Ctrl-C, or the program's own answer to SIGTERM.
    """
    try:
        return pickle.loads(data)
    except BaseException as error:
        if _comes_from_signal_handler(error):
            raise
        raise RebuildFailed from error


def _comes_from_signal_handler(error: BaseException) -> bool:
    if isinstance(error, KeyboardInterrupt):
        return True
    import signal
    import traceback

    handlers = [signal.getsignal(number) for number in signal.valid_signals()]
    codes = {getattr(getattr(each, "__func__", each), "__code__", None) for each in handlers} - {None}
    return any(frame.f_code in codes for frame, _ in traceback.walk_tb(error.__traceback__))


def first_type(data: memoryview | bytes) -> str | None:
    """Name the first class that a pickle refers to, which is that of the outermost object, without running it."""
    import pickletools

    texts: list[str] = []
    try:
        for opcode, argument, _ in pickletools.genops(bytes(data)):
            if opcode.name == "STACK_GLOBAL":
                return ".".join(texts[-2:])
            if isinstance(argument, str):
                texts.append(argument)
    except ValueError:
        pass  # not a pickle
    return None


def dumps_function(fn: Callable[..., object], dumps: Callable[[object], bytes]) -> bytes:
    """Pickle a function alone.

    Raises:
        TaskNotPicklable: it cannot be pickled; it names the cure.
    """
    try:
        return dumps(fn)
    except Exception as error:
        raise explain(fn, (), {}, dumps, error) or error from error


def dumps_call(
    fn: Callable[..., object], args: tuple[object, ...], kwargs: Mapping[str, object], dumps: Callable[[object], bytes]
) -> bytes:
    """Pickle a call with `dumps`, one that `get_dumps` returns.

    Raises:
        TaskNotPicklable: the function or an argument cannot be pickled; it names which, and the cure.
    """
    try:
        return dumps((fn, args, kwargs))
    except Exception as error:
        explained = explain(fn, args, kwargs, dumps, error)
        if explained is None:
            raise
        raise explained from error


def explain(
    fn: Callable[..., object],
    args: tuple[object, ...],
    kwargs: Mapping[str, object],
    dumps: Callable[[object], bytes],
    error: Exception,
) -> Exception | None:
    """Find the part of a call that pickle refuses with `error`, by trying each one alone; None if none any more."""
    from ._errors import TaskNotPicklable, describe_callable

    task = describe_callable(fn)
    reason = f"{type(error).__name__}: {error}"
    if not _pickles(fn, dumps):
        return TaskNotPicklable(task, "the function", reason, _FUNCTION_ADVICE)
    parts = [(f"argument {index}", value) for index, value in enumerate(args, 1)]
    parts += [(f"argument {name!r}", value) for name, value in kwargs.items()]
    for name, value in parts:
        if not _pickles(value, dumps):
            return TaskNotPicklable(task, f"{name} (a {type(value).__name__})", reason, _ARGUMENT_ADVICE)
    if _pickles((fn, args, kwargs), dumps):
        return None  # the error came from elsewhere: from a signal handler of the program
    return TaskNotPicklable(task, "the arguments together", reason, _ARGUMENT_ADVICE)


def _pickles(value: object, dumps: Callable[[object], bytes]) -> bool:
    try:
        dumps(value)
    except Exception:
        return False
    return True


_FUNCTION_ADVICE = (
    "Workers import the function by its name, so define it with 'def' at the top level of a module (no lambda, no "
    "function inside a function), and bind values to it with functools.partial instead of a closure. Or let the pool "
    "send the code itself, with serializer='cloudpickle'."
)
_ARGUMENT_ADVICE = (
    "Send plain data (a path instead of an open file, a list instead of a generator), and make what cannot travel "
    "(locks, connections, models) in the worker: in the pool's initializer or in the function itself."
)
