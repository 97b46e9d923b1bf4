"""The planner's arithmetic, against tables that were computed by others."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from server.planner import costs, report
from server.planner.gpus import GPUS
from server.planner.plan import Machine, PlannedImage, Workload, plan, with_fp8
from server.planner.shape import Attention, Encoder, Experts, Language, ModelShape

GIB = 1 << 30


@dataclass(frozen=True)
class Grouped:
    """The KV cache of equal layers with grouped heads."""

    layers: int
    heads: int
    head: int
    itemsize: int = 2
    block: int = 16

    @property
    def bytes_per_token(self) -> int:
        return 2 * self.layers * self.heads * self.head * self.itemsize

    def request_bytes(self, tokens: int) -> int:
        return -(-tokens // self.block) * self.block * self.bytes_per_token

    def concurrency(self, available: int, tokens: int) -> float:
        return available / self.request_bytes(tokens)

    def split(self, gpus: int) -> "Grouped":
        return replace(self, heads=max(self.heads // gpus, 1))

    def in_fp8(self) -> "Grouped":
        return replace(self, itemsize=1)


# As `server.engine.model_shape` reads them from the published configuration of Qwen3-VL-8B.
QWEN3_VL_8B = ModelShape(
    "Qwen3VLForConditionalGeneration",
    32768,
    Language(
        weight_bytes=16_381_470_720,
        unread_bytes=1_244_659_712,
        macs_per_token=6_945_767_424,
        macs_per_output=622_329_856,
        attention=(Attention(36, 4096),),
        hidden=4096,
        intermediate=12288,
        vocabulary=151_936,
        itemsize=2,
    ),
    Encoder(
        weight_bytes=1_152_776_672,
        macs_per_patch=412_839_936,
        macs_per_token=160_432_128,
        patch=16,
        attention=(Attention(27, 1152),),
        hidden=1152,
        intermediate=4304,
    ),
    Grouped(36, 8, 128),
)
FULL_HD = PlannedImage((1920, 1080), 2040, 2040, ((1920, 1088),))
ONE = Workload((FULL_HD,), 500, 200)

# AIConfigurator 0.12, vLLM, Qwen3-VL-8B, batch 1, prompt of 500 tokens, answer of 200, in ms:
# encoder for 1920x1080, prefill without and with the picture, time of a token.
AICONFIGURATOR = {
    "h100": (36.908, 11.840, 54.572, 6.350),
    "h200": (35.729, 11.474, 51.873, 5.055),
    "l40s": (107.250, 38.994, 193.326, 21.649),
    "b200": (19.874, 7.229, 30.176, 3.560),
}


@pytest.mark.parametrize("name", AICONFIGURATOR)
def test_times_are_within_a_quarter_of_aiconfigurators(name: str) -> None:
    gpu, language = GPUS[name], QWEN3_VL_8B.language
    assert QWEN3_VL_8B.encoder is not None
    flops = costs.encoder_flops(QWEN3_VL_8B.encoder, FULL_HD.views, FULL_HD.tokens)
    times = (
        costs.encode_s(gpu, flops),
        costs.prefill_s(gpu, language, 500),
        costs.prefill_s(gpu, language, 2540),
        costs.decode_step_s(gpu, language, 1, QWEN3_VL_8B.kv.request_bytes(600)),
    )
    assert [1e3 * time for time in times] == [
        pytest.approx(expected, rel=0.25) for expected in AICONFIGURATOR[name]
    ]


def test_the_sum_of_a_request() -> None:
    found = plan(QWEN3_VL_8B, ONE, Machine(GPUS["h100"], price_per_hour=3.6))
    assert found.workload.tokens == 2740
    assert found.kv_bytes_per_token == 36 * 8 * 128 * 2 * 2
    assert found.kv_bytes_per_request == 2752 * found.kv_bytes_per_token  # 172 blocks of 16
    memory = found.memory
    used = memory.weights + memory.activations + memory.overhead + memory.kv_cache
    assert used == memory.allowed == int(GPUS["h100"].memory * 0.92)
    assert found.running == int(found.concurrency) == memory.kv_cache // found.kv_bytes_per_request
    busy = found.ttft.encode + found.ttft.prefill + 200 * found.step_s / found.running
    assert found.images_per_s == pytest.approx(1 / busy)
    assert found.cost_per_1000_images == pytest.approx(busy)  # 3.6 an hour: .001 a second


def test_a_cache_of_8_bits_holds_twice_as_many() -> None:
    machine = Machine(GPUS["h100"])
    shape = with_fp8(QWEN3_VL_8B)
    assert shape is not None
    twice = plan(shape, ONE, machine)
    assert twice.concurrency == 2 * plan(QWEN3_VL_8B, ONE, machine).concurrency


def test_gpus_of_a_group_share_weights_and_heads() -> None:
    one, four = (plan(QWEN3_VL_8B, ONE, Machine(GPUS["h100"], gpus)) for gpus in (1, 4))
    assert four.memory.weights == one.memory.weights // 4
    assert four.kv_bytes_per_token == one.kv_bytes_per_token // 4
    assert four.ttft.total < one.ttft.total
    # Of eight heads, sixteen GPUs have one each: heads are not split.
    sixteen = plan(QWEN3_VL_8B, ONE, Machine(GPUS["h100"], 16))
    assert sixteen.kv_bytes_per_token == one.kv_bytes_per_token // 8


def test_a_model_that_does_not_fit_runs_nothing() -> None:
    found = plan(QWEN3_VL_8B, ONE, Machine(GPUS["l4"], utilization=0.7))
    assert found.memory.kv_cache < 0
    assert not found.fits
    assert (found.images_per_s, found.cost_per_1000_images) == (0, None)
    assert "No such request fits" in report.as_text(QWEN3_VL_8B, [("as asked", found)])


def test_requests_at_once_are_bounded_by_the_setting() -> None:
    found = plan(QWEN3_VL_8B, ONE, Machine(GPUS["h200"], max_num_seqs=8))
    assert found.running == 8 < found.concurrency


def test_attention_with_a_window_grows_linearly() -> None:
    window = replace(QWEN3_VL_8B.language, attention=(Attention(36, 4096, 1024),))
    linear = costs.prefill_flops(window, 16384) - 2 * costs.prefill_flops(window, 8192)
    assert linear == pytest.approx(0, abs=2.1 * window.macs_per_output)
    whole = QWEN3_VL_8B.language
    assert costs.prefill_flops(whole, 16384) > 2.1 * costs.prefill_flops(whole, 8192)


def test_a_mixture_reads_the_experts_that_are_chosen() -> None:
    experts = Experts(weight_bytes=12 * GIB, count=128, chosen=8)
    language = replace(QWEN3_VL_8B.language, weight_bytes=15 * GIB, unread_bytes=0, experts=experts)
    gpu = GPUS["h100"]
    one, many = (costs.decode_step_s(gpu, language, batch, 0) for batch in (1, 10_000))
    read = one - costs.decode_step_s(gpu, replace(language, weight_bytes=0, experts=None), 1, 0)
    assert many > one
    assert read * 0.88 * gpu.bandwidth < 15 * GIB


@pytest.mark.parametrize(
    ("size", "milliseconds"), [((224, 224), 1.2), ((1920, 1080), 6.2), ((4032, 3024), 15.8)]
)
def test_decoding_takes_what_was_measured(size: tuple[int, int], milliseconds: float) -> None:
    assert 1e3 * costs.picture_cpu_s(size) == pytest.approx(milliseconds, rel=0.02)


def test_decoding_grows_with_the_picture() -> None:
    times = [costs.picture_cpu_s((side, side)) for side in (1, 200, 1000, 4000, 16000)]
    assert times == sorted(times)
    assert times[0] > 0


def test_a_plot_is_drawn(tmp_path: Path) -> None:
    from server.planner.plot import draw

    draw("Qwen", [plan(QWEN3_VL_8B, ONE, Machine(GPUS["h100"]))], tmp_path / "plan.svg")
    assert "images/s" in (tmp_path / "plan.svg").read_text()
