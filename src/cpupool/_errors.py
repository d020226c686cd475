"""The exceptions users see, and how an exception travels from a worker to the caller.

Every class builds its own message, keeps its facts as attributes and pickles: the facts are the arguments.
It runs in the workers too: stdlib only.
"""

from __future__ import annotations

import functools
import io
import pickle

from . import _payload
from ._parcels import PROTOCOL

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

__all__ = [
    "CpuPoolError",
    "InitializerFailed",
    "PoolBroken",
    "PoolClosed",
    "PoolFull",
    "PoolNotStarted",
    "QueueTimeout",
    "RemoteError",
    "RemoteTraceback",
    "ResultNotPicklable",
    "TaskInterrupted",
    "TaskNotPicklable",
    "TaskTimeout",
    "WorkerDied",
]


class CpuPoolError(Exception):
    """The base of every error that the pool itself raises."""


class PoolClosed(CpuPoolError):
    """The pool was closed before, or while, this call was made.

    Attributes:
        name: the pool's name.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name

    def __str__(self) -> str:
        return (
            f"{self.name} is closed and takes no more calls. Make the calls inside its 'with' block, "
            "or create a new pool; a closed one opens again only when it is entered again."
        )


class PoolFull(CpuPoolError):
    """As many calls wait as the pool's `max_pending` allows; this one was not taken.

    Attributes:
        pending: how many calls wait for a worker.
        retry_after: seconds after which those will have begun to run, as estimated from the run times measured so far.
    """

    def __init__(self, pending: int, retry_after: float) -> None:
        super().__init__(pending, retry_after)
        self.pending = pending
        self.retry_after = retry_after

    def __str__(self) -> str:
        return (
            f"the pool is full: {self.pending} calls wait for a worker (max_pending). "
            f"Try again in about {self.retry_after:.3g} s."
        )


class TaskTimeout(CpuPoolError, TimeoutError):
    """The task ran longer than its `timeout`, and was stopped.

    Attributes:
        task: the function that ran, or the call's label.
        timeout: the seconds it was given.
        queued: the seconds it had waited for a worker before.
        ran: the seconds from the moment it was sent to the worker until the interrupt.
        stack: where the task was at the interrupt: its Python stack, the innermost frame first; None if not known.
    """

    def __init__(self, task: str, timeout: float, queued: float, ran: float, stack: str | None) -> None:
        super().__init__()  # OSError would make an errno and a file name of the first few
        self.args: tuple[Any, ...] = (task, timeout, queued, ran, stack)
        self.task = task
        self.timeout = timeout
        self.queued = queued
        self.ran = ran
        self.stack = stack

    def __str__(self) -> str:
        message = (
            f"{self.task} was stopped after {self.ran:.3g} s: its timeout is {self.timeout:g} s "
            f"(before that, it waited {self.queued:.3g} s for a worker)"
        )
        return f"{message}\n{self.stack}" if self.stack else message


class TaskStopped(CpuPoolError):
    """Somebody has stopped the task, with `CpuPool.interrupt`.

    Attributes:
        task: the function it was running, or the call's label.
        ran: how long it had run, in seconds.
        stack: the Python stack where it was, or None.
    """

    def __init__(self, task: str, ran: float, stack: str | None) -> None:
        super().__init__(task, ran, stack)
        self.task = task
        self.ran = ran
        self.stack = stack

    def __str__(self) -> str:
        message = f"{self.task} was stopped on request after {self.ran:.3g} s"
        return f"{message}\n{self.stack}" if self.stack else message


class QueueTimeout(CpuPoolError, TimeoutError):
    """No worker came free for the call within its `queue_timeout`; it has not run.

    Attributes:
        task: the function that was to run, or the call's label.
        queue_timeout: the seconds it was allowed to wait.
        queued: the seconds it did wait.
    """

    def __init__(self, task: str, queue_timeout: float, queued: float) -> None:
        super().__init__()  # as in TaskTimeout
        self.args: tuple[Any, ...] = (task, queue_timeout, queued)
        self.task = task
        self.queue_timeout = queue_timeout
        self.queued = queued

    def __str__(self) -> str:
        return (
            f"{self.task} was not run: no worker came free within its queue_timeout of {self.queue_timeout:g} s "
            f"(it waited {self.queued:.3g} s)"
        )


class TaskInterrupted(BaseException):
    """Raised in the worker, in the task itself, when its call is over: timed out, cancelled, or the pool closes.

    `finally` blocks run as usual.  A task may catch it to clean up, or to return what it has so far, which then is its
    result; after the pool's `grace` the worker is killed.  Source of the idea: Celery's soft time limit.
    """


class PoolBroken(CpuPoolError):
    """No worker could be started.

    Attributes:
        reason: what happened, and what to do about it.
        cause: the error behind it, if there was one here; also `__cause__`.
    """

    def __init__(self, reason: str, cause: BaseException | None = None) -> None:
        super().__init__(reason, cause)
        self.reason = reason
        self.cause = cause
        self.__cause__: BaseException | None = cause

    def __str__(self) -> str:
        return self.reason


class PoolNotStarted(CpuPoolError):
    """A request was served by an application that has no pool: its lifespan did not run.

    Attributes:
        name: the pool's name in the application's state.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name

    def __str__(self) -> str:
        named = f"cpupool.fastapi.pool_dep({self.name!r}).dependency"
        dependency = "cpupool.fastapi.get_pool" if self.name == "pool" else named
        return (
            f"the application has no pool named {self.name!r}: its lifespan, which starts it, did not run or has none. "
            "(1) In a test, let it run: 'with TestClient(app) as client', not 'client = TestClient(app)'. (2) Give the "
            "application its pool: cpupool.fastapi.install(app, pool), or lifespan=cpupool.starlette.lifespan(pool). "
            "(3) In a test of a FastAPI application without its lifespan, replace the dependency: "
            f"app.dependency_overrides[{dependency}] = lambda: pool."
        )


class InitializerFailed(CpuPoolError):
    """The pool's initializer raised in a new worker, ended its process, or did not end in time.

    What it raised is `__cause__`.

    Attributes:
        initializer: the name of the initializer.
        pid: the worker in which it ran.
        reason: what happened, if it did not raise; else None.
    """

    def __init__(self, initializer: str, pid: int, reason: str | None = None) -> None:
        super().__init__(initializer, pid, reason)
        self.initializer = initializer
        self.pid = pid
        self.reason = reason

    def __str__(self) -> str:
        cause = self.__cause__
        what = self.reason or ("failed" if cause is None else f"raised {type(cause).__name__}: {cause}")
        return f"the initializer {self.initializer} {what} (in worker {self.pid}), so no worker can start"


class WorkerDied(CpuPoolError):
    """The worker's process ended while it ran this task.  No other call is affected, and the worker is replaced.

    Attributes:
        pid: the process that died.
        exitcode: its exit status, None if a signal ended it or nobody could learn it.
        signal: the number of the signal that ended it, or None.
        oom: True if it was killed for want of memory, by the kernel or because it passed the pool's
            `hard_memory_per_child`; None where that is not known.
        task: the function it was running, or the call's label.
        stack: the Python stack at the crash, as `faulthandler` saw it, or None.
        resident: the bytes of memory it held when it passed the pool's limit; None if that was not the reason.
        limit: that limit, in bytes, or None.
        stderr: the last lines that the task's Python code has written to `sys.stderr` (20 at most, of 8 kB), or None.
            What C code has written itself, as the C library's "double free" is, is not in it: see the program's own
            standard error.
    """

    def __init__(
        self,
        pid: int,
        exitcode: int | None,
        signal: int | None,
        oom: bool | None,
        task: str,
        stack: str | None,
        resident: int | None = None,
        limit: int | None = None,
        stderr: str | None = None,
    ) -> None:
        super().__init__(pid, exitcode, signal, oom, task, stack, resident, limit, stderr)
        self.pid = pid
        self.exitcode = exitcode
        self.signal = signal
        self.oom = oom
        self.task = task
        self.stack = stack
        self.resident = resident
        self.limit = limit
        self.stderr = stderr

    def __str__(self) -> str:
        if self.resident is not None and self.limit is not None:
            how = (
                f"was killed because it held {self.resident / 2**20:,.0f} MiB of memory, more than "
                f"hard_memory_per_child ({self.limit / 2**20:,.0f} MiB),"
            )
        else:
            how = describe_exit(self.exitcode, self.signal)
            if self.oom:
                how += ", by the kernel, for want of memory,"
        message = f"worker {self.pid} {how} while it ran {self.task}"
        if self.stack:
            message += f"\n{self.stack}"
        return f"{message}\nIts last words (standard error):\n{self.stderr}" if self.stderr else message


class TaskNotPicklable(CpuPoolError, pickle.PicklingError):
    """The function or an argument cannot be sent to a worker.

    Attributes:
        task: the function that was to run.
        argument: which part of the call it is.
        reason: what pickle said.
        advice: what to do.
    """

    def __init__(self, task: str, argument: str, reason: str, advice: str) -> None:
        super().__init__(task, argument, reason, advice)
        self.task = task
        self.argument = argument
        self.reason = reason
        self.advice = advice

    def __str__(self) -> str:
        return f"{self.task} cannot be sent to a worker because of {self.argument} ({self.reason}). {self.advice}"


class ResultNotPicklable(CpuPoolError, pickle.PicklingError):
    """The task returned a value that cannot be sent back.

    Attributes:
        task: the function that ran.
        result_type: the type of what it returned.
        reason: what pickle said.
    """

    def __init__(self, task: str, result_type: str, reason: str) -> None:
        super().__init__(task, result_type, reason)
        self.task = task
        self.result_type = result_type
        self.reason = reason

    def __str__(self) -> str:
        return (
            f"{self.task} returned {self.result_type}, which cannot be sent back from the worker ({self.reason}). "
            "Return plain data: what a generator yields as a list, what an open file holds as bytes."
        )


class RemoteError(CpuPoolError):
    """Stands in for an exception of the task that cannot be rebuilt here, or must not be.

    That is one that does not pickle, whose class cannot be imported here, or that would end or cancel the caller
    (`SystemExit`, `KeyboardInterrupt`, `GeneratorExit`, `CancelledError`, `StopIteration`).

    Attributes:
        type_name: the exception's class, with its module.
        text: its message.
        traceback: the traceback in the worker, as text.
    """

    def __init__(self, type_name: str, text: str, traceback: str) -> None:
        super().__init__(type_name, text, traceback)
        self.type_name = type_name
        self.text = text
        self.traceback = traceback

    def __str__(self) -> str:
        return f"{self.type_name}: {self.text}" if self.text else self.type_name


class RemoteTraceback(Exception):
    """The traceback in the worker, as the `__cause__` of a task's exception, so that it is printed with it."""

    def __init__(self, traceback: str) -> None:
        super().__init__(traceback)
        self.traceback = traceback

    def __str__(self) -> str:
        return f'\n"""\n{self.traceback}"""'


def describe_callable(fn: object) -> str:
    """Name a function the way a traceback would: module and qualified name; of a partial, what it wraps."""
    while isinstance(fn, functools.partial):
        fn = fn.func
    name = getattr(fn, "__qualname__", None)
    if not isinstance(name, str):  # an object that is called, or one that pretends to have any attribute
        fn = type(fn)
        name = fn.__qualname__
    module = getattr(fn, "__module__", None)
    return name if module in (None, "builtins") else f"{module}.{name}"


def describe_exit(exitcode: int | None, signal: int | None) -> str:
    """Say in words how a process ended."""
    if signal is not None:
        import signal as signals

        try:
            return f"was killed by {signals.Signals(signal).name}"
        except ValueError:
            return f"was killed by signal {signal}"
    return "died" if exitcode is None else f"exited with status {exitcode}"


# --- how an error travels ---------------------------------------------------------------------------------------------
#
# An ERROR frame's body is the pickled tuple (stage, type name, text, traceback, pickled exception or None).  The
# exception is a pickle inside the pickle, so that one which cannot be rebuilt here costs only itself.

STAGE_TASK = "task"
STAGE_ARGUMENTS = "arguments"
STAGE_RESULT = "result"


def encode_error(
    error: BaseException,
    stage: str = STAGE_TASK,
    subject: str = "",
    dumps: Callable[[object], bytes] = _payload.dumps,
) -> bytes:
    """Pickle an exception for the way to the pool (worker side); it never fails, whatever the exception.

    `subject` is the type of the result for `STAGE_RESULT`; the exception's own type otherwise.
    """
    import traceback

    type_name = _full_name(type(error))
    try:
        text = str(error)
    except BaseException:
        text = "<its message could not be made>"
    try:
        trace = "".join(traceback.format_exception(error))
    except BaseException:
        trace = "".join(traceback.format_tb(error.__traceback__)) + type_name + "\n"
    record = (stage, subject or type_name, text, trace, _dump_exception(error, dumps))
    return _payload.dumps(tuple(_sendable(item) for item in record))


def encode_unpicklable(error: BaseException, result: object) -> bytes:
    """Encode what pickling a result has raised: the type of the result, and pickle's complaint as one text."""
    reason = _Reason(f"{type(error).__name__}: {error}")
    reason.__traceback__ = error.__traceback__
    return encode_error(reason, STAGE_RESULT, _full_name(type(result)))


class _Reason(Exception):
    """Why a result does not pickle."""


def _full_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")


def _sendable(item: str | bytes | None) -> str | bytes | None:
    """Replace what pickle cannot encode in a text: lone surrogates."""
    return str.encode(item, "utf-8", "backslashreplace").decode() if isinstance(item, str) else item


def decode_error(body: memoryview | bytes, task: str) -> Exception:
    """Rebuild what an ERROR frame carries: the exception itself, or the one that stands in for it."""
    stage, type_name, text, trace, pickled = _payload.loads(body)
    error: Exception
    if stage == STAGE_RESULT:
        error = ResultNotPicklable(task, type_name, text)
    elif stage == STAGE_ARGUMENTS:
        advice = (
            "It was pickled here but could not be rebuilt in the worker: the worker must be able to import the module "
            "it is defined in. A function typed into an interactive session, or given with -c, has none; and the main "
            "module of a package (python -m package) or of a zip file is not imported there. Move it to another "
            "module, or let the pool send the code itself, with serializer='cloudpickle'."
        )
        error = TaskNotPicklable(task, "the function or an argument", f"{type_name}: {text}", advice)
    else:
        error = _load_exception(pickled) or RemoteError(type_name, text, trace)
    BaseException.__setattr__(error, "__cause__", RemoteTraceback(trace))  # its own may refuse: a frozen dataclass
    return error


def decode_traceback(body: memoryview | bytes) -> str:
    """Return only the traceback that an encoded error carries, as text."""
    _, _, _, trace, _ = _payload.loads(body)
    text: str = trace
    return text


def _load_exception(pickled: bytes | None) -> Exception | None:
    if pickled is None:
        return None
    try:
        error = _payload.loads_result(pickled)
    except _payload.RebuildFailed:
        return None
    return error if isinstance(error, Exception) else None


def _dump_exception(error: BaseException, dumps: Callable[[object], bytes]) -> bytes | None:
    """Pickle an exception so that it comes back as it is, or return None.

    Default pickling calls the class again with `args`, which fails, or garbles the message, for every class whose
    `__init__` takes something else.  So the result is tried out here, where failing costs nothing.
    """
    if not isinstance(error, Exception) or isinstance(error, StopIteration):
        return None
    for dump in (dumps, _dump_without_init):
        try:
            pickled = dump(error)
            if _same(_payload.loads(pickled), error):
                return pickled
        except BaseException:  # its own code runs here, and may raise anything
            continue
    return None


def _same(copy: object, original: BaseException) -> bool:
    if type(copy) is not type(original) or not isinstance(copy, BaseException):
        return False
    if isinstance(copy, BaseExceptionGroup) and isinstance(original, BaseExceptionGroup):
        members = zip(copy.exceptions, original.exceptions, strict=True)
        return copy.message == original.message and all(_same(a, b) for a, b in members)
    return str(copy) == str(original) and len(copy.args) == len(original.args)


def _dump_without_init(error: Exception) -> bytes:
    file = io.BytesIO()
    _ExceptionPickler(file, PROTOCOL).dump(error)
    return file.getvalue()


class _ExceptionPickler(pickle.Pickler):
    """Pickles exceptions, nested ones too, by their state instead of by calling their Python-level `__init__`."""

    def reducer_override(self, value: object) -> Any:
        kind = type(value)
        if not isinstance(value, BaseException) or kind.__reduce__ is not BaseException.__reduce__:
            return NotImplemented
        native = next(
            base for base in kind.__mro__ if "__init__" in vars(base) and not _is_python(vars(base)["__init__"])
        )
        return _rebuild_exception, (kind, native, value.args, value.__dict__)


def _is_python(function: object) -> bool:
    return hasattr(function, "__code__")


def _rebuild_exception(
    kind: type[BaseException],
    native: type[BaseException],
    args: tuple[object, ...],
    state: dict[str, object],
) -> BaseException:
    """Make an exception as the interpreter's own part of its class would, then give it its attributes."""
    new: Callable[..., BaseException] = kind.__new__
    error = new(kind, *args)
    native.__init__(error, *args)
    error.__dict__.update(state)
    return error
