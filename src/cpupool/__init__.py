"""cpupool runs CPU-bound Python in worker processes, from asyncio, trio and plain threads.

Public names are loaded when they are first used, so that importing the package costs almost nothing.  The files, from
the bottom up; imports point only downward:

    0  _frames _payload _parcels _files _shared _errors _current _roles _waiting _apart _large _forking _checks
       _settings _environment _chunks _sizing _status _journal _reports _settling _pace _sources _statistics _usage
       _events _logs _last_words _context _vigil
                          the wire, pickling, large values, streams and files of memory, what is shared, exceptions, the
                          running task, roles of a process, waiting, work apart from the event loop, large values seen
                          from there, forks, checks of arguments, settings, those from the environment, cutting, limits,
                          the page that pool and worker share, results that are not sent yet, progress, how a process
                          becomes a worker, sizes of batches, where their items come from, what is counted, what
                          a process uses, what happens, what workers log, what they last wrote, what goes along with a
                          call, how a worker waits for one
    1  _interrupts _replies _batches _child _preload _asyncio_waits _trio_waits
                          how a task is interrupted; large values in a worker; what runs there, and in a fork server;
                          waiting in a task
    2  _process _fork_server _lease _gate _dispatch
                          one OS process; where it may come from; a call's claim on a worker; how many bytes may be on
                          their way; who gets which
    3  _worker _starting _outcomes
                          one worker seen from the pool; starting one as the settings say; what becomes of a task
    4  _crew _inspection   the workers of a pool, and sleeping until one needs attention; what one does
    5  _serving _births _stopping _memory _stacks _log_keeper
                          keeping the fork server; how workers become ready; how tasks are stopped; memory that they
                          must not hold; where they are; what they log
    6  _supervisor         the thread that does all that, and replaces and reaps
    7  _call _segments _map _stream _driver _executor
                          one call on its way; many items, and their results; calls through concurrent.futures, and
                          their thread
    8  _calls _share _door _pool _protocol _inline _default _offload
                          CpuPool and its views; what it shares with all workers; looking in from outside; one without
                          workers; what all pools can do; the process's default pool; functions that run in one
    9  __init__            this file
    10 executor domains progress asgi testing _job jobs _doctor prometheus opentelemetry
                          a drop-in for ProcessPoolExecutor; the reference workload; progress bars; ASGI applications;
                          tests of applications; one background job, and all of them; metrics; traces
    11 _answers _pytest_plugin __main__
                          what clients are told of errors; fixtures for pytest; the command line
    12 _job_routes _dashboard
                          background jobs over HTTP; a live page
    13 starlette           applications of Starlette
    14 fastapi             those of FastAPI
"""

from __future__ import annotations

from importlib import import_module

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ._calls import CpuPoolView as CpuPoolView
    from ._calls import PreparedCall as PreparedCall
    from ._chunks import chunked as chunked
    from ._chunks import split_evenly as split_evenly
    from ._chunks import split_text as split_text
    from ._current import Task as Task
    from ._current import current_task as current_task
    from ._current import report as report
    from ._default import configure_default as configure_default
    from ._default import default_pool as default_pool
    from ._default import run as run
    from ._default import run_sync as run_sync
    from ._door import allow_inspection as allow_inspection
    from ._errors import CpuPoolError as CpuPoolError
    from ._errors import InitializerFailed as InitializerFailed
    from ._errors import PoolBroken as PoolBroken
    from ._errors import PoolClosed as PoolClosed
    from ._errors import PoolFull as PoolFull
    from ._errors import PoolNotStarted as PoolNotStarted
    from ._errors import QueueTimeout as QueueTimeout
    from ._errors import RemoteError as RemoteError
    from ._errors import RemoteTraceback as RemoteTraceback
    from ._errors import ResultNotPicklable as ResultNotPicklable
    from ._errors import TaskInterrupted as TaskInterrupted
    from ._errors import TaskNotPicklable as TaskNotPicklable
    from ._errors import TaskStopped as TaskStopped
    from ._errors import TaskTimeout as TaskTimeout
    from ._errors import WorkerDied as WorkerDied
    from ._events import Event as Event
    from ._executor import PoolExecutorFace as PoolExecutorFace
    from ._offload import offload as offload
    from ._pool import CpuPool as CpuPool
    from ._protocol import Calls as Calls
    from ._protocol import Pool as Pool
    from ._roles import in_worker as in_worker
    from ._settings import Settings as Settings
    from ._share import Share as Share
    from ._shared import Shared as Shared
    from ._sizing import suggest_workers as suggest_workers
    from ._sizing import usable_cpus as usable_cpus
    from ._sizing import usable_memory as usable_memory
    from ._statistics import Histogram as Histogram
    from ._statistics import Statistics as Statistics
    from ._statistics import WorkerStatistics as WorkerStatistics
    from ._stream import Stream as Stream
    from .executor import PoolExecutor as PoolExecutor

__version__ = "0.1.0"

_HOMES = {
    "Calls": "_protocol",
    "CpuPool": "_pool",
    "CpuPoolError": "_errors",
    "CpuPoolView": "_calls",
    "Event": "_events",
    "Histogram": "_statistics",
    "InitializerFailed": "_errors",
    "Pool": "_protocol",
    "PoolBroken": "_errors",
    "PoolClosed": "_errors",
    "PoolExecutor": "executor",
    "PoolExecutorFace": "_executor",
    "PoolFull": "_errors",
    "PoolNotStarted": "_errors",
    "PreparedCall": "_calls",
    "QueueTimeout": "_errors",
    "RemoteError": "_errors",
    "RemoteTraceback": "_errors",
    "ResultNotPicklable": "_errors",
    "Settings": "_settings",
    "Share": "_share",
    "Shared": "_shared",
    "Statistics": "_statistics",
    "Stream": "_stream",
    "Task": "_current",
    "TaskInterrupted": "_errors",
    "TaskNotPicklable": "_errors",
    "TaskStopped": "_errors",
    "TaskTimeout": "_errors",
    "WorkerDied": "_errors",
    "WorkerStatistics": "_statistics",
    "allow_inspection": "_door",
    "chunked": "_chunks",
    "configure_default": "_default",
    "current_task": "_current",
    "default_pool": "_default",
    "in_worker": "_roles",
    "offload": "_offload",
    "report": "_current",
    "run": "_default",
    "run_sync": "_default",
    "split_evenly": "_chunks",
    "split_text": "_chunks",
    "suggest_workers": "_sizing",
    "usable_cpus": "_sizing",
    "usable_memory": "_sizing",
}

__all__ = sorted(_HOMES)  # noqa: PLE0605  # a list of str


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(f".{home}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
