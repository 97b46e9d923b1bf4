"""The event loop's end of one worker: its process, its socket, its shared memory."""

import array
import asyncio
import contextlib
import ctypes
import os
import socket
import threading
import weakref
from collections import deque
from collections.abc import Callable
from multiprocessing.process import BaseProcess

import msgspec

from server.workers import protocol
from server.workers.features import Features
from server.workers.memory import Segment

_JOIN_TIMEOUT_S = 5.0


class WorkerLink:
    """Sends jobs to one worker and hears its answers. `options` is a map in msgpack.

    Callbacks run on the event loop. `on_death` is called once, when the worker has gone without
    having been closed.
    """

    def __init__(
        self,
        process: BaseProcess,
        connection: socket.socket,
        *,
        on_reply: Callable[[protocol.FromWorker, Features | None], None],
        on_death: Callable[[], None],
    ) -> None:
        self.ready = False
        self._process = process
        self._connection = connection
        self._on_reply = on_reply
        self._on_death = on_death
        self._input: Segment | None = None
        self._results: dict[int, Segment] = {}
        # Filled by finalizers in any thread.
        self._released: deque[int] = deque()
        self._sending = threading.Lock()
        self._closed = False
        connection.setblocking(False)
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(connection.fileno(), self._readable)

    @property
    def pid(self) -> int:
        return self._process.pid or -1

    def send_inline(self, number: int, data: bytes, job: bytes) -> None:
        """Send a small picture inside the message; does not block."""
        self._send_job(number, job, inline=data, length=len(data), fd=None)

    def send(self, number: int, data: bytes, job: bytes) -> None:
        """Copy a large picture into shared memory and tell the worker; call it in a thread."""
        with self._sending:
            if self._closed:
                return
            fd = None
            if self._input is None or self._input.capacity < len(data):
                if self._input is not None:
                    self._input.close()
                self._input = Segment.create(len(data))
                fd = self._input.fd
            os.pwrite(self._input.fd, data, 0)  # releases the GIL, unlike a slice assignment
            self._send_job(number, job, inline=None, length=len(data), fd=fd)

    def _send_job(
        self,
        number: int,
        job: bytes,
        *,
        inline: bytes | None,
        length: int,
        fd: int | None,
    ) -> None:
        released = [self._released.popleft() for _ in range(len(self._released))]
        request = protocol.WorkRequest(
            number, msgspec.Raw(job), inline, length, fd is not None, released
        )
        ancillary = []
        if fd is not None:
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
        # A worker has one job at a time, so its socket has room; a dead one is found by the reader.
        with contextlib.suppress(ConnectionError):
            self._connection.sendmsg([protocol.encoder.encode(request)], ancillary)

    def _readable(self) -> None:
        try:
            data, fds, _, _ = socket.recv_fds(self._connection, protocol.MAX_MESSAGE_BYTES, 1)
        except BlockingIOError:
            return
        except ConnectionError:
            data, fds = b"", []
        if not data:
            self._lost()
            return
        reply = protocol.reply_decoder.decode(data)
        features = None
        if isinstance(reply, protocol.Ready):
            self.ready = True
        elif isinstance(reply, protocol.Done):
            features = self._features(reply, fds)
        self._on_reply(reply, features)

    def _features(self, reply: protocol.Done, fds: list[int]) -> Features:
        if reply.is_new:
            segment = Segment(fds[0], reply.capacity)
            os.close(fds[0])  # the mapping is enough on this side
            segment.fd = -1
            self._results[reply.segment] = segment
        for number in reply.dropped:
            self._results.pop(number).close()
        segment = self._results[reply.segment]
        buffer = (ctypes.c_char * reply.capacity).from_buffer(segment.map)
        weakref.finalize(buffer, self._released.append, reply.segment)
        return Features.of(reply, buffer)

    def _lost(self) -> None:
        if self._closed:
            return
        self.close()
        self._on_death()

    def kill(self) -> None:
        """End the worker at once, whatever it does; its death is reported as any other."""
        with contextlib.suppress(ProcessLookupError, AttributeError):
            self._process.kill()

    def kill_unless_ready(self) -> None:
        """End a worker that has not come up."""
        if not self.ready:
            self.kill()

    def close(self) -> None:
        """Stop listening; the worker ends itself when it notices, at the latest in `join`."""
        if self._closed:
            return
        self._closed = True
        self.ready = False
        self._loop.remove_reader(self._connection.fileno())
        self._connection.close()
        for segment in self._results.values():
            segment.close()
        self._results.clear()

    def join(self) -> None:
        """Wait for the process to end, by force if need be. Blocks: call it in a thread."""
        with self._sending:
            if self._input is not None:
                self._input.close()
                self._input = None
        self._process.join(0.2)
        if self._process.is_alive():
            self._process.kill()
            self._process.join(_JOIN_TIMEOUT_S)
