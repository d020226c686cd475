"""One worker seen from the pool: where it stands in its life, and how one call talks with it.

Rules:

- A worker's channel belongs to its owner: the supervisor until the worker is ready and after a call has given it up,
  otherwise the call it is lent to.  On its behalf the one before it may send, and the event loop read, until its task
  wakes up.
- Only the supervisor changes `state`, along `_TRANSITIONS`.
- A signal handler may raise in the main thread after any function call: when the system has sent or received, and
  before the program has noted how much.  So the system calls are made by `list.extend(map(...))`, which notes it in C,
  and whoever takes over the channel goes on from there.
"""

from __future__ import annotations

import enum
import math
import signal
import socket
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from ._files import ANCILLARY_FLAGS, ANSWER_ANCILLARY_SIZE, disclose, enclose
from ._frames import FrameDecoder, Kind, ProtocolError, encode_frame
from ._journal import find_record
from ._large import receive
from ._parcels import find_stream
from ._status import CRASH_HEADING, UNKNOWN_STATUS

if TYPE_CHECKING:
    from collections.abc import Coroutine, Sequence

    from ._files import Descriptor, Stream
    from ._frames import Frame
    from ._lease import Lease
    from ._parcels import Shipment
    from ._process import WorkerProcess
    from ._waiting import ChannelWaits, Ticket

_RECEIVE_SIZE = 64 * 1024
_MAX_RECEIVE_SIZE = 1024 * 1024
FIRST_LOOK, LONGEST_LOOK = 0.01, 0.1  # seconds without a frame, after which a batch's journal is looked at
_NO_SIGNAL = getattr(socket, "MSG_NOSIGNAL", 0)  # a program may have set SIGPIPE to end it


class State(enum.Enum):
    STARTING = "starting"  # its initializer has not finished
    READY = "ready"  # idle, or lent to a call: the dispatcher knows
    RECOVERING = "recovering"  # its call has given it up: its task is interrupted, and its answer awaited
    LEAVING = "leaving"  # told to exit
    KILLED = "killed"
    ENDED = "ended"  # its exit status is known


_TRANSITIONS = {
    State.STARTING: {State.READY, State.LEAVING, State.KILLED, State.ENDED},
    State.READY: {State.RECOVERING, State.LEAVING, State.KILLED, State.ENDED},
    State.RECOVERING: {State.READY, State.LEAVING, State.KILLED, State.ENDED},
    State.LEAVING: {State.KILLED, State.ENDED},
    State.KILLED: {State.ENDED},
    State.ENDED: set[State](),
}


class WorkerGone(Exception):
    """The connection to the worker has ended: it is dead, or about to be killed."""


@dataclass(frozen=True, slots=True)
class Death:
    """How a worker ended.  `exitcode` and `signal` are both None where nobody could learn it.

    `stack` is what `faulthandler` wrote: at a crash, or else at an interrupt.  `by_pool` says that the pool itself has
    killed it to stop it.  `oom` says that it was for want of memory; `excess`, what it held and what it might,
    if it was the pool that did not let it have more.  `last_words` is what its task last wrote to standard error.  If
    it ran a batch, `has_begun` says that an item had, and `journal` holds the results that it held back.
    """

    pid: int
    exitcode: int | None
    signal: int | None
    stack: str | None
    last_task_id: int
    by_pool: bool
    oom: bool | None
    excess: tuple[int, int] | None
    last_words: str | None
    has_begun: bool
    journal: bytes | None

    @property
    def crash_stack(self) -> str | None:
        """The stack at a crash, or None if it did not crash."""
        return self.stack if self.stack is not None and self.stack.startswith(CRASH_HEADING) else None


class Lane(Protocol):
    """Who sends batches, and takes their results."""

    @property
    def first_look(self) -> float:
        """After how many seconds without an answer the journal is looked at; then at growing intervals."""
        ...

    def on_sent(self) -> None:
        """Do what can be done while the batch runs: it is sent."""
        ...

    def take(self, body: memoryview | bytes, received: Sequence[Any] = ()) -> int:
        """Take some results, packed: from partial answers, from the answer, and, if nothing comes, from the journal.

        Args:
            body: the results.
            received: what of the one that is large came through a stream.

        Returns:
            How many of the items are done.
        """
        ...

    def is_late(self) -> bool:
        """Return True if the batch has taken its time, and others could run the items that have not begun."""
        ...


class Worker:
    """A worker process and the state of its connection.

    Attributes:
        process: its operating-system side.
        born: when it was started, on the monotonic clock.
        state: see `State`.
        deadline: when the supervisor kills it, on the monotonic clock; while it is lent, its lease has one of its own.
        was_killed: True if the pool has killed it.
        was_sent_home: True if it was told to leave.
        oom: True if the kernel has killed it for want of memory; None if that cannot be known.
        excess: the bytes of memory for which the pool has killed it, and how many it was allowed; or None.
        heir: settled with its `Death` for the call that lost it.
        last_task: the name of the task of that call, or of the one for which the pool kills it.
        tasks_left: how many it may still be given.
        tasks_done: how many it has answered.
        heard: when something last came from it, on the monotonic clock.
        max_memory: the bytes it may hold after a task and go on, or None.
        in_call: True from the moment a call is sent until its answer is here, but for what is large of it.
        taken: a frame that has arrived, and that `receive` gives back once more; or None.
        unsent: what is still to be sent of that call, or None.
        shares: the numbers of the shared files that it was sent.
        known_shares: those of them that it has used.
        ended_shares: those of them that have ended, which it has yet to be told.
    """

    __slots__ = (
        "_death",
        "_decoder",
        "_has_shipment",
        "_incoming",
        "_received",
        "_sent",
        "_state",
        "_streams",
        "_tail",
        "_unsent_files",
        "born",
        "deadline",
        "ended_shares",
        "excess",
        "heard",
        "heir",
        "in_call",
        "known_shares",
        "last_task",
        "max_memory",
        "oom",
        "process",
        "shares",
        "taken",
        "tasks_done",
        "tasks_left",
        "unsent",
        "was_killed",
        "was_sent_home",
    )

    def __init__(
        self, process: WorkerProcess, deadline: float, *, max_tasks: int | None = None, max_memory: int | None = None
    ) -> None:
        self.process = process
        self.born = self.heard = time.monotonic()
        self.deadline = deadline
        self.heir: Ticket | None = None
        self.last_task: str | None = None
        self.was_killed = False
        self.was_sent_home = False
        self.oom: bool | None = False
        self.excess: tuple[int, int] | None = None
        self.tasks_left: float = math.inf if max_tasks is None else max_tasks
        self.tasks_done = 0
        self.max_memory = max_memory
        self.in_call = False
        self.unsent: memoryview | None = None
        self.shares: set[int] = set()
        self.known_shares: set[int] = set()
        self.ended_shares: list[int] = []
        self._tail: list[memoryview] = []  # what is to be sent after that, the last first
        self._unsent_files: Sequence[Descriptor] = ()  # they go along with its first byte
        self._has_shipment = False  # True while any of these have anything in them
        self._streams: Sequence[Descriptor] = ()  # those of them that are closed here once they have gone
        self._incoming: Stream | None = None  # what is large of an answer
        self.taken: Frame | None = None
        self._state = State.STARTING
        self._death: Death | None = None  # once it was asked for
        self._decoder = FrameDecoder()
        self._sent: list[int] = []  # how many bytes of `unsent` were sent, until that is noted there
        self._received: list[Any] = []  # what was received, until it is fed to the decoder

    def __repr__(self) -> str:
        return f"<Worker {self.process.pid} {self._state.value}>"

    @property
    def state(self) -> State:
        return self._state

    @state.setter
    def state(self, state: State) -> None:
        if state not in _TRANSITIONS[self._state]:
            raise RuntimeError(f"{self!r} cannot become {state.value}")
        self._state = state

    @property
    def is_too_large(self) -> bool:
        """True if it held more memory after its last task than it may, to go on."""
        return self.max_memory is not None and self.process.resident() > self.max_memory

    def post(self, frame: bytes, shipment: Shipment | None = None, *, is_call: bool = True) -> None:
        """Note what is to be sent: a frame, and what belongs to it; `send_rest` sends it."""
        unsent = memoryview(frame)
        tail: list[memoryview] = []
        files: Sequence[Descriptor] = ()
        if shipment is not None:
            tail += [memoryview(each) for each in reversed(shipment.tail) if len(each)]
            files = shipment.descriptors
        # From here on nothing is called until all is noted: no signal handler can raise in between.
        self._tail, self._unsent_files, self.unsent, self.in_call = tail, files, unsent, is_call
        self._has_shipment = shipment is not None
        if shipment is not None:
            self._streams = shipment.streams
            for shared in shipment.shares:
                self.shares.add(shared.number)
                if shared.is_ended:  # while the call waited
                    self.ended_shares.append(shared.number)

    def send_early(self, call: bytes, lease: Lease[Worker]) -> bool:
        """Begin to send a call, a whole frame, whose caller does not know yet that it has this worker.

        Returns:
            False if the caller has to send the rest, or to see what has happened.
        """
        unsent = memoryview(call)
        # Nothing is called until all is noted: no signal handler can raise in between.
        self.tasks_left -= 1
        self.unsent = unsent
        self.in_call = True
        lease.is_begun = True
        try:
            return self.send_rest()
        except ConnectionError:
            return False

    def exchange(self, task_id: int, call: bytes, waits: ChannelWaits) -> Coroutine[Any, Any, Frame]:
        """Send a call, a whole frame, and wait for its answer.

        Raises:
            WorkerGone: the connection ended first.

        Cancellation: the worker is left in the middle of a call; it has to be handed to the supervisor.
        """
        self.tasks_left -= 1
        self.unsent = memoryview(call)
        self.in_call = True
        return self._converse(task_id, waits)

    async def exchange_large(self, task_id: int, call: bytes, waits: ChannelWaits, shipment: Shipment) -> Frame:
        """Do as `exchange` with a call to which more belongs than its frame."""
        self.tasks_left -= 1
        self.post(call, shipment)
        try:
            reply = await self._converse(task_id, waits)
        finally:
            _end_sendings(shipment)
        if reply.kind is Kind.RESULT:
            self.known_shares.update(shared.number for shared in shipment.shares)
        return reply

    def await_answer(self, task_id: int, waits: ChannelWaits) -> Coroutine[Any, Any, Frame]:
        """Do as `exchange` with a call that was sent, or has begun to be, by `send_early`."""
        return self._converse(task_id, waits, may_be_here=True)

    def take_early(self) -> Frame | None:
        """Do as `receive`, and keep the frame in `taken`, where `receive` finds it again."""
        self.taken = self.receive()
        return self.taken

    async def _converse(self, task_id: int, waits: ChannelWaits, *, may_be_here: bool = False) -> Frame:
        """Send what is unsent, and wait for the answer."""
        channel = self.process.channel
        try:
            while not self.send_rest():
                await waits.writable(channel)
            if not may_be_here:
                await waits.readable(channel)
            while (reply := self.receive()) is None:
                await waits.readable(channel)
        except (ConnectionError, ProtocolError) as error:
            raise WorkerGone from error
        if reply.task_id != task_id:
            raise WorkerGone
        self.in_call = False
        self.tasks_done += 1
        if reply.files:
            await self._receive_large(reply, reply.body, waits)
        return reply

    async def _receive_large(self, frame: Frame, parcel: memoryview, waits: ChannelWaits) -> None:
        """Receive what of an answer comes through a stream."""
        stream = find_stream(parcel, frame.files)
        if stream is None:
            return
        self._incoming = stream
        try:
            frame.received = await receive(parcel, stream, waits)  # type: ignore[misc]  # it is a LargeFrame
        except (EOFError, ConnectionError) as error:
            raise WorkerGone from error
        finally:
            self._incoming = None
            stream.end()  # a thread may still be reading

    async def exchange_batch(
        self,
        task_id: int,
        batch: bytes,
        size: int,
        waits: ChannelWaits,
        lane: Lane,
        shipment: Shipment | None = None,
    ) -> Frame:
        """Send a batch, a whole frame with what belongs to it, and wait for its answer.

        Args:
            task_id: as for `exchange`.
            batch: the frame.
            size: how many items it has.
            waits: as for `exchange`.
            lane: who has sent it.
            shipment: what belongs to the frame, if it is large.

        Raises:
            WorkerGone: the connection ended first.

        Cancellation: as for `exchange`.
        """
        channel = self.process.channel
        self.tasks_left -= size
        self.post(batch, shipment)
        try:
            while not self.send_rest():
                await waits.writable(channel)
            lane.on_sent()
            done, is_cut = 0, False
            patience = lane.first_look if size > 1 else None
            while True:
                await waits.readable(channel, patience)
                frame = self.next_frame()
                while frame is not None and frame.kind is Kind.PARTIAL:
                    if frame.files:
                        await self._receive_large(frame, find_record(frame.body), waits)
                    done = lane.take(frame.body, frame.received)
                    patience = lane.first_look
                    frame = self.next_frame()
                if frame is not None:
                    break
                if done >= size - 1:
                    patience = None  # the last one runs
                elif patience is not None and self._decoder.incoming_task_id is None:  # else one is arriving
                    if (held := self.process.read_journal(task_id)) is not None:
                        done = lane.take(held)
                    if lane.is_late() and not (is_cut and self.process.has_seen_cut()):
                        is_cut = True
                        self.process.cut(task_id)
                    patience = min(2 * patience, LONGEST_LOOK)
        except (ConnectionError, ProtocolError) as error:
            raise WorkerGone from error
        finally:
            if shipment is not None:
                _end_sendings(shipment)
        if frame.task_id != task_id:
            raise WorkerGone
        if frame.kind is Kind.RESULT:
            if shipment is not None:
                self.known_shares.update(shared.number for shared in shipment.shares)
            done = lane.take(frame.body)
        elif frame.kind is Kind.INTERRUPTED:
            done = min(done + 1, size)
        self.tasks_left += size - done
        self.tasks_done += done
        self.in_call = False
        return frame

    def next_frame(self) -> Frame | None:
        """Take the next of several frames; None if it is not complete.  Raises as `receive`."""
        return self._decoder.next_frame() or self.receive()

    def send_rest(self) -> bool:
        """Send what the socket takes of what is unsent; return True if that was all.

        Raises:
            ConnectionError: the connection has ended.
        """
        sent = self._sent
        while (unsent := self.unsent) is not None:
            if not sent:
                try:
                    if self._unsent_files:
                        ancillary = enclose(self._unsent_files)
                        sent.extend(map(self.process.channel.sendmsg, ((unsent,),), (ancillary,), (_NO_SIGNAL,)))
                    else:
                        sent.extend(map(self.process.channel.send, (unsent,), (_NO_SIGNAL,)))
                except BlockingIOError:
                    return False
            rest: memoryview | None = unsent[sent[0] :]
            if rest:
                self.unsent = rest
                self._unsent_files = ()
                del sent[0]
                return False
            if self._has_shipment:
                for stream in self._streams:
                    stream.close()  # or nobody would notice that the worker has closed it
                self._unsent_files = ()
                if self._tail:
                    self.unsent = self._tail[-1]
                    del self._tail[-1]
                    del sent[0]
                    continue
                self._has_shipment = False
            self.unsent = None
            del sent[0]
        return True

    def receive(self) -> Frame | None:
        """Take what has arrived; return the frame it completes, if it does.

        Raises:
            WorkerGone: the connection has ended.
            ConnectionError, ProtocolError: it ended badly.
        """
        if self.taken is not None:
            taken, self.taken = self.taken, None
            return taken
        decoder, received = self._decoder, self._received
        size = _RECEIVE_SIZE if decoder.missing <= _RECEIVE_SIZE else min(decoder.missing, _MAX_RECEIVE_SIZE)
        try:
            received.extend(map(self.process.channel.recvmsg, (size,), (ANSWER_ANCILLARY_SIZE,), (ANCILLARY_FLAGS,)))
        except BlockingIOError:
            pass  # there may be something that was received before
        while received:
            data, ancillary, _, _ = received[0]
            if not data:
                raise WorkerGone
            decoder.feed(data, disclose(ancillary) if ancillary else ())
            del received[0]
            self.heard = time.monotonic()
        return decoder.next_frame()

    def drop_unsent(self) -> None:
        """Send no more: it has ended.  Who sends large values to it, through the other end of a stream, is told so."""
        self.unsent = None
        self._tail = []
        self._unsent_files = ()
        for stream in self._streams:
            stream.close()

    def drop_answer(self) -> None:
        """Throw away what has arrived of an incomplete answer, which nobody wants."""
        self._decoder.drop_body()

    def forget_ended_shares(self) -> None:
        """Tell an idle worker which shares have ended."""
        while self.ended_shares:
            number = self.ended_shares[-1]
            if number in self.shares:
                try:
                    self.process.channel.send(encode_frame(Kind.FORGET, 0, number.to_bytes(8, "little")), _NO_SIGNAL)
                except BlockingIOError:
                    return  # later
                except OSError:
                    pass  # it has gone
                self.shares.discard(number)
                self.known_shares.discard(number)
            self.ended_shares.remove(number)

    def say_bye(self) -> None:
        """Ask an idle worker to exit."""
        try:
            self.process.channel.send(encode_frame(Kind.BYE), _NO_SIGNAL)
        except OSError:
            pass  # it has gone already

    def hang_up(self) -> None:
        """End the connection for a call that may be waiting on it, though something still holds the other end."""
        if (stream := self._incoming) is not None:
            stream.end()
        try:
            self.process.channel.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # ended already

    @property
    def was_killed_by_others(self) -> bool:
        """True if its process may have ended by a SIGKILL, and not the pool's."""
        return not self.was_killed and self.process.poll() in (-signal.SIGKILL, UNKNOWN_STATUS)

    def _was_oom_killed(self, *, is_known: bool) -> bool | None:
        if self.oom or self.excess is not None:
            return True
        return self.oom if is_known or self.was_killed else None

    def death(self) -> Death:
        """Describe how the ended process ended."""
        if self._death is None:
            self._death = self._describe_death()
        return self._death

    def _describe_death(self) -> Death:
        status = self.process.poll()
        if status == UNKNOWN_STATUS:
            status = None
        died_of_signal = status is not None and status < 0
        return Death(
            pid=self.process.pid,
            exitcode=None if died_of_signal else status,
            signal=-status if status is not None and died_of_signal else None,
            stack=self.process.take_stack(),
            last_words=self.process.last_words(),
            last_task_id=self.process.last_task_id(),
            by_pool=self.was_killed and self.excess is None,
            oom=self._was_oom_killed(is_known=status is not None),
            excess=self.excess,
            has_begun=self.process.items_done(self.process.last_task_id()) is not None,
            journal=self.process.read_journal(self.process.last_task_id()),
        )


def _end_sendings(shipment: Shipment) -> None:
    for sending in shipment.sendings:
        sending.end()  # the call is over: what its worker has not read, it does not want
