"""Search for files that make a decoder index out of bounds, crash, hang or exhaust memory.

    python -m tests.fuzz.fuzz_decoders --seconds 3600 --output FILE
    python -m tests.fuzz.fuzz_decoders --what media --seconds 3600
    python -m tests.fuzz.fuzz_decoders --seed 7 --index 1234      tries one input again

`--what jpeg`, the default: each input is read by the header reader and by the reduced JPEG decoder
at both of its scales; every second one also as in a worker, which falls back to libjpeg. `--what
media`: files of all formats and PDFs are decoded as in a worker. `--what videos`: the headers of
videos are read, and two frames of every second one decoded. Compiled loops run with bounds checks
(NUMBA_BOUNDSCHECK=1). Only a client error or a picture may come out.

Inputs are decoded in a child process. A finding is any other exception, the child's death, an input
that takes longer than `--input-timeout-s`, or a child that grows beyond `--max-memory-mib`. The
input is saved to `--findings`, and the search goes on with the next one, in a new child if needed.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import resource
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks import environment
from server.errors import ClientError
from server.imaging.video.frames import decode
from server.imaging.video.header import read_track
from tests.fuzz import jpeg_mutations, media_checks, media_mutations, video_mutations

MAX_PIXELS = 1_000_000
MAX_ADDRESS_SPACE_BYTES = 6 << 30
MAX_SAVED = 50
# The first input of a child waits for the compilation of all loops.
STARTUP_TIMEOUT_S = 600

COUNTERS = ("inputs", "headers read", "reduced decoder entered", "reduced pictures", "pictures")


def main() -> None:
    """Fuzz for the time given, and save the result; exit with 1 if there are findings."""
    options = _arguments()
    with tempfile.TemporaryDirectory() as cache:
        # The checks are compiled in: keep this code separate from the servers' cache.
        os.environ |= {"NUMBA_BOUNDSCHECK": "1", "NUMBA_CACHE_DIR": cache}
        if options.index is not None:
            checks = _CHECKS[options.what](_no_shared_counters())
            checks.check(_MUTATED[options.what](options.seed, options.index))
            return
        described = environment.describe()  # of the running commit, not of a later one
        run = _Run(options)
        run.go()
    result = {"what": f"fuzzing of the decoders: {options.what}", **described, **run.result()}
    text = json.dumps(result, indent=1) + "\n"
    print(text)
    if options.output:
        options.output.write_text(text)
    sys.exit(1 if run.findings else 0)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--what", choices=list(_MUTATED), default="jpeg")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--index", type=int, help="try this input alone, in this process")
    parser.add_argument("--input-timeout-s", type=float, default=30)
    parser.add_argument("--max-memory-mib", type=int, default=1024)
    parser.add_argument("--findings", type=Path, default=Path(tempfile.gettempdir()) / "fuzz")
    parser.add_argument("--output", type=Path, help="where the result goes, as JSON")
    return parser.parse_args()


# ---------------------------------------------------------------------- in the child


def _no_shared_counters() -> Any:
    return [0] * len(COUNTERS)


class _Checks:
    """Decodes inputs; `counters` counts by `COUNTERS`."""

    def __init__(self, counters: Any) -> None:
        import numba

        assert numba.config.BOUNDSCHECK == 1
        from server.imaging import decode, header
        from server.imaging.codecs import jpeg_header, jpeg_reduced

        self._read_header, self._decode = header.read, decode.decode
        self._reduced, self._parse = jpeg_reduced, jpeg_header.parse
        self._unsupported = jpeg_header.Unsupported
        self._counters = counters
        self._options = decode.DecodeOptions(max_pixels=MAX_PIXELS)
        assert jpeg_reduced.agrees_with_libjpeg()

    def check(self, data: bytes, whole: bool = True) -> None:
        """
        Raises:
            Exception: a decoder raised anything but a client error.
        """
        self._counters[0] += 1
        self._counters[1] += self._has_header(data)
        self._counters[2] += self._is_parsed(data)
        pictures = [self._reduced.decode(data, scale) for scale in self._reduced.SCALES]
        self._counters[3] += any(picture is not None for picture in pictures)
        if whole:
            self._counters[4] += self._is_decoded(data)

    def _has_header(self, data: bytes) -> bool:
        from server.errors import ClientError

        try:
            self._read_header(data)
        except ClientError:
            return False
        return True

    def _is_parsed(self, data: bytes) -> bool:
        try:
            self._parse(data)
        except self._unsupported:
            return False
        return True

    def _is_decoded(self, data: bytes) -> bool:
        from server.errors import ClientError

        try:
            self._decode(data, self._options)
            self._decode(data, self._options, lambda width, height: (9, 7))
        except ClientError:
            return False
        return True


class _MediaChecks:
    """Decodes files of any format as a worker does; `counters` counts by `COUNTERS`."""

    def __init__(self, counters: Any) -> None:
        self._counters = counters

    def check(self, data: bytes, whole: bool = True) -> None:
        """
        Raises:
            Exception: a decoder raised anything but a client error.
        """
        self._counters[0] += 1
        self._counters[4] += media_checks.is_decoded(data)


class _VideoChecks:
    """Reads the headers of videos, and decodes two frames of every second one."""

    def __init__(self, counters: Any) -> None:
        self._counters = counters

    def check(self, data: bytes, whole: bool = True) -> None:
        """
        Raises:
            Exception: anything but a client error.
        """
        self._counters[0] += 1
        try:
            track = read_track(data)
            video_mutations.check(track, data)
            self._counters[1] += 1
            if whole:
                last = len(track.timeline.frames) - 1
                decode(data, [last // 2, last], (32, 16), MAX_PIXELS)
                self._counters[4] += 1
        except ClientError:
            return


_CHECKS: dict[str, Any] = {"jpeg": _Checks, "media": _MediaChecks, "videos": _VideoChecks}
_MUTATED = {
    "jpeg": jpeg_mutations.mutated,
    "media": media_mutations.mutated,
    "videos": video_mutations.mutated,
}


def _child(what: str, seed: int, first: int, at: Any, counters: Any, findings: Connection) -> None:
    """Decode inputs from number `first` on, without end; `at` is the number of the current one."""
    resource.setrlimit(resource.RLIMIT_AS, (MAX_ADDRESS_SPACE_BYTES, MAX_ADDRESS_SPACE_BYTES))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libraries print messages about each damaged file
    checks = _CHECKS[what](counters)
    index = first
    while True:
        at.value = index
        try:
            checks.check(_MUTATED[what](seed, index), whole=index % 2 == 0)
        except Exception:
            findings.send((index, traceback.format_exc()))
        index += 1


# ---------------------------------------------------------------------- in the parent


@dataclass
class _Run:
    """A search with its children, one after the other."""

    options: argparse.Namespace
    findings: list[dict[str, Any]] = field(default_factory=list)
    elapsed_s: float = 0
    peak_mib: int = 0
    children: int = 0
    limited: int = 0

    def __post_init__(self) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._at = self._context.Value("q", -1, lock=False)
        self._counters = self._context.Array("q", len(COUNTERS), lock=False)
        self._seen: set[str] = set()

    def go(self) -> None:
        start, first = time.monotonic(), 0
        end = start + self.options.seconds
        while time.monotonic() < end:
            first = self._watch(first, end) + 1
        self.elapsed_s = time.monotonic() - start

    def _watch(self, first: int, end: float) -> int:
        """Run a child until it stops; returns the number of its last input."""
        ours, theirs = self._context.Pipe(duplex=False)
        self._at.value = -1
        arguments = (self.options.what, self.options.seed, first, self._at, self._counters, theirs)
        child = self._context.Process(target=_child, args=arguments, daemon=True)
        child.start()
        self.children += 1
        theirs.close()
        changed, last = time.monotonic(), -1
        try:
            while time.monotonic() < end:
                self._receive(ours)
                if self._at.value != last:
                    changed, last = time.monotonic(), self._at.value
                problem = self._problem(child.pid or 0, child.exitcode, changed, last)
                if problem == "limited":
                    self.limited += 1
                    break
                if problem:
                    self._report(max(first, last), problem)
                    break
        finally:
            child.kill()
            child.join()
            ours.close()
        return max(first, int(self._at.value))

    def _receive(self, findings: Connection) -> None:
        """Wait briefly for a finding."""
        try:
            while findings.poll(0.25):
                self._report(*findings.recv())
        except EOFError:  # the child has died; its exit code is checked elsewhere
            time.sleep(0.25)

    def _problem(self, pid: int, exitcode: int | None, changed: float, last: int) -> str | None:
        if exitcode == 0:  # by the limits of a PDF page, as a worker; it never ends otherwise
            return "limited"
        if exitcode is not None:
            return f"the process died with code {exitcode}"
        limit = STARTUP_TIMEOUT_S if last < 0 else self.options.input_timeout_s
        if time.monotonic() - changed > limit:
            return f"no end after {limit:g} s"
        peak = _peak_mib(pid)
        self.peak_mib = max(self.peak_mib, peak)
        if peak > self.options.max_memory_mib:
            return f"more than {self.options.max_memory_mib} MiB of memory, here or just before"
        return None

    def _report(self, index: int, problem: str) -> None:
        """Save the input, unless an exception from the same line has been found before."""
        _, raised, where = problem.rpartition("\n  File ")
        print(f"input {index}: {problem}", file=sys.stderr, flush=True)
        if where in self._seen or len(self.findings) >= MAX_SAVED:
            return
        if raised:
            self._seen.add(where)
        data = _MUTATED[self.options.what](self.options.seed, index)
        self.options.findings.mkdir(parents=True, exist_ok=True)
        name = f"{hashlib.sha256(data).hexdigest()[:16]}.{self.options.what}"
        (self.options.findings / name).write_bytes(data)
        finding = {"index": index, "file": name, "problem": problem.strip().splitlines()[-1]}
        self.findings.append(finding | ({"where": where.partition("\n")[0]} if raised else {}))

    def result(self) -> dict[str, Any]:
        counts = dict(zip(COUNTERS, self._counters, strict=True))
        return {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "seed": self.options.seed,
            "seconds": round(self.elapsed_s),
            "cpu_seconds": round(sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])),
            "executions": counts.pop("inputs"),
            "of these": counts,
            "peak_memory_mib": self.peak_mib,
            "child_processes": self.children,
            "stopped_by_the_limits_of_a_pdf_page": self.limited,
            "bounds_checks": True,
            "findings": self.findings,
        }


def _peak_mib(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    peaks = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")]
    return int(peaks[0]) >> 10 if peaks else 0


if __name__ == "__main__":
    main()
