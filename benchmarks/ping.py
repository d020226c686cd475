"""A client that asks a server for its pong, again and again; it prints the median and the 99th percentile in ms."""

from __future__ import annotations

import socket
import statistics
import sys
import time

PINGS = 150
PAUSE = 0.01  # seconds


def main() -> None:
    times = []
    with socket.create_connection(("127.0.0.1", int(sys.argv[1]))) as channel:
        channel.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(PINGS):
            began = time.perf_counter()
            channel.sendall(b"ping\n")
            channel.recv(100)
            times.append((time.perf_counter() - began) * 1e3)
            time.sleep(PAUSE)
    print(statistics.median(times), statistics.quantiles(times, n=100)[-1])


if __name__ == "__main__":
    main()
