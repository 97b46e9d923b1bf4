"""What the two halves of the connector tell each other, each step of the engine."""

from dataclasses import dataclass, field

import torch
from vllm.distributed.ec_transfer.ec_connector.base import (
    ECConnectorMetadata,
    ECConnectorWorkerMetadata,
)

from server.engine.embedding_cache.arena import ArenaName, Extents
from server.engine.embedding_cache.entries import Spec

DTYPES = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass
class Orders(ECConnectorMetadata):
    """What the workers shall copy this step: from the arena for the `loads`, into it for the
    `saves`, both by the name of the image."""

    arena: ArenaName
    loads: dict[str, tuple[Extents, Spec]] = field(default_factory=dict)
    saves: dict[str, tuple[Extents, Spec]] = field(default_factory=dict)


@dataclass
class Report(ECConnectorWorkerMetadata):
    """What was copied: the names of loads, and of saves with whether they succeeded."""

    loaded: list[str] = field(default_factory=list)
    saved: dict[str, bool] = field(default_factory=dict)

    def aggregate(self, other: ECConnectorWorkerMetadata) -> "Report":
        assert isinstance(other, Report)
        self.loaded += other.loaded
        self.saved |= other.saved
        return self
