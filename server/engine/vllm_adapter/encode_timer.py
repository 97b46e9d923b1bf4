"""Times the vision encoder in vLLM's worker process, and tells the server (`encode_timing.py`).

It neither waits for the device nor lets a step fail: the first error ends the timing.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from typing import Any, Protocol

import msgspec
import torch
import zmq

from server.engine.vllm_adapter.encode_timing import EncoderRun

log = logging.getLogger("saccade.encode_times")

# Runs that the server has not taken, or that the device has not finished; more are dropped.
_MOST_WAITING = 1000

_encode = msgspec.msgpack.Encoder().encode

Report = Callable[[EncoderRun], None]


def watch(wrapper: Any, addresses: Sequence[str]) -> None:
    """Have the encoder of a worker (vLLM's `WorkerWrapperBase`) report its runs to `addresses`.

    Only the first rank of an engine does; the others run the encoder at the same time.
    """
    if wrapper.global_rank != 0:
        return
    runner = wrapper.worker.model_runner
    encoder = _encoder(runner)
    if encoder is not None:
        sockets = [connected(address) for address in addresses]
        timer = _timer(runner.device, partial(send_to_all, sockets))
        encoder.timed_encoder_operation = timed(encoder.timed_encoder_operation, timer)


def _encoder(runner: Any) -> Any:
    """What runs the encoder: vLLM's first model runner itself, a part of the second one."""
    if not hasattr(runner, "model_state"):
        return runner
    return getattr(runner.model_state, "encoder_runner", None)


def connected(address: str) -> zmq.Socket[bytes]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
    socket = context.socket(zmq.PUSH)
    socket.setsockopt(zmq.SNDHWM, _MOST_WAITING)
    socket.setsockopt(zmq.LINGER, 0)
    socket.connect(address)
    return socket


def send(socket: zmq.Socket[bytes], run: EncoderRun) -> None:
    """Never waits."""
    with suppress(zmq.Again):
        socket.send(_encode(run), zmq.NOBLOCK)


def send_to_all(sockets: Sequence[zmq.Socket[bytes]], run: EncoderRun) -> None:
    """Never waits. The front ends ignore runs for requests of others."""
    for socket in sockets:
        send(socket, run)


class Timer(Protocol):
    """Times runs, of which there is one at a time."""

    def start(self) -> None: ...

    def end(self, request_ids: list[str]) -> None: ...


def timed(
    operation: Callable[..., AbstractContextManager[None]], timer: Timer
) -> Callable[..., AbstractContextManager[None]]:
    """`operation`, a `timed_encoder_operation` of vLLM, with `timer` around what it surrounds."""
    failed = False

    def attempt(step: Callable[..., None], *args: Any) -> None:
        nonlocal failed
        try:
            if not failed:
                step(*args)
        except Exception as error:
            failed = True
            log.warning("no longer timing the encoder: %r", error)

    def end(args: tuple[Any, ...]) -> None:
        timer.end(_request_ids(*args))

    @contextmanager
    def surrounded(*args: Any) -> Iterator[None]:
        with operation(*args):
            attempt(timer.start)
            yield
            attempt(end, args)

    return surrounded


def _request_ids(*args: Any) -> list[str]:
    """The requests of a run, from the arguments of vLLM's `timed_encoder_operation`: the second
    model runner gives their ids; the first (whether vLLM times it, (request id, position) of all
    images, first image of the run, number of images)."""
    if len(args) == 1:
        ids: Collection[str] = args[0]
        return list(ids)
    _, images, first, count = args
    return list(dict.fromkeys(request_id for request_id, _ in images[first : first + count]))


def _timer(device: torch.device, report: Report) -> Timer:
    if device.type == "cpu":
        return WallTimer(report)
    if device.type == "cuda":
        return CudaTimer(device, report)
    raise NotImplementedError(f"no timer for {device.type}")


class WallTimer:
    """Where a call returns when the work is done."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._start_s = 0.0

    def start(self) -> None:
        self._start_s = time.monotonic()

    def end(self, request_ids: list[str]) -> None:
        self._report(EncoderRun(request_ids, self._start_s, time.monotonic()))


class CudaTimer:
    """Where a call only queues the work: events in the current stream before and after it, and a
    thread that waits for the latter."""

    def __init__(self, device: torch.device, report: Report) -> None:
        self._device = device
        self._report = report
        self._start: torch.cuda.Event | None = None
        self._runs: queue.Queue[tuple[list[str], torch.cuda.Event, torch.cuda.Event]]
        self._runs = queue.Queue(_MOST_WAITING)
        self._error: Exception | None = None
        threading.Thread(target=self._wait, name="encode-times", daemon=True).start()

    def start(self) -> None:
        self._start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self._start.record()

    def end(self, request_ids: list[str]) -> None:
        """Raises what ended the thread."""
        if self._error is not None:
            raise self._error
        assert self._start is not None
        # `blocking`: the thread that waits for it sleeps.
        end = torch.cuda.Event(enable_timing=True, blocking=True)  # type: ignore[no-untyped-call]
        end.record()
        with suppress(queue.Full):
            self._runs.put_nowait((request_ids, self._start, end))

    def _wait(self) -> None:
        try:
            torch.cuda.set_device(self._device)
            while True:
                request_ids, start, end = self._runs.get()
                end.synchronize()
                end_s = time.monotonic()
                start_s = end_s - start.elapsed_time(end) / 1000
                self._report(EncoderRun(request_ids, start_s, end_s))
        except Exception as error:
            self._error = error
