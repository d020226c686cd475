"""An ASGI application without a framework, with a pool around it.

    pip install cpupool uvicorn
    python examples/any_asgi.py         # or, in this folder: uvicorn any_asgi:app

    curl localhost:8000 -d 'see example.org, or www.python.org'

Which status suits which error of the pool, a framework's adapter knows; see docs/web.md.
"""

from __future__ import annotations

import json
import os
from collections.abc import MutableMapping
from typing import Any

from cpupool import CpuPool, CpuPoolError, PoolFull, TaskTimeout
from cpupool.asgi import PoolLifespan
from cpupool.domains import find_domains


async def application(scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
    if scope["type"] != "http":
        raise NotImplementedError(scope["type"])
    body = bytearray()
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    status, headers = 200, [(b"content-type", b"application/json")]
    answer: object
    try:
        answer = await scope["state"]["pool"].run(find_domains, body.decode(errors="replace"))
    except PoolFull as error:
        status, answer = 503, "busy"
        headers.append((b"retry-after", str(int(error.retry_after) + 1).encode()))
    except TaskTimeout:
        status, answer = 504, "this took too long"
    except CpuPoolError:
        status, answer = 503, "not available"
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(answer).encode()})


app = PoolLifespan(application, CpuPool(timeout=10, max_pending=100))


if __name__ == "__main__":
    import uvicorn

    uvicorn.run(app, port=int(os.environ.get("PORT", "8000")))
