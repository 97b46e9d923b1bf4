"""Searches the memory of other processes."""

from collections.abc import Iterator

_PART_BYTES = 64 << 20


def memory_with(pid: int, marks: list[str]) -> Iterator[str]:
    """Those of `marks` that the memory which a process can read contains, each once. Only the
    files that it has mapped and cannot write are left out."""
    wanted = {mark: mark.encode() for mark in marks}
    with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        for line in maps:
            addresses, rights, *_ = line.split()
            start, end = (int(address, 16) for address in addresses.split("-"))
            is_file = "/" in line and "w" not in rights  # the content of a library
            if is_file or "r" not in rights or line.endswith(("[vvar]\n", "[vsyscall]\n")):
                continue
            for at in range(start, end, _PART_BYTES):
                try:
                    memory.seek(at)
                    part = memory.read(min(_PART_BYTES, end - at))
                except OSError:
                    continue
                for mark in [mark for mark, data in wanted.items() if data in part]:
                    del wanted[mark]
                    yield mark
                if not wanted:
                    return
