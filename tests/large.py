"""What tests of large values run in workers.  It loads NumPy where it is needed only."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import resource
import signal
import time
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

import cpupool

KEPT: list[Any] = []


def describe(*values: Any) -> list[tuple[str, int, bool]]:
    """Return type, bytes and whether it can be written, of each."""
    return [(type(each).__name__, size(each), is_writable(each)) for each in values]


def size(value: Any) -> int:
    return len(value.encode()) if isinstance(value, str) else memoryview(value).nbytes


def is_writable(value: Any) -> bool:
    return not isinstance(value, str) and not memoryview(value).readonly


def overwrite(array: Any) -> Any:
    """Change an array in place, and return it."""
    array[...] = 7
    return array


def total(array: Any) -> float:
    return float(array.sum())


def length(value: Any) -> int:
    return len(value)


def echo(*values: Any) -> Any:
    return values[0] if len(values) == 1 else values


def make_array(length: int, fill: float = 1.0) -> Any:
    import numpy as np

    return np.full(length, fill)


def make_dicts(count: int) -> list[dict[str, Any]]:
    return [{"id": number, "tags": [number]} for number in range(count)]


def keep(value: Any) -> int:
    """Hold on to an argument after the task."""
    KEPT.append(value)
    return len(KEPT)


def kept_totals() -> list[float]:
    return [float(each.sum()) for each in KEPT]


def count_memory_files() -> int:
    """Return how many files of memory this process has open or mapped: shares, and large initargs."""
    with open("/proc/self/maps") as maps:
        numbers = {int(line.split()[4]) for line in maps if "/memfd:cpupool (" in line}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{name}").startswith("/memfd:cpupool ("):
                numbers.add(os.stat(int(name)).st_ino)
    return len(numbers)


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * mmap.PAGESIZE


def refuse_stream() -> NoReturn:
    raise OSError(errno.EMFILE, "no more descriptors")


def use_no_streams() -> None:
    """Be a worker that has no descriptors left."""
    from cpupool import _replies

    setattr(_replies, "open_stream", refuse_stream)  # noqa: B010  # it is no name that others may set


def count_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def die_with(_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def raise_with(_: Any) -> None:
    raise ValueError("no")


def get_total(shared: cpupool.Shared[Any]) -> float:
    return float(shared.get().sum())


def get_and_describe(shared: cpupool.Shared[Any]) -> tuple[str, int, bool]:
    return describe(shared.get())[0]


def get_total_and_add(shared: cpupool.Shared[Any], number: int) -> float:
    return float(shared.get().sum()) + number


def count_files_with(_: Any) -> int:
    return count_memory_files()


def overwrite_shared(shared: cpupool.Shared[Any]) -> None:
    shared.get()[0] = 1


def hold_shared(fifo_in: str, fifo_out: str, shared: cpupool.Shared[Any]) -> float:
    """Say that it has begun, wait, and only then look at what is shared."""
    with open(fifo_in, "w") as file:
        file.write(f"{os.getpid()}\n")
    with open(fifo_out) as file:
        file.read()
    return float(shared.get().sum())


def keep_all(*values: Any) -> None:
    """Be an initializer."""
    KEPT.extend(values)


def add_to_first_kept() -> float:
    KEPT[0][0] += 1
    return float(KEPT[0][0])


class NeedsPieces:
    """An object whose pickle is large, and made of many small things."""

    def __init__(self, count: int) -> None:
        self.items = [str(number) for number in range(count)]


def count_items(value: NeedsPieces) -> int:
    return len(value.items)


class RefusesAtTheEnd:
    """Something with a lot to pickle, and then something that does not pickle."""

    def __init__(self) -> None:
        self.items = make_dicts(50_000)
        self.last = lambda: None


def echo_after_a_death(path: str, value: Any) -> Any:
    """Die the first time."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return value
    os.kill(os.getpid(), signal.SIGKILL)
    return None


def spin_with(_: Any) -> None:
    while True:
        pass


def echo_with_lambda(value: Any) -> Any:
    return value, lambda: None


class DoesNotComeBack:
    """Pickles, and raises when it is rebuilt."""

    def __init__(self, size: int) -> None:
        self.data = bytearray(size)

    def __setstate__(self, state: object) -> None:
        raise ValueError("not here")


def return_what_does_not_come_back(size: int) -> DoesNotComeBack:
    return DoesNotComeBack(size)


def get_shape(shared: cpupool.Shared[Any]) -> tuple[int, ...]:
    shape: tuple[int, ...] = shared.get().shape
    return shape


def get_length(shared: cpupool.Shared[Any]) -> int:
    return len(shared.get())


def get_totals(shared: Sequence[cpupool.Shared[Any]]) -> list[float]:
    return [float(each.get().sum()) for each in shared]


def first_kept_total() -> float:
    return float(KEPT[0].get().sum())


def hold_with(fifo_in: str, fifo_out: str, _: Any) -> None:
    with open(fifo_in, "w") as file:
        file.write(f"{os.getpid()}\n")
    with open(fifo_out) as file:
        file.read()


def append_line_with(path: str, _: Any) -> None:
    with open(path, "a") as file:
        file.write("\n")


def get(shared: cpupool.Shared[Any]) -> Any:
    return shared.get()


def use_up_descriptors() -> None:
    try:
        raise ValueError
    except ValueError:
        traceback.format_exc()  # so that what describes an error is loaded
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    with contextlib.suppress(OSError):
        while True:
            KEPT.append(os.open("/dev/null", os.O_RDONLY))


def give_back_descriptors() -> None:
    while KEPT:
        os.close(KEPT.pop())


def get_total_and_leak(shared: cpupool.Shared[Any], size: int) -> float:
    KEPT.append(bytearray(b"x") * size)
    return float(shared.get().sum())


class MayNotPickle:
    """Holds a large array, and may exit while it is pickled."""

    def __init__(self, fails: bool) -> None:
        import numpy as np

        self.data = np.full(100_000, float(fails))
        self.last = ExitsWhenPickled() if fails else None


class ExitsWhenPickled:
    def __reduce__(self) -> NoReturn:
        raise SystemExit


def make_array_that_may_not_pickle(fails: bool) -> MayNotPickle:
    return MayNotPickle(fails)


class SleepsFirst:
    """Takes a while to be rebuilt."""

    def __reduce__(self) -> tuple[Any, ...]:
        return sleep_and_make, ()


def sleep_and_make() -> SleepsFirst:
    time.sleep(0.5)
    return SleepsFirst()


def sleep_when_unpickled(_: SleepsFirst, array: Any) -> float:
    return float(array.sum())
