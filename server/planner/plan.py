"""The plan of one kind of request on one kind of machine."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from server.imaging.sizing import Size
from server.planner import costs
from server.planner.gpus import Gpu
from server.planner.shape import KvRule, ModelShape

# What vLLM's process takes beside tensors: the CUDA context, libraries, graphs. An estimate.
_OVERHEAD_BYTES = 3 << 29


@dataclass(frozen=True)
class PlannedImage:
    """A picture of a request: its size in pixels, its visual tokens, the length of its placeholder
    in the prompt, and the (width, height) in pixels of each view that the encoder gets."""

    size: Size
    tokens: int
    prompt_tokens: int
    views: tuple[Size, ...]


@dataclass(frozen=True)
class Workload:
    """Equal requests: pictures, tokens of text in the prompt, tokens of the answer."""

    images: tuple[PlannedImage, ...]
    prompt: int
    output: int

    @property
    def image_tokens(self) -> int:
        return sum(image.prompt_tokens for image in self.images)

    @property
    def prompt_tokens(self) -> int:
        return self.prompt + self.image_tokens

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.output


@dataclass(frozen=True)
class Machine:
    """`gpus` GPUs that serve one copy of the model, and vLLM's settings for it.

    Attributes:
        utilization: `--gpu-memory-utilization`.
        max_num_seqs: most requests that run at once.
        max_num_batched_tokens: most tokens of a step.
        kv_cache_bytes: memory for the KV cache of each GPU, if it is known; None: computed.
        uplink: bytes a second at which a client sends pictures.
        price_per_hour: of one GPU; None: unknown.
    """

    gpu: Gpu
    gpus: int = 1
    utilization: float = 0.92
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    kv_cache_bytes: int | None = None
    uplink: float = 125e6
    price_per_hour: float | None = None


@dataclass(frozen=True)
class Memory:
    """Bytes on each GPU. `kv_cache` is what the rest leaves of `allowed`; below 0, the model does
    not fit."""

    total: int
    allowed: int
    weights: int
    activations: int
    overhead: int
    kv_cache: int


@dataclass(frozen=True)
class Times:
    """Seconds until the first token on an idle server, by stage. `preprocess` is of the picture
    that takes longest: pictures are decoded side by side."""

    upload: float
    preprocess: float
    encode: float
    prefill: float

    @property
    def total(self) -> float:
        return self.upload + self.preprocess + self.encode + self.prefill


@dataclass(frozen=True)
class Plan:
    """What requests of a kind cost on a machine.

    Attributes:
        kv_bytes_per_token: on each GPU.
        kv_bytes_per_request: on each GPU, for the whole request.
        kv_bytes_per_image: on each GPU, of its largest picture.
        encoder_flops: of all pictures of a request.
        concurrency: requests whose KV caches fit at once; a share of one below 1.
        running: requests that run at once: `concurrency`, but no more than `max_num_seqs`.
        ttft: see `Times`.
        step_s: seconds for one token of each running request.
        requests_per_s, images_per_s, tokens_per_s: at `running` requests, each encoded, prefilled
            and decoded by the same GPUs; tokens are those of answers.
        cpu_cores: cores that decode pictures at that rate.
        cost_per_1000_images: in the unit of the price; None without pictures or a price.
    """

    machine: Machine
    workload: Workload
    memory: Memory
    kv_bytes_per_token: int
    kv_bytes_per_request: int
    kv_bytes_per_image: int
    encoder_flops: float
    concurrency: float
    running: int
    ttft: Times
    step_s: float
    requests_per_s: float
    images_per_s: float
    tokens_per_s: float
    cpu_cores: float
    cost_per_1000_images: float | None

    @property
    def fits(self) -> bool:
        """Whether at least one such request can run."""
        return self.running > 0


def plan(shape: ModelShape, workload: Workload, machine: Machine) -> Plan:
    """Work out a plan. Times and rates are estimates; tokens, weights and the bytes of the KV
    cache are exact."""
    kv = shape.kv.split(machine.gpus)
    memory = _memory(shape, workload, machine)
    concurrency = kv.concurrency(memory.kv_cache, workload.tokens) if memory.kv_cache > 0 else 0.0
    running = min(int(concurrency), machine.max_num_seqs)
    flops = _encoder_flops(shape, workload.images)
    ttft = _ttft(shape, workload, machine, flops)
    request_bytes = kv.request_bytes(workload.tokens)
    step_s, rate = _throughput(shape, workload, machine, ttft, running, request_bytes)
    images = rate * len(workload.images)
    cpu_s = sum(costs.picture_cpu_s(image.size) for image in workload.images)
    return Plan(
        machine,
        workload,
        memory,
        kv.bytes_per_token,
        request_bytes,
        max((_image_bytes(kv, workload, image) for image in workload.images), default=0),
        flops,
        concurrency,
        running,
        ttft,
        step_s,
        rate,
        images,
        rate * workload.output,
        rate * cpu_s,
        _cost(machine, images),
    )


def with_fp8(shape: ModelShape) -> ModelShape | None:
    """The model with its KV cache in 8 bits; None where that differs by layer."""
    kv = shape.kv.in_fp8()
    return None if kv is None else replace(shape, kv=kv)


def _memory(shape: ModelShape, workload: Workload, machine: Machine) -> Memory:
    """vLLM's rule: of the memory that it may use, what weights, the peak of a full step and
    libraries leave is for the KV cache."""
    total = machine.gpu.memory
    allowed = int(total * machine.utilization)
    weights = shape.weight_bytes // machine.gpus
    language = shape.language
    step = costs.activation_bytes(
        language, machine.max_num_batched_tokens, machine.max_num_seqs, machine.gpus
    )
    activations = max(step, _encoder_peak(shape, workload, machine))
    left = allowed - weights - activations - _OVERHEAD_BYTES
    kv_cache = left if machine.kv_cache_bytes is None else machine.kv_cache_bytes
    return Memory(total, allowed, weights, activations, _OVERHEAD_BYTES, kv_cache)


def _encoder_peak(shape: ModelShape, workload: Workload, machine: Machine) -> int:
    """While as many of the pictures are encoded as fit into one step, at least one."""
    if shape.encoder is None or not workload.images:
        return 0
    largest = max(workload.images, key=lambda image: image.tokens)
    at_once = max(machine.max_num_batched_tokens // max(largest.tokens, 1), 1)
    patches = sum(costs.patches_of(shape.encoder, view) for view in largest.views)
    itemsize = shape.language.itemsize
    return costs.encoder_activation_bytes(shape.encoder, patches * at_once, itemsize)


def _encoder_flops(shape: ModelShape, images: Sequence[PlannedImage]) -> float:
    encoder = shape.encoder
    if encoder is None:
        return 0.0
    return sum(costs.encoder_flops(encoder, image.views, image.tokens) for image in images)


def _ttft(shape: ModelShape, workload: Workload, machine: Machine, flops: float) -> Times:
    sent = sum(costs.picture_bytes(image.size) for image in workload.images)
    slowest = max((costs.picture_cpu_s(image.size) for image in workload.images), default=0.0)
    encode = costs.encode_s(machine.gpu, flops / machine.gpus) if flops else 0.0
    prefill = costs.prefill_s(machine.gpu, shape.language, workload.prompt_tokens, machine.gpus)
    return Times(sent / machine.uplink, slowest, encode, prefill)


def _throughput(
    shape: ModelShape,
    workload: Workload,
    machine: Machine,
    ttft: Times,
    running: int,
    request_bytes: int,
) -> tuple[float, float]:
    """Seconds of a step of `running` requests, and requests a second. On average, half of an
    answer has been made."""
    if not running:
        return 0.0, 0.0
    mean = (workload.prompt_tokens + workload.output / 2) / max(workload.tokens, 1)
    held = running * request_bytes * mean
    step_s = costs.decode_step_s(machine.gpu, shape.language, running, held, machine.gpus)
    busy_s = ttft.encode + ttft.prefill + workload.output * step_s / running
    return step_s, 1 / busy_s


def _image_bytes(kv: KvRule, workload: Workload, image: PlannedImage) -> int:
    """What the request takes more because of this picture."""
    without = workload.tokens - image.prompt_tokens
    return kv.request_bytes(workload.tokens) - kv.request_bytes(without)


def _cost(machine: Machine, images_per_s: float) -> float | None:
    if machine.price_per_hour is None or not images_per_s:
        return None
    return 1000 * machine.gpus * machine.price_per_hour / 3600 / images_per_s
