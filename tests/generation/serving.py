"""A local server in a thread of its own."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import HTTPServer
from typing import TypeVar

Served = TypeVar("Served", bound=HTTPServer)


@contextmanager
def serving(served: Served) -> Iterator[Served]:
    """Serve until the end of the block."""
    thread = threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield served
    served.shutdown()
    thread.join()
    served.server_close()
