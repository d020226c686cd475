"""What workers log, on its way to the program's own logging.

Theory of operation: in a worker, a handler of the root logger sends each record to the pool, as one message on a socket
that nothing else uses.  It never waits: what does not fit into the socket any more is counted, and lost.  So a flood is
bounded, nothing can slow a task down, and a worker that dies has sent all that it could.  In the program the record is
handled by the logger of the same name, as if it had been logged there.

Rules: levels are those of the program's loggers when the worker was started, so that what nobody wants is not sent.

It runs in the workers too: stdlib and layer 0 only.
"""

from __future__ import annotations

import logging
import pickle
import socket
import sys

from ._status import LOGS_LOST, STATUS_PAGE_SIZE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

MOST_BYTES = 64 * 1024  # of a message
_BUFFER_SIZE = 1024 * 1024  # bytes that wait; the system may allow less
_LEAST_TEXT = 256  # characters of a text that is cut because the whole is too much
_DEPTH = 5  # of dictionaries and lists in each other
_OWN = tuple(logging.makeLogRecord({}).__dict__)  # attributes that every record has
_ROOT = ""
_NEVER = 2**31  # a level that no record has

# Whole messages, and an end.  Elsewhere than on Linux there is no such kind for sockets of one machine.
_KIND = socket.SOCK_SEQPACKET if sys.platform == "linux" else socket.SOCK_DGRAM


def open_sockets() -> tuple[socket.socket, socket.socket]:
    """Return both ends of what records travel through: the pool's, non-blocking, and the worker's."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, _KIND)
    ours.setblocking(False)
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_SIZE)
    return ours, theirs


# --- the worker's side ---


class LogForwarder(logging.Handler):
    """Sends records to the pool."""

    def __init__(self, channel: socket.socket, page: memoryview) -> None:
        super().__init__()
        self._channel = channel
        self._page = page
        self.replaced: list[logging.Handler] = []  # kept, or their files would be closed by the garbage collector

    def emit(self, record: logging.LogRecord) -> None:
        """Send a record, or count it as lost."""
        try:
            packed = pack_record(record)
        except Exception:
            self.handleError(record)
            return
        try:
            self._channel.send(packed)
        except OSError:  # no room, or the pool has gone
            self._page[LOGS_LOST] += 1

    def count_no_more(self) -> None:
        """Leave the status page alone: this is a forked process."""
        self._page = memoryview(bytearray(STATUS_PAGE_SIZE)).cast("Q")


def forward_logs(channel: socket.socket, page: memoryview, levels: Mapping[str, int]) -> Callable[[], object]:
    """Send what is logged from now on to the pool, in the place of whatever the program's own handlers would do here.

    Args:
        channel: the worker's end of the socket.
        page: the status page.
        levels: those of loggers, by their names; of the root logger, by an empty one.

    Returns:
        What a forked process calls: what it logs still arrives, but it writes in the page no more.
    """
    forwarder = LogForwarder(channel, page)
    root = logging.getLogger()
    loggers = [each for each in root.manager.loggerDict.values() if isinstance(each, logging.Logger)]
    for logger in (root, *loggers):
        ends_here = logger is root or not logger.propagate
        for handler in list(logger.handlers):
            logger.removeHandler(handler)
            forwarder.replaced.append(handler)
        if ends_here:
            logger.addHandler(forwarder)
    for name, level in levels.items():
        logging.getLogger(name or None).setLevel(level)
    return forwarder.count_no_more


def pack_record(record: logging.LogRecord) -> bytes:
    """Pickle a record, with its message as text, or as the dictionary that structlog makes.

    Of its extra attributes plain values stay as they are, in dictionaries and lists too; others become their `repr`, so
    that nothing can be in it that cannot be rebuilt.  What is too long is cut.
    """
    fields: dict[str, Any] = dict(record.__dict__)
    if record.args or not isinstance(record.msg, dict):
        fields["msg"] = record.getMessage()
    fields["args"] = None
    if record.exc_info:
        fields["exc_text"] = record.exc_text or logging.Formatter().formatException(record.exc_info)
        fields["exc_info"] = None
    fields = _plain(fields, _DEPTH, sys.maxsize)
    packed = pickle.dumps(fields)
    most = MOST_BYTES // 4  # characters of each text; four bytes each at most
    while len(packed) > MOST_BYTES and most > _LEAST_TEXT:
        packed = pickle.dumps(_plain(fields, _DEPTH, most))
        most //= 2
    if len(packed) > MOST_BYTES:  # it has very many attributes
        packed = pickle.dumps(_plain({name: fields[name] for name in _OWN if name in fields}, 1, most))
    return packed


def _plain(value: Any, depth: int, most: int) -> Any:
    """Return a value made of plain types only, with texts of so many characters at most."""
    kind = type(value)
    if value is None or kind in (bool, float):
        return value
    if isinstance(value, int) and -(2**63) <= value < 2**64:
        return int.__index__(value)  # an enum's member becomes its number
    if isinstance(value, float):
        return float.__float__(value)
    if depth and kind in (list, tuple):
        return kind(_plain(each, depth - 1, most) for each in value)
    if depth and isinstance(value, dict):
        return {str(name): _plain(each, depth - 1, most) for name, each in value.items()}
    text = str.__str__(value) if isinstance(value, str) else _repr(value)
    return text if len(text) <= most else f"{text[:most]}... ({len(text):,} characters)"


def _repr(value: object) -> str:
    try:
        return repr(value)
    except Exception:
        return f"<{type(value).__name__}>"


# --- the pool's side ---


def collect_levels() -> dict[str, int]:
    """Return the levels that this program has set, for `forward_logs`."""
    root = logging.getLogger()
    levels = {_ROOT: max(root.level, root.manager.disable + 1)}
    for name, logger in list(root.manager.loggerDict.items()):
        if isinstance(logger, logging.Logger) and (logger.level != logging.NOTSET or logger.disabled):
            levels[name] = _NEVER if logger.disabled else max(logger.level, root.manager.disable + 1)
    return levels


def handle_record(packed: bytes) -> None:
    """Handle a record as if it had been logged here."""
    try:
        record = logging.getLogRecordFactory()("", logging.NOTSET, "", 0, "", (), None)  # with what a program adds
    except Exception:
        record = logging.LogRecord("", logging.NOTSET, "", 0, "", (), None)
    record.__dict__.update(pickle.loads(packed))
    logger = logging.getLogger(record.name)
    if logger.isEnabledFor(record.levelno):
        logger.handle(record)
