"""What goes along with calls: context variables (D4), and OpenTelemetry's traces."""

from __future__ import annotations

import contextvars
import threading
import traceback

import anyio
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

import cpupool.testing
import items
import tasks
from conftest import RunScript
from cpupool import CpuPool
from cpupool.opentelemetry import trace_context

pytestmark = pytest.mark.anyio

BOTH = (tasks.request_id, tasks.tenant)


# --- context variables ---


async def test_d4_context_variables_are_visible_and_do_not_leak(start_method: str) -> None:
    async with CpuPool(1, context=BOTH, mp_context=start_method) as pool:
        assert await pool.run(tasks.read_context, "left behind") == (None, "nobody")
        assert await pool.run(tasks.read_context) == (None, "nobody"), "what a task sets is its own"
        tasks.request_id.set("r1")
        tasks.tenant.set({"id": 7})
        assert await pool.run(tasks.read_context, "left behind") == ("r1", {"id": 7})
        assert await pool.map(tasks.read_context, ["left behind"] * 3) == [("r1", {"id": 7})] * 3
        assert contextvars.Context().run(pool_run_sync_in_thread, pool) == (None, "nobody")


def pool_run_sync_in_thread(pool: CpuPool) -> object:
    found: list[object] = []
    thread = threading.Thread(target=lambda: found.append(pool.run_sync(tasks.read_context)))
    thread.start()
    thread.join()
    return found[0]


async def test_d4_each_caller_has_its_own() -> None:
    async with CpuPool(2, context=BOTH) as pool:
        found: dict[str, object] = {}

        async def call(name: str) -> None:
            tasks.request_id.set(name)
            found[name] = await pool.run(tasks.read_context)

        async with anyio.create_task_group() as group:
            for number in range(20):
                group.start_soon(call, str(number))
    assert found == {str(number): (str(number), "nobody") for number in range(20)}


async def test_d4_without_context_nothing_travels() -> None:
    tasks.request_id.set("r1")
    async with CpuPool(1) as pool:
        assert await pool.run(tasks.read_context) == (None, "nobody")


async def test_d4_with_everything_else() -> None:
    tasks.request_id.set("r1")
    async with CpuPool(1, context=BOTH, serializer="cloudpickle") as pool:
        assert await pool.run(lambda: (*tasks.read_context(),)) == ("r1", "nobody")
        assert await pool.options(on_report=print, timeout=5).run(tasks.read_context) == ("r1", "nobody")
        prepared = pool.prepare(tasks.read_context)
        assert await prepared.run() == ("r1", "nobody")
        assert await pool.run(tasks.return_it, b"x" * 1_000_000) == b"x" * 1_000_000
        async with pool.stream(tasks.read_context, [None] * 3) as results:
            assert [result async for result in results] == [("r1", "nobody")] * 3


async def test_d4_tracebacks_begin_at_the_task() -> None:
    async with CpuPool(1, context=BOTH) as pool:
        with pytest.raises(LookupError) as caught:
            await pool.run(tasks.read_context_and_fail)
        remote = "".join(traceback.format_exception(caught.value))
        assert "read_context_and_fail" in remote
        assert "cpupool/_context.py" not in remote


async def test_d4_what_cannot_be_carried_is_an_error_that_says_so() -> None:
    async with CpuPool(1, context=BOTH) as pool:
        tasks.tenant.set(threading.Lock())
        with pytest.raises(TypeError, match="the value of tasks:tenant in the pool's context cannot be sent"):
            await pool.run(tasks.read_context)
        with pytest.raises(TypeError, match="tasks:tenant"):
            await pool.map(tasks.read_context, [None])
        tasks.tenant.set("somebody")
        pid = await pool.run(tasks.get_pid)
        assert await pool.run(tasks.read_context) == (None, "somebody")
        assert await pool.run(tasks.get_pid) == pid, "the worker has noticed nothing"
    with pytest.raises(ValueError, match="'local' at its top level"):
        CpuPool(1, context=(contextvars.ContextVar("local"),))
    with pytest.raises(TypeError, match="context must hold context variables, not 'request_id'"):
        CpuPool(1, context=("request_id",))


async def test_d4_inline_as_well() -> None:
    tasks.request_id.set("r1")
    async with cpupool.testing.InlinePool(context=BOTH) as pool:
        assert await pool.run(tasks.read_context, "left behind") == ("r1", "nobody")
        assert await pool.run(tasks.read_context) == ("r1", "nobody")


def test_d4_executors_take_the_submitter_s_context() -> None:
    with CpuPool(1, context=BOTH) as pool, pool.as_executor() as executor:
        submitted = []
        for name in ("alice", "bob", "carol"):
            context = contextvars.copy_context()
            context.run(tasks.request_id.set, name)
            submitted.append(context.run(executor.submit, tasks.read_context))
        assert [future.result() for future in submitted] == [(name, "nobody") for name in ("alice", "bob", "carol")]


async def test_d4_values_are_pickled_as_the_pool_s_serializer_does() -> None:
    tasks.tenant.set(lambda: "made by a lambda")
    async with CpuPool(1, context=BOTH, serializer="cloudpickle") as pool:
        assert await pool.run(lambda: str(tasks.tenant.get()())) == "made by a lambda"  # type: ignore[operator]


async def test_d4_a_value_that_cannot_be_rebuilt() -> None:
    tasks.tenant.set(tasks.RefusesToUnpickle())
    async with CpuPool(1, context=BOTH) as pool:
        with pytest.raises(cpupool.TaskNotPicklable, match="the pool's context cannot be rebuilt in the worker"):
            await pool.run(tasks.read_context)


def test_d4_a_variable_that_the_main_module_has_imported(run_script: RunScript) -> None:
    done = run_script("""
import multiprocessing  # which gives the main module another name
import asyncio, cpupool, tasks
from tasks import tenant

async def main():
    async with cpupool.CpuPool(1, context=(tenant,)) as pool:
        tenant.set("somebody")
        print(pool._options.carriers, await pool.run(tasks.read_context))

if __name__ == "__main__":
    asyncio.run(main())
""")
    assert (done.stdout, done.stderr) == ("(tasks:tenant,) (None, 'somebody')\n", "")


# --- OpenTelemetry ---


@pytest.fixture(scope="module")
def exporter() -> InMemorySpanExporter:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    return exporter


@pytest.fixture
def spans(exporter: InMemorySpanExporter) -> InMemorySpanExporter:
    exporter.clear()
    return exporter


def by_name(exporter: InMemorySpanExporter) -> dict[str, ReadableSpan]:
    return {span.name: span for span in exporter.get_finished_spans()}


async def test_a_trace_goes_on_in_the_worker(spans: InMemorySpanExporter) -> None:
    async with CpuPool(1, context=(trace_context,)) as pool:
        with trace.get_tracer("app").start_as_current_span("request") as request:
            seen = await pool.options(label="thumbnail").run(tasks.start_span, "inner")
    found = by_name(spans)
    assert set(found) == {"request", "wait for a worker", "thumbnail"}
    own = request.get_span_context()
    for name in ("wait for a worker", "thumbnail"):
        span = found[name]
        assert span.parent is not None
        assert (span.context.trace_id, span.parent.span_id) == (own.trace_id, own.span_id)
        assert dict(span.attributes or {}) == {"cpupool.task": "thumbnail"}
    run = found["thumbnail"].context
    assert seen == (format(run.trace_id, "032x"), format(run.span_id, "016x")), "the task is below its run"


async def test_spans_have_the_times_of_the_call(spans: InMemorySpanExporter) -> None:
    async with CpuPool(1, context=(trace_context,)) as pool, anyio.create_task_group() as group:
        for _ in range(2):
            group.start_soon(pool.run, tasks.busy, 0.2)
    waits = sorted(duration(span) for span in spans.get_finished_spans() if span.name == "wait for a worker")
    runs = [duration(span) for span in spans.get_finished_spans() if span.name == "tasks.busy"]
    assert waits[0] < waits[1]
    assert waits[1] >= 0.19
    assert min(runs) >= 0.2


def duration(span: ReadableSpan) -> float:
    assert span.start_time is not None
    assert span.end_time is not None
    return (span.end_time - span.start_time) / 1e9


async def test_spans_of_calls_that_fail_or_are_given_up(spans: InMemorySpanExporter) -> None:
    async with CpuPool(1, context=(trace_context,)) as pool:
        with pytest.raises(ZeroDivisionError):
            await pool.options(label="fails").run(tasks.raise_exception, ZeroDivisionError)
        with pytest.raises(cpupool.TaskTimeout):
            await pool.options(label="late", timeout=0.05).run(tasks.sleep_long)
        with pytest.raises(cpupool.WorkerDied):
            await pool.options(label="dies").run(tasks.exit_at_once, 1)
        with anyio.move_on_after(0.05):
            await pool.options(label="given up").run(tasks.sleep_long)
        await pool.map(tasks.start_span, ["inner"] * 3, chunksize=3)
    found = by_name(spans)
    for name in ("fails", "late", "dies"):
        assert found[name].status.status_code is trace.StatusCode.ERROR
    assert found["given up"].end_time is not None
    assert found["tasks.start_span"].status.status_code is trace.StatusCode.UNSET


async def test_the_span_of_a_batch_with_a_failure(spans: InMemorySpanExporter) -> None:
    async with CpuPool(1, context=(trace_context,)) as pool:
        await pool.map(items.return_or_raise, [1, KeyError(), 2], return_exceptions=True, chunksize=3)
    assert by_name(spans)["items.return_or_raise"].status.status_code is trace.StatusCode.ERROR


async def test_without_a_provider_nothing_happens() -> None:
    async with CpuPool(1, context=(trace_context, tasks.request_id)) as pool:
        assert await pool.run(tasks.add, 1, 2) == 3
