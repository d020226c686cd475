"""OpenTelemetry for a pool: the caller's trace goes on in the worker.

`CpuPool(context=(cpupool.opentelemetry.trace_context,))` makes two spans for each call, children of the caller's: one
for the time it waited for a worker, one for its run.  What the task itself records in the worker, with an SDK that is
set up there (in the pool's `initializer`), continues below the latter.  Without an SDK it costs next to nothing.

Needs opentelemetry-api.  A `map` or `stream` has one such pair for each batch of items.
"""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

from opentelemetry import context, propagate, trace

from . import __version__

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["TraceContext", "trace_context"]


class TraceContext:
    """Carries the current trace context to workers; `trace_context` is the one there is.

    The spans are named "wait for a worker" and after the task (its label, or its function).  Both have the attribute
    `cpupool.task`.  They come from the tracer "cpupool" of the program's own tracer provider.
    """

    def __reduce__(self) -> str:
        return "trace_context"

    def __repr__(self) -> str:
        return "cpupool.opentelemetry.trace_context"

    @contextlib.contextmanager
    def carry(self, task: str, waited: float) -> Iterator[dict[str, str]]:
        """Make the spans of a call that is being sent, and give what its worker is to know of them."""
        tracer = trace.get_tracer("cpupool", __version__)
        attributes = {"cpupool.task": task}
        now = time.time_ns()
        waiting = tracer.start_span("wait for a worker", attributes=attributes, start_time=now - int(waited * 1e9))
        waiting.end(now)
        carrier: dict[str, str] = {}
        # Not the current span here: when a call is given up, that would be undone in another context.
        run = tracer.start_span(task, attributes=attributes)
        propagate.inject(carrier, trace.set_span_in_context(run))
        try:
            yield carrier
        except Exception:
            run.set_status(trace.StatusCode.ERROR)
            raise
        finally:
            run.end()

    @contextlib.contextmanager
    def restore(self, value: dict[str, str]) -> Iterator[None]:
        """Let the task continue the trace, in the worker."""
        token = context.attach(propagate.extract(value))
        try:
            yield
        finally:
            context.detach(token)


trace_context: TraceContext = TraceContext()
