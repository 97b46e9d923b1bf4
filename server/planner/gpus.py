"""GPUs by name, from their makers' data sheets."""

from dataclasses import dataclass

_MIB = 1 << 20
_TERA = 10**12


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Attributes:
        name: as in `GPUS`.
        memory: bytes that its driver reports.
        bandwidth: of its memory, in bytes a second.
        flops: dense matrix products of 16-bit numbers, in floating-point operations a second.
    """

    name: str
    memory: int
    bandwidth: float
    flops: float


def _gpu(name: str, memory_mib: int, bandwidth_gb: float, teraflops: float) -> Gpu:
    return Gpu(name, memory_mib * _MIB, bandwidth_gb * 1e9, teraflops * _TERA)


GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("a10", 23028, 600, 125),
        _gpu("a10g", 23028, 600, 70),
        _gpu("a100-40gb", 40960, 1555, 312),
        _gpu("a100", 81920, 2039, 312),
        _gpu("b200", 183359, 8000, 2250),
        _gpu("h100", 81559, 3350, 989),
        _gpu("h100-pcie", 81559, 2039, 756),
        _gpu("h200", 143771, 4800, 989),
        _gpu("l4", 23034, 300, 121),
        _gpu("l40s", 46068, 864, 362),
        _gpu("mi300x", 196288, 5300, 1307),
        _gpu("rtx-4090", 24564, 1008, 165),
        _gpu("rtx-pro-6000", 97887, 1597, 504),
    )
}
"""Of each family, the variant for servers (SXM); other variants have their own names."""
