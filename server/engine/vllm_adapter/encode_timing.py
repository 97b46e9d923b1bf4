"""When the vision encoder ran, and for which requests: what vLLM's metrics do not tell.

The encoder runs inside a step of vLLM's worker process. The server binds a socket in a directory of
its own and gives its address to the plugin. The worker of the first rank reports each run of its
encoder.
"""

import asyncio
import contextlib
import logging
import multiprocessing
import shutil
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import zmq

from server.concurrency import cancel
from server.engine.vllm_adapter import plugin
from server.engine.vllm_adapter.core_sockets import has_message

log = logging.getLogger("saccade.encode_times")

_MAX_MESSAGE_BYTES = 1 << 20
# Reports are also read this often, for requests of which no output comes for long.
_INTERVAL_S = 0.25

OnEncode = Callable[[Sequence[str], float, float], None]


class EncoderRun(msgspec.Struct, array_like=True, frozen=True):
    """One run of the encoder: the engine's ids of the requests that it ran for, and when, on the
    clock of `time.monotonic()`, which all processes of a machine share."""

    request_ids: list[str]
    start_s: float
    end_s: float


class EncodeTimes:
    """The server's end: to be entered before the engine starts.

    `on_encode(request_ids, start_s, end_s)` is called on the event loop for each run of the
    encoder (the fields of `EncoderRun`), by `read` or soon. A step has one run, or one for each
    group of images that the model cannot take in one batch. No run is reported for images that a
    cache had.
    """

    def __init__(self, on_encode: OnEncode, address: str | None = None) -> None:
        """`address`: that at which the workers have been told to report, if it is known before;
        else they are told to report to a new one."""
        self._on_encode = on_encode
        self._address = address
        self._decoder = msgspec.msgpack.Decoder(EncoderRun)
        self._socket: Any = None
        self._stack = contextlib.AsyncExitStack()

    async def __aenter__(self) -> "EncodeTimes":
        async with contextlib.AsyncExitStack() as stack:
            address = self._address
            if address is None:
                directory = tempfile.mkdtemp(prefix="saccade-")
                stack.callback(shutil.rmtree, directory, ignore_errors=True)
                address = f"ipc://{directory}/encoder"
            context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
            stack.callback(context.destroy, linger=0)
            self._socket = socket = context.socket(zmq.PULL)
            stack.callback(self._close)
            socket.setsockopt(zmq.MAXMSGSIZE, _MAX_MESSAGE_BYTES)
            socket.bind(address)
            if self._address is None:
                plugin.ask(encoder_runs=(address,))
                stack.callback(plugin.ask, encoder_runs=())
            stack.push_async_callback(cancel, asyncio.create_task(self._read_regularly()))
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    def read(self) -> None:
        """Read the reports that have arrived. Waking the event loop for each would take longer."""
        while self._socket is not None and has_message(self._socket):
            try:
                run = self._decoder.decode(self._socket.recv(zmq.NOBLOCK))
            except msgspec.MsgspecError as error:
                log.warning("ignoring malformed encoder report: %s", error)
                continue
            try:
                self._on_encode(run.request_ids, run.start_s, run.end_s)
            except Exception:
                log.exception("failed to record an encoder run")

    async def _read_regularly(self) -> None:
        while True:
            await asyncio.sleep(_INTERVAL_S)
            self.read()

    def _close(self) -> None:
        socket, self._socket = self._socket, None
        if socket is not None:
            socket.close()


def register(addresses: Sequence[str]) -> None:
    """Let the worker of this process, if it gets one, report the runs of its encoder."""
    if multiprocessing.parent_process() is None:
        return
    # Every engine process has imported this module by now. The model runner is heavy, and only
    # there in a worker: look for it when there is a step to do.
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    base: Any = WorkerWrapperBase
    execute_model = base.execute_model

    def first_step(worker: WorkerWrapperBase, scheduler_output: Any) -> Any:
        base.execute_model = execute_model
        try:
            from server.engine.vllm_adapter.encode_timer import watch

            watch(worker, addresses)
        except Exception as error:
            log.warning("failed to time the encoder: %r", error)
        return execute_model(worker, scheduler_output)

    base.execute_model = first_step
