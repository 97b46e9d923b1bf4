"""The server's connection to one worker: its socket and its shared memory."""

import array
import asyncio
import ctypes
import errno
import fcntl
import logging
import os
import socket
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence

import msgspec

from server.errors import busy_for_files
from server.workers import protocol
from server.workers.forkserver import WorkerProcess
from server.workers.process import KILLED
from server.workers.protocol import Features
from server.workers.shared_memory import Segment

log = logging.getLogger("saccade.images")

_CTRUNC = int(socket.MSG_CTRUNC)  # operations on the flag itself make enums


class ProtocolError(Exception):
    """A worker sent a message that violates the protocol."""


class WorkerChannel:
    """Sends jobs to one worker and receives its replies.

    Callbacks run on the event loop. `on_end` is called once if the connection ends before `close`
    is called. A worker that violates the protocol is killed.
    """

    def __init__(
        self,
        worker: WorkerProcess,
        *,
        on_reply: Callable[[protocol.FromWorker, Features | None], None],
        on_end: Callable[[], None],
    ) -> None:
        self.pid = worker.pid
        self.ready = False
        self.violated = False
        self._worker = worker
        self._connection = worker.connection
        self._on_reply = on_reply
        self._on_end = on_end
        # The ids of the jobs that the worker has not answered yet, in their order.
        self._job_ids: deque[int] = deque()
        self._decoded_id: int | None = None
        self._input: Segment | None = None
        self._results: dict[int, Segment] = {}
        # Finalizers append to it from any thread.
        self._released: deque[int] = deque()
        # Held while a thread sends, so that no descriptor in use is closed.
        self._sending = threading.Lock()
        self._killed = False
        self._closed = False
        self._connection.setblocking(False)
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._connection.fileno(), self._readable)

    def send_inline(self, first_id: int, data: bytes, jobs: Sequence[bytes]) -> None:
        """Send a small picture and its encoded jobs in one message; does not block."""
        try:
            self._send(first_id, jobs, inline=data, length=len(data), fd=None)
        except OSError as error:
            self._fail_to_send(error)

    def send(self, first_id: int, data: bytes, jobs: Sequence[bytes]) -> None:
        """Copy a large picture into shared memory and send its encoded jobs; call it in a
        thread."""
        with self._sending:
            if self._closed:
                return
            try:
                grown = self._copy_to_input(data)
                self._send(first_id, jobs, inline=None, length=len(data), fd=grown)
            except Exception as error:  # the future of this call is not read
                self._fail_to_send(error)

    def _copy_to_input(self, data: bytes) -> int | None:
        """Copy `data`; returns the input segment's descriptor if the worker does not have it
        yet."""
        grown = None
        if self._input is None or self._input.capacity < len(data):
            if self._input is not None:
                self._input.close()
                self._input = None
            self._input = Segment.create(len(data))
            grown = self._input.fd
        os.pwrite(self._input.fd, data, 0)  # releases the GIL, unlike a slice assignment
        return grown

    def _send(
        self,
        first_id: int,
        jobs: Sequence[bytes],
        *,
        inline: bytes | None,
        length: int,
        fd: int | None,
    ) -> None:
        self._job_ids = deque(range(first_id, first_id + len(jobs)))
        released = [self._released.popleft() for _ in range(len(self._released))]
        request = protocol.WorkRequest(
            first_id, list(map(msgspec.Raw, jobs)), inline, length, fd is not None, released
        )
        ancillary = []
        if fd is not None:
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
        # A worker has one request at a time, so its socket buffer has room.
        self._connection.sendmsg([protocol.encoder.encode(request)], ancillary)

    def _fail_to_send(self, error: Exception) -> None:
        """Kill a worker that did not get its picture; `on_end` then puts the picture back."""
        if not isinstance(error, ConnectionError):  # a dead worker is noticed by `_readable`
            log.warning("failed to send an image to worker %d: %s", self.pid, error)
        self.kill()

    # ------------------------------------------------------------------ replies

    def _readable(self) -> None:
        fds: list[int] = []
        try:
            data, fds, flags, _ = socket.recv_fds(
                self._connection, protocol.MAX_MESSAGE_BYTES, 1, socket.MSG_CMSG_CLOEXEC
            )
            if not data:
                self._lose()
                return
            if flags & _CTRUNC and not fds:
                raise OSError(errno.EMFILE, "no file is free for the result")
            reply, features = self._received(data, fds)
        except BlockingIOError:
            return
        except ConnectionError:
            self._lose()
            return
        except Exception as error:  # a compromised worker may send anything
            if busy_for_files(error) is not None:  # not the worker's fault
                log.error("lost the result of image worker %d: %s", self.pid, error)
                self.kill()
                self._lose()
                return
            log.error("image worker %d violated the protocol: %r", self.pid, error)
            self.violated = True
            self._lose()
            return
        finally:
            for fd in fds:
                os.close(fd)  # the mapping does not need it
        self._on_reply(reply, features)

    def _received(self, data: bytes, fds: list[int]) -> tuple[protocol.FromWorker, Features | None]:
        reply = protocol.reply_decoder.decode(data)
        if isinstance(reply, protocol.Ready):
            if self._job_ids or self.ready:
                raise ProtocolError("unexpected Ready")
            self.ready = not self._killed
            return reply, None
        if isinstance(reply, protocol.Decoded):
            if not self._job_ids or reply.id != self._job_ids[0] or reply.id == self._decoded_id:
                raise ProtocolError(f"unexpected Decoded for job {reply.id}")
            self._decoded_id = reply.id
            return reply, None
        expected = self._job_ids.popleft() if self._job_ids else None
        if reply.id != expected:
            raise ProtocolError(f"reply to job {reply.id} instead of {expected}")
        if isinstance(reply, protocol.Failed) and reply.ends:
            self.ready = False
        return reply, self._features(reply, fds) if isinstance(reply, protocol.Done) else None

    def _features(self, reply: protocol.Done, fds: list[int]) -> Features:
        if reply.is_new:
            if reply.segment in self._results:
                raise ProtocolError(f"segment {reply.segment} already exists")
            # If the worker truncated the segment, reading it would kill this process.
            fcntl.fcntl(fds[0], fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
            self._results[reply.segment] = Segment.received(fds[0], reply.capacity)
        for number in reply.dropped:
            self._results.pop(number).close()
        segment = self._results[reply.segment]
        buffer = (ctypes.c_char * segment.capacity).from_buffer(segment.map)
        weakref.finalize(buffer, self._released.append, reply.segment)
        return Features.of(reply, buffer)

    # ------------------------------------------------------------------ the end

    def _lose(self) -> None:
        if self._closed:
            return
        self.close()
        self._on_end()

    def kill(self) -> None:
        """Kill the worker. It gets no more jobs, and `on_end` is called when it has exited. May be
        called from any thread."""
        self._killed = True
        self.ready = False
        self._worker.kill()

    def kill_unless_ready(self) -> None:
        """Kill a worker that is not ready yet."""
        if not self.ready:
            self.kill()

    def crashed(self) -> bool:
        """Whether the worker has ended by a fault of its own, and was not killed. Blocks: call it
        in a thread."""
        if self._killed or self.violated:
            return self.violated
        code = self._worker.exit_code()
        return code is not None and code not in KILLED

    def close(self) -> None:
        """Stop listening to the worker; call `end` afterwards."""
        if self._closed:
            return
        self._closed = True
        self.ready = False
        self._loop.remove_reader(self._connection.fileno())
        for segment in self._results.values():
            segment.close()
        self._results.clear()

    def end(self) -> None:
        """Kill the worker, wait until it has exited and close the descriptors. Blocks: call it in a
        thread."""
        self._worker.kill()
        with self._sending:
            if self._input is not None:
                self._input.close()
                self._input = None
            self._worker.end()
