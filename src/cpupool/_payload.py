"""What travels in a frame's body: pickle, protocol 5; how large values do is in `_parcels`.

Everything that pickles a task, a result or an error goes through here.  It runs in the workers too: stdlib only.
"""

from __future__ import annotations

import collections
import copyreg
import io
import math
import os
import pickle
import sys
import types
from typing import ClassVar, NamedTuple

from ._parcels import LARGE, PICKLE, PROTOCOL, GivenUp, Parcel, TooLarge, is_parcel, pack, reduce_view, unpack

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from typing import Any

SERIALIZERS = ("pickle", "cloudpickle")


class Serializer(NamedTuple):
    """How a pool pickles.  What any of them makes, `loads` rebuilds.

    Attributes:
        dumps: pickles a value.
        make_pickler: makes a pickler of a file, and of a callback for buffers as in PEP 574.
    """

    dumps: Callable[[object], bytes]
    make_pickler: Callable[[Any, Callable[[Any], object] | None], Any]


def check_serializer(name: object) -> None:
    """Raise unless `name` is a serializer that is installed here."""
    if name not in SERIALIZERS:
        raise ValueError(f"serializer must be one of {', '.join(map(repr, SERIALIZERS))}, not {name!r}")
    if name == "cloudpickle":
        import importlib.util

        if importlib.util.find_spec("cloudpickle") is None:
            raise ValueError("serializer='cloudpickle' needs that package: pip install 'cpupool[cloudpickle]'")


def get_serializer(name: str) -> Serializer:
    """Return the serializer of that name."""
    return BY_VALUE if name == "cloudpickle" else BY_NAME


def dumps(value: object, _dumps: Callable[[object, int], bytes] = pickle.dumps, _protocol: int = PROTOCOL) -> bytes:
    """Pickle `value`; whatever its reducers raise comes out as it is."""
    return _dumps(value, _protocol)  # as defaults they are found faster: this is called for each item of a map


def _make_pickler(file: Any, keep: Callable[[Any], object] | None = None) -> Any:
    pickler = pickle.Pickler(file, PROTOCOL, buffer_callback=keep)
    pickler.dispatch_table = {**copyreg.dispatch_table, memoryview: reduce_view}
    return pickler


def _dumps_by_value(value: object) -> bytes:
    """Pickle `value`, and with it the code of functions and classes that workers cannot import by their names."""
    file = io.BytesIO()
    _make_value_pickler(file).dump(value)
    return file.getvalue()


def _make_value_pickler(file: Any, keep: Callable[[Any], object] | None = None) -> Any:
    """Make a pickler of cloudpickle's, but with one difference.

    It takes the code of all that the main module defines along.  Workers import that module, if it has a file; what
    their initializer has set there, a copy of the code with globals of its own would not see.
    """
    global _pickler_type  # noqa: PLW0603  # made once
    if _pickler_type is None:
        import cloudpickle

        class Pickler(cloudpickle.Pickler):  # type: ignore[misc]
            dispatch_table: ClassVar = collections.ChainMap(
                {memoryview: reduce_view}, cloudpickle.Pickler.dispatch_table
            )

            def reducer_override(self, value: Any) -> Any:
                if getattr(value, "__module__", None) == "__main__" and _workers_import(value):
                    return NotImplemented  # as plain pickle does
                return super().reducer_override(value)

        _pickler_type = Pickler
    return _pickler_type(file, PROTOCOL, keep)


_pickler_type: Any = None
BY_NAME = Serializer(dumps, _make_pickler)
BY_VALUE = Serializer(_dumps_by_value, _make_value_pickler)


def _workers_import(value: object) -> bool:
    """Return True if a worker finds `value`, of the main module, in its own main module, under its name."""
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


def pack_for_start(value: object, serializer: str) -> bytes | Parcel:
    """Pickle what goes to a new process, while that is started: locks and queues of multiprocessing are allowed."""
    from multiprocessing.reduction import ForkingPickler

    def make(file: Any, keep: Callable[[Any], object]) -> Any:
        if serializer == "pickle":
            pickler = ForkingPickler(file, PROTOCOL, True, keep)
            pickler.dispatch_table[memoryview] = reduce_view  # a ChainMap of its own
            return pickler
        pickler = _make_value_pickler(file, keep)
        pickler.dispatch_table = collections.ChainMap(ForkingPickler._extra_reducers, pickler.dispatch_table)  # type: ignore[attr-defined]
        return pickler

    return pack(value, make)


def loads(data: memoryview | bytes, buffers: Iterable[Any] = ()) -> Any:
    """Rebuild what `dumps` took; `buffers` are the out-of-band ones, in order."""
    return pickle.loads(data, buffers=buffers)


class RebuildFailed(Exception):
    """Something that a worker has sent cannot be rebuilt here; its `__cause__` says why."""


def loads_result(
    data: memoryview | bytes, received: Sequence[Any] = (), pause: Callable[[], object] | None = None
) -> Any:
    """Rebuild what a worker has sent, as `unpack`.  The code that does it is the user's, and may raise anything.

    Raises:
        RebuildFailed: it did; also where that was `SystemExit` or the like, which must not end the program.
        BaseException: what a signal handler raised meanwhile: Ctrl-C, or the program's own answer to SIGTERM.
    """
    try:
        if pause is None and data[0] == PICKLE:
            return pickle.loads(data)
        return unpack(data, received=received, pause=pause)
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
    if is_parcel(data):
        return None
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


# What takes next to no time to pickle, and is no large value.
_SCALARS = frozenset((int, float, bool, type(None)))
# Types whose values are most often small, and if not, may be copied into the pickle.
PLAIN = _SCALARS | {str, bytes, bytearray, complex, tuple, list, dict, set, frozenset}
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType)
_SMALL_TEXT = 16 * 1024  # characters
_FEW = 16  # elements
_LARGE_TEXT = 1024 * 1024  # characters; encoding it takes a while, in one go


def pack_function(
    fn: Callable[..., object],
    serializer: Serializer,
    *,
    most: float = math.inf,
    pause: Callable[[], object] | None = None,
) -> bytes | Parcel:
    """Pickle a function alone; see `pack`.

    Raises:
        TooLarge: it takes more than `most` bytes.
        TaskNotPicklable: it cannot be pickled; it names the cure.
    """
    try:
        return pack(fn, serializer.make_pickler, most=most, pause=pause)
    except GivenUp:
        raise
    except Exception as error:
        raise explain(fn, (), {}, serializer, error, pause) or error from error


def pack_call(
    fn: Callable[..., object],
    args: tuple[object, ...],
    kwargs: Mapping[str, object],
    serializer: Serializer,
    *,
    most: float = math.inf,
    pause: Callable[[], object] | None = None,
    is_copy: bool = False,
) -> bytes | Parcel:
    """Pickle a call; see `pack`.

    Raises:
        TooLarge: it takes more than `most` bytes.
        TaskNotPicklable: the function or an argument cannot be pickled; it names which, and the cure.
    """
    are_small = _SCALARS.issuperset(map(type, args)) or all(map(_is_small, args))
    if are_small and serializer is BY_NAME and not kwargs and type(fn) in _FUNCTIONS:
        try:
            return dumps((fn, args, kwargs))
        except Exception as error:
            raise explain(fn, args, kwargs, serializer, error) or error from error
    if any(type(each) is str and len(each) > _LARGE_TEXT for each in (*args, *kwargs.values())):
        if most < math.inf:
            raise TooLarge
        args = tuple(map(wrap_text, args))
        kwargs = {name: wrap_text(each) for name, each in kwargs.items()}
    try:
        return pack((fn, args, kwargs), serializer.make_pickler, most=most, pause=pause, is_copy=is_copy)
    except GivenUp:
        raise
    except Exception as error:
        explained = explain(fn, args, kwargs, serializer, error, pause)
        if explained is None:
            raise
        raise explained from error


def pack_items(
    columns: tuple[Sequence[Any], ...],
    serializer: Serializer,
    *,
    most: float = math.inf,
    pause: Callable[[], object] | None = None,
) -> bytes | Parcel:
    """Pickle the items of a batch; see `pack`."""
    if len(columns[0]) == 1 and any(type(each[0]) is str and len(each[0]) > _LARGE_TEXT for each in columns):
        if most < math.inf:
            raise TooLarge
        columns = tuple([wrap_text(each[0])] for each in columns)
    return pack(columns, serializer.make_pickler, most=most, pause=pause)


def _is_small(value: Any, depth: int = 2) -> bool:
    """Return True if pickling it takes next to no time, and it is no large value."""
    kind = type(value)
    if kind in _SCALARS:
        return True
    if kind is str or kind is bytes:
        return len(value) < _SMALL_TEXT
    if not depth or kind not in (tuple, list, dict) or len(value) > _FEW:
        return False
    for each in value:
        if not _is_small(each, depth - 1):
            return False
    if kind is dict:
        for each in value.values():
            if not _is_small(each, depth - 1):
                return False
    return True


def pack_result(value: object, serializer: Serializer) -> bytes | Parcel:
    """Pickle what a task has returned (worker side)."""
    if serializer is BY_NAME and _is_small(value):
        return dumps(value)
    return pack(wrap_text(value), serializer.make_pickler, refers=False)  # the pool knows of no shares of a worker's


def make_record_packer(serializer: Serializer) -> Callable[[object], bytes | Parcel]:
    """Return what pickles the results of items, of which there may be millions (worker side)."""
    if serializer is not BY_NAME:
        return lambda value: pack_result(value, serializer)
    kept: list[Any] = []

    def keep(buffer: pickle.PickleBuffer) -> bool:
        raw = buffer.raw()
        if raw.nbytes < LARGE:
            return True
        kept.append(raw)
        return False

    def pack_record(value: Any) -> bytes | Parcel:
        if type(value) is str and len(value) > _LARGE_TEXT:
            return pack_result(value, serializer)
        kept.clear()  # of one that has failed
        try:
            data = pickle.dumps(value, PROTOCOL, buffer_callback=keep)
        except Exception:
            return pack_result(value, serializer)  # it takes a `memoryview` too
        if not kept and len(data) < LARGE:
            return data
        return Parcel([data], len(data), kept.copy())

    return pack_record


class Text:
    """A large text that is pickled in pieces."""

    __slots__ = ("value",)

    def __init__(self, value: str) -> None:
        self.value = value

    def __reduce__(self) -> tuple[Any, ...]:
        starts = range(0, len(self.value), _LARGE_TEXT)
        return join_text, ([self.value[at : at + _LARGE_TEXT].encode("utf-8", "surrogatepass") for at in starts],)


def join_text(pieces: list[bytes]) -> str:
    """Rebuild a large text."""
    return "".join([piece.decode("utf-8", "surrogatepass") for piece in pieces])


def wrap_text(value: Any) -> Any:
    """Return a large text as a `Text`, and anything else as it is."""
    return Text(value) if type(value) is str and len(value) > _LARGE_TEXT else value


def explain(
    fn: Callable[..., object],
    args: tuple[object, ...],
    kwargs: Mapping[str, object],
    serializer: Serializer,
    error: Exception,
    pause: Callable[[], object] | None = None,
) -> Exception | None:
    """Find the part of a call that pickle refuses with `error`, by trying each one alone; None if none any more.

    `pause` as for `pack`.
    """
    from ._errors import TaskNotPicklable, describe_callable

    task = describe_callable(fn)
    reason = f"{type(error).__name__}: {error}"
    if not _pickles(fn, serializer, pause):
        return TaskNotPicklable(task, "the function", reason, _FUNCTION_ADVICE)
    parts = [(f"argument {index}", value) for index, value in enumerate(args, 1)]
    parts += [(f"argument {name!r}", value) for name, value in kwargs.items()]
    for name, value in parts:
        if not _pickles(value, serializer, pause):
            advice = getattr(error, "advice", _ARGUMENT_ADVICE)
            return TaskNotPicklable(task, f"{name} (a {type(value).__name__})", reason, advice)
    if _pickles((fn, args, kwargs), serializer, pause):
        return None  # the error came from elsewhere: from a signal handler of the program
    return TaskNotPicklable(task, "the arguments together", reason, _ARGUMENT_ADVICE)


def _pickles(value: object, serializer: Serializer, pause: Callable[[], object] | None) -> bool:
    try:
        pack(value, serializer.make_pickler, pause=pause)
    except GivenUp:
        raise
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
