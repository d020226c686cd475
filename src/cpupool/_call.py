"""One call on its way: checked, pickled, run by a worker, and turned back into a value or an error.

`Call.complete` makes attempts until one has an outcome.  An attempt takes a lease on a worker from the dispatcher
(`queue_up`), begins (`Supervisor.begin`), exchanges frames with the worker in the caller's own task or
thread (`Worker.exchange`) and gives it back (`Supervisor.finish`).  The lanes of a map make attempts too, each with a
batch.

A call that waits on the event loop where the worker comes free begins there and then, and is finished there too: it
wakes up only when its outcome is known (`Supervisor.begin_early`).

Rules: the lease knows at any moment whether there is a worker to give back.  Giving up a call for whatever reason
(cancellation, Ctrl-C, a coroutine that is garbage-collected) is one `except BaseException`, and `give_up`; it takes
no lock and waits for nothing: the supervisor does the rest behind the caller's back.
"""

from __future__ import annotations

import inspect
import math
import time
from types import BuiltinFunctionType
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, TypeVar

from . import _payload
from ._apart import pause_while, run_apart
from ._context import TaskFailed, carrying
from ._errors import QueueTimeout, decode_error, describe_callable
from ._frames import Kind, encode_call
from ._large import is_light, send_off, unload
from ._lease import Lease, Verdict
from ._outcomes import (
    Interruption,
    load_value,
    make_death_error,
    make_rebuild_error,
    make_stop_error,
    name_task,
)
from ._parcels import MOST_ON_LOOP, PICKLE, TooLarge, packed_size
from ._reports import ReportingWaits
from ._settings import encode_label
from ._statistics import SUBMITTED, outcome_of
from ._worker import Death, WorkerGone

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from ._frames import Frame
    from ._parcels import Parcel
    from ._settings import CallOptions
    from ._statistics import Tally
    from ._supervisor import Supervisor
    from ._waiting import ChannelWaits, Ticket, Waits
    from ._worker import Worker

T = TypeVar("T")

_ASYNC_CODE = inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR


class Errand(Protocol):
    """What a worker can be sent."""

    def exchange(self, lease: Lease[Worker], waits: Waits) -> Awaitable[Frame]:
        """Send it to the worker of a lease, and wait for the answer; see `Worker.exchange`."""
        ...


class Call:
    """A function and its arguments: checked and pickled once, however often it is tried."""

    __slots__ = ("_arguments", "_attempt", "_fn", "_label", "_options", "_packed", "_packing")

    def __init__(
        self,
        fn: Callable[..., object],
        args: tuple[object, ...],
        kwargs: dict[str, object],
        options: CallOptions,
        *,
        is_copy: bool = False,
    ) -> None:
        """Args: `is_copy` says that it must hold on to no argument, and be pickled at once, however large it is."""
        check_function(fn, "run")
        self._fn = fn
        self._options = options
        self._label = encode_label(options)
        self._attempt = 1
        self._arguments: tuple[tuple[object, ...], dict[str, object]] | None = None
        self._packed: bytes | Parcel = b""
        most = math.inf if is_copy else MOST_ON_LOOP
        began = time.monotonic()
        try:
            self._packed = _payload.pack_call(fn, args, kwargs, options.serializer, most=most, is_copy=is_copy)
        except TooLarge:
            self._arguments = args, kwargs  # it is pickled apart from the event loop
        self._packing = time.monotonic() - began  # seconds

    @property
    def _size(self) -> int | None:
        """How many bytes it holds; None while that is not known."""
        return None if self._arguments is not None else packed_size(self._packed)

    async def _pack_apart(self, args: tuple[object, ...], kwargs: dict[str, object], waits: Waits) -> None:
        """Pickle what would hold up the event loop."""

        def pack(is_wanted: Callable[[], bool]) -> bytes | Parcel:
            serializer = self._options.serializer
            return _payload.pack_call(self._fn, args, kwargs, serializer, pause=pause_while(is_wanted))

        began = time.monotonic()
        self._packed = await run_apart(pack, waits)
        self._packing += time.monotonic() - began
        self._arguments = None

    async def complete(self, supervisor: Supervisor, waits: Waits) -> Any:
        """Have a worker run it, and return its value or raise its error; it counts in the pool's statistics."""
        dispatcher, tally, fn, options = supervisor.dispatcher, supervisor.tally, self._fn, self._options
        lease: Lease[Worker] = Lease(supervisor.next_task_id(), is_admitted=options.background)
        try:
            tally.note(SUBMITTED)
            tally.tidy()
            if dispatcher.has_gate:
                await enter_gate(lease, self._size, fn, options, supervisor, waits)
            if self._arguments is not None:
                await self._pack_apart(*self._arguments, waits)
                weigh(lease, self._size or 0, supervisor)
            if options.is_unobserved and isinstance(self._packed, bytes):
                lease.errand = self
            lease.fn, lease.options = fn, options
            outcome: Frame | Interruption | None = None
            while outcome is None:  # as `run_attempt`; written out, it saves a coroutine for each call that waits
                death = None
                try:
                    if not dispatcher.borrow_idle(lease) and (ticket := queue_up(lease, supervisor, waits)) is not None:
                        await waits.settled(ticket)
                    if lease.outcome is None:
                        if lease.worker is None:
                            raise_why_none(lease)
                        if not lease.is_begun:
                            supervisor.begin(lease)
                        supervisor.finish(lease, await self.exchange(lease, waits))
                    elif lease.worker is not None:  # it is dismissed; or a signal handler has broken that off
                        supervisor.post(supervisor.take_back, lease)
                    outcome = lease.outcome
                except WorkerGone:
                    death = await learn_death(lease, supervisor, waits)
                except BaseException:
                    give_up(lease, supervisor)
                    raise
                if death is not None:
                    self._lose(death, lease, supervisor)
                    lease.begin_anew(supervisor.next_task_id())
            if isinstance(outcome, Interruption) or outcome.kind is not Kind.RESULT:
                raise self._make_error(outcome, lease, supervisor)
            body, seconds = outcome.body, outcome.seconds
            if (len(body) <= MOST_ON_LOOP and body[0] == PICKLE) or is_light(body):
                value = load_value(body, fn, options, outcome.received)
            else:
                value = await self._unload(outcome, waits)
            overhead = self._packing + time.monotonic() - lease.started - seconds
            times = lease.queued, seconds, overhead
            lease.is_counted = True  # no signal handler can raise between this and the note
            tally.note(("succeeded", 1, times))
            tally.tidy()
            if dispatcher.has_gate:
                leave_gate(lease, supervisor)
        except BaseException as error:
            if not lease.is_counted:
                count_failure(error, tally, has_run=lease.started > 0)
            if dispatcher.has_gate:
                leave_gate(lease, supervisor, error)
            raise
        return value

    def _lose(self, death: Death, lease: Lease[Worker], supervisor: Supervisor) -> None:
        """Count the worker's death, and return if another one may try; otherwise raise the error."""
        has_run = death.last_task_id == lease.task_id  # else the worker died before it picked the task up
        is_stopped = lease.verdict is not None or (supervisor.dispatcher.closed and death.by_pool)
        if is_stopped or (has_run and self._attempt > self._options.retries):
            supervisor.dispatcher.forget_bereaved(lease)
            supervisor.notify()
            if is_stopped:
                raise make_stop_error(death, lease, self._fn, self._options, supervisor.name)
            raise make_death_error(death, self._fn, self._options)
        if has_run:
            self._attempt += 1
            supervisor.tally.count("retried")

    def encode(self, task_id: int) -> bytes:
        """Return its frame, if it is small and travels without a context."""
        packed: bytes = self._packed  # type: ignore[assignment]  # it is small
        return encode_call(task_id, self._attempt, self._label, b"", packed)

    def exchange(self, lease: Lease[Worker], waits: Waits) -> Awaitable[Frame]:
        """Send it to the worker of the lease, unless it was sent, and wait for the answer."""
        task_id, options = lease.task_id, self._options
        worker: Worker = lease.worker  # type: ignore[assignment]  # it has one now
        if lease.is_begun:
            return worker.await_answer(task_id, waits)
        if lease.errand is not None:
            return worker.exchange(task_id, self.encode(task_id), waits)
        return exchange_in_context(
            lease,
            lambda context: with_reports(
                worker, options.on_report, waits, lambda waits: self._send_to(worker, task_id, context, waits)
            ),
        )

    def _send_to(self, worker: Worker, task_id: int, context: bytes, waits: ChannelWaits) -> Awaitable[Frame]:
        packed = self._packed
        if isinstance(packed, bytes):
            call = encode_call(task_id, self._attempt, self._label, context, packed)
            return worker.exchange(task_id, call, waits)
        shipment = send_off(packed, worker.known_shares)
        files, tail = len(shipment.descriptors), shipment.tail_size
        call = encode_call(task_id, self._attempt, self._label, context, shipment.head, files=files, tail=tail)
        return worker.exchange_large(task_id, call, waits, shipment)

    def _make_error(self, outcome: Frame | Interruption, lease: Lease[Worker], supervisor: Supervisor) -> Exception:
        """Make the error in an answer."""
        if isinstance(outcome, Interruption):
            if lease.verdict is Verdict.TIMED_OUT:
                supervisor.tally.note((None, 1, (lease.queued, lease.interrupted - lease.started, 0.0)))
            return make_stop_error(outcome, lease, self._fn, self._options, supervisor.name)
        overhead = self._packing + time.monotonic() - lease.started - outcome.seconds
        times = lease.queued, outcome.seconds, overhead
        lease.is_counted = True
        supervisor.tally.note(("failed", 1, times))  # whatever the error is: the task has made it
        return decode_error(outcome.body, name_task(self._fn, self._options))

    async def _unload(self, answer: Frame, waits: Waits) -> Any:
        """Return the value in an answer that is not light."""
        try:
            return await unload(answer.body, answer.received, waits)
        except _payload.RebuildFailed as failed:
            raise make_rebuild_error(answer.body, failed, self._fn, self._options)  # noqa: B904  # it has its cause


async def run_attempt(
    lease: Lease[Worker],
    errand: Errand,
    fn: Callable[..., object],
    options: CallOptions,
    supervisor: Supervisor,
    waits: Waits,
    tasks: int = 1,
) -> Frame | Interruption | Death:
    """Have one worker run something, which is never begun early: returns its answer, or how it died.

    Args:
        lease: a new one, or one that has begun anew.
        errand: what is sent.
        fn: what the call runs.
        options: those of the call.
        supervisor: the pool's.
        waits: the caller's.
        tasks: as how many tasks it counts.

    Raises:
        QueueTimeout, PoolFull, PoolClosed, InitializerFailed, PoolBroken: there is no worker for it.
    """
    lease.fn, lease.options = fn, options
    try:
        if not supervisor.dispatcher.borrow_idle(lease) and (ticket := queue_up(lease, supervisor, waits)) is not None:
            await waits.settled(ticket)
            if lease.worker is None:
                raise_why_none(lease)
        supervisor.begin(lease, tasks)
        supervisor.finish(lease, await errand.exchange(lease, waits))
    except WorkerGone:
        return await learn_death(lease, supervisor, waits)
    except BaseException:
        give_up(lease, supervisor)
        raise
    outcome: Frame | Interruption = lease.outcome
    return outcome


def count_failure(error: BaseException, tally: Tally, *, has_run: bool) -> None:
    """Count a call that ends with this error."""
    if isinstance(error, Exception):
        tally.count(outcome_of(error, has_run=has_run))
    else:
        tally.note(("cancelled", 1, None))  # it may run inside a garbage collection: no lock


async def enter_gate(
    lease: Lease[Worker],
    size: int | None,
    fn: Callable[..., object],
    options: CallOptions,
    supervisor: Supervisor,
    waits: Waits,
) -> None:
    """Wait until there is room for the bytes of a call (None: not known yet); `leave_gate` follows in any case.

    Raises:
        QueueTimeout, PoolFull, PoolClosed: there is none for it.
    """
    supervisor.run()  # who leaves posts orders, and nobody else would carry them out
    ticket = lease.ticket = waits.ticket()
    lease.asked = time.monotonic()
    deadline = lease.asked + (math.inf if options.queue_timeout is None else options.queue_timeout)
    if supervisor.dispatcher.enter(lease, size, deadline):
        return
    if deadline < math.inf:
        supervisor.look_by(deadline)
    await waits.settled(ticket)
    ticket.result()
    if lease.is_expired:
        raise QueueTimeout(name_task(fn, options), options.queue_timeout or 0.0, time.monotonic() - lease.asked)


def weigh(lease: Lease[Worker], size: int, supervisor: Supervisor) -> None:
    """Note how large a call is that has entered, now that it is known."""
    if lease.weight:
        supervisor.dispatcher.weigh(lease, size)
        supervisor.post(supervisor.dispatcher.let_in)


def leave_gate(lease: Lease[Worker], supervisor: Supervisor, error: BaseException | None = None) -> None:
    """Give the room back: the call is over, by this error if there is one.  Twice is allowed."""
    if lease.ticket is not None:
        lease.ticket.withdraw()
    if error is None or isinstance(error, Exception):  # else it may run inside a garbage collection: no lock
        supervisor.dispatcher.weigh(lease, 0)  # so that the caller's next call finds its room
    supervisor.post(supervisor.dispatcher.leave, lease)


def _is_no_result(reply: Frame) -> bool:
    return reply.kind is not Kind.RESULT


async def exchange_in_context(
    lease: Lease[Worker],
    exchange: Callable[[bytes], Awaitable[Frame]],
    has_failed: Callable[[Frame], bool] = _is_no_result,
) -> Frame:
    """Exchange frames with the context that goes along with the call, packed; see `_context`."""
    options: CallOptions = lease.options  # type: ignore[assignment]  # those of this call
    fn: Callable[..., object] = lease.fn  # type: ignore[assignment]
    if not options.carriers:
        return await exchange(b"")
    reply: Frame | None = None
    kept: BaseException = WorkerGone()
    dumps = options.serializer.dumps
    try:
        with carrying(options.carriers, name_task(fn, options), lease.queued, dumps) as context:
            try:
                reply = await exchange(context)
            except BaseException as error:
                kept = error
                raise
            if has_failed(reply):
                raise TaskFailed
    except TaskFailed:
        pass
    if reply is None:
        raise kept  # a carrier has taken it for its own
    return reply


async def with_reports(
    worker: Worker,
    on_report: Callable[[Any], object] | None,
    waits: Waits,
    exchange: Callable[[ChannelWaits], Awaitable[Frame]],
) -> Frame:
    """Pass on what a task reports while its answer is waited for, and last what it has reported before that."""
    if on_report is None:
        return await exchange(waits)
    process = worker.process
    reporting = ReportingWaits(waits, process.read_report, process.last_report(), on_report)
    try:
        reply = await exchange(reporting)
    except WorkerGone:
        reporting.look()
        raise
    reporting.look()
    return reply


# --- the steps of an attempt ---


def queue_up(lease: Lease[Worker], supervisor: Supervisor, waits: Waits) -> Ticket | None:
    """Let a lease wait for a worker; returns what is to be awaited, or None if it has one after all.

    Raises:
        PoolFull, PoolClosed: it is not taken.
    """
    options: CallOptions = lease.options  # type: ignore[assignment]  # those of this call
    ticket = lease.ticket = waits.ticket()
    lease.asked = lease.asked or time.monotonic()  # it may have waited before, for room
    queue_timeout = options.queue_timeout
    deadline = math.inf if queue_timeout is None else lease.asked + queue_timeout
    if supervisor.dispatcher.enqueue(lease, deadline):
        return None
    supervisor.run()  # after queueing: a start that fails fails the queue
    if queue_timeout is not None:
        supervisor.look_by(deadline)
    return ticket


def raise_why_none(lease: Lease[Worker]) -> NoReturn:
    """Say why a lease that has waited has no worker.

    Raises:
        QueueTimeout, PoolClosed, InitializerFailed, PoolBroken: as the ticket says.
    """
    ticket, fn, options = lease.ticket, lease.fn, lease.options
    assert ticket is not None
    assert fn is not None
    assert options is not None
    ticket.result()
    raise QueueTimeout(name_task(fn, options), options.queue_timeout or 0.0, time.monotonic() - lease.asked)


async def learn_death(lease: Lease[Worker], supervisor: Supervisor, waits: Waits) -> Death:
    """Wait until it is known how the worker of a lease has died."""
    ticket = waits.ticket()
    try:
        supervisor.post(supervisor.bury, lease, ticket)
        await waits.settled(ticket)
        death: Death = ticket.result()
    except BaseException:
        ticket.withdraw()
        give_up(lease, supervisor)
        raise
    return death


def give_up(lease: Lease[Worker], supervisor: Supervisor) -> None:
    """Leave an attempt in the middle.  It may run inside a garbage collection: no lock, no waiting."""
    dispatcher, ticket = supervisor.dispatcher, lease.ticket
    try:
        is_withdrawn = ticket is not None and ticket.withdraw()
    except BaseException:  # a signal handler's
        supervisor.post(supervisor.take_back, lease)
        raise
    if is_withdrawn:
        dispatcher.has_withdrawn = True
    elif lease.worker is not None:
        supervisor.post(supervisor.take_back, lease)
    lease.errand = None  # the queue may hold the lease for a while
    if dispatcher.closed:
        supervisor.notify()  # it may have been the last one that the pool waits for


def check_function(fn: object, method: str) -> None:
    """Raise unless `fn`, given to that method of a pool, can be called and returns a value, not something to await."""
    code = getattr(fn, "__code__", None)
    if (code is not None and not code.co_flags & _ASYNC_CODE) or type(fn) is BuiltinFunctionType:
        return
    if inspect.iscoroutine(fn):
        fn.close()  # or Python would warn that it was never awaited
        raise TypeError(
            f"pool.{method}() takes a function and its arguments, not the coroutine {fn.__qualname__}(...). A worker "
            f"runs plain functions: write 'def' instead of 'async def', and pool.{method}({fn.__name__}, ...)."
        )
    if not callable(fn):
        raise TypeError(
            f"pool.{method}() takes a function and its arguments, not {fn!r}; write pool.{method}(fn, 1), not fn(1)"
        )
    call = type(fn).__call__ if not inspect.isroutine(fn) else fn
    if any(inspect.iscoroutinefunction(each) or inspect.isasyncgenfunction(each) for each in (fn, call)):
        raise TypeError(
            f"{describe_callable(fn)} is an 'async def' function; a worker has no event loop and runs plain functions. "
            "Await it here, or move its CPU-bound part to a function made with 'def' and run that."
        )
