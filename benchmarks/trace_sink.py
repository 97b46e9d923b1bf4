"""An OTLP receiver (gRPC) that accepts all traces and discards them."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc


class _AcceptAll(grpc.GenericRpcHandler):
    def service(self, _call: Any) -> Any:
        # Without (de)serializers, messages are bytes; an empty one is a full success.
        return grpc.unary_unary_rpc_method_handler(lambda _request, _context: b"")


@contextmanager
def trace_sink() -> Iterator[str]:
    """The endpoint of a receiver on a free port."""
    server = grpc.server(ThreadPoolExecutor(1), handlers=(_AcceptAll(),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.stop(grace=None).wait()
