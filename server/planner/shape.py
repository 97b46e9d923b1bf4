"""The numbers of a model that decide what it costs to serve, however they were found."""

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Attention:
    """Equal layers of attention.

    Attributes:
        layers: how many there are.
        width: heads x head size of the queries.
        window: the positions that each one attends to; None: all.
    """

    layers: int
    width: int
    window: int | None = None


@dataclass(frozen=True)
class Experts:
    """The experts of all layers of a mixture: `chosen` of `count` compute each token."""

    weight_bytes: int
    count: int
    chosen: int


@dataclass(frozen=True)
class Encoder:
    """A vision encoder and the layers that join it to the language model.

    Attributes:
        weight_bytes: of all of it.
        macs_per_patch: multiplications of its linear layers for each patch.
        macs_per_token: of the layers that run once for each visual token.
        patch: side of a patch in pixels.
        attention: its attention layers.
        hidden: width of its states.
        intermediate: width within its feed-forward layers.
    """

    weight_bytes: int
    macs_per_patch: int
    macs_per_token: int
    patch: int
    attention: tuple[Attention, ...]
    hidden: int
    intermediate: int


@dataclass(frozen=True)
class Language:
    """A language model.

    Attributes:
        weight_bytes: of all of it.
        unread_bytes: of these, what a step does not read whole: the table of embeddings.
        macs_per_token: multiplications of the linear layers that compute one token.
        macs_per_output: of the last layer, for each token that is sampled.
        attention: its attention layers.
        hidden, intermediate, vocabulary: widths of its states, of its feed-forward layers, and of
            its output.
        itemsize: bytes of a number in its states.
        experts: None unless it is a mixture of experts.
    """

    weight_bytes: int
    unread_bytes: int
    macs_per_token: int
    macs_per_output: int
    attention: tuple[Attention, ...]
    hidden: int
    intermediate: int
    vocabulary: int
    itemsize: int
    experts: Experts | None = None


class KvRule(Protocol):
    """How a model's KV cache grows, on one GPU."""

    @property
    def bytes_per_token(self) -> int:
        """Bytes that a token adds to a short request."""
        ...

    def request_bytes(self, tokens: int) -> int:
        """Bytes of a request of `tokens` tokens, in whole blocks; layers with a window, or with a
        state of constant size, take no more than that."""
        ...

    def concurrency(self, available: int, tokens: int) -> float:
        """How many requests of `tokens` tokens fit into `available` bytes at once."""
        ...

    def split(self, gpus: int) -> "KvRule":
        """The same on each of `gpus` GPUs of a tensor-parallel group."""
        ...

    def in_fp8(self) -> "KvRule | None":
        """The same with `--kv-cache-dtype fp8`; None if this model's layers differ from that."""
        ...


@dataclass(frozen=True)
class ModelShape:
    """A model as it is served.

    Attributes:
        name: of its class in vLLM.
        max_model_len: most tokens of a request.
        language, encoder: its parts; `encoder` is None if it takes no pictures.
        kv: its KV cache.
    """

    name: str
    max_model_len: int
    language: Language
    encoder: Encoder | None
    kv: KvRule

    @property
    def weight_bytes(self) -> int:
        return self.language.weight_bytes + (self.encoder.weight_bytes if self.encoder else 0)
