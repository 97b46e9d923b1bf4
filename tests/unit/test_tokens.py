"""The arithmetic of image tokens: published numbers, and properties that hold for every size."""

import math
from collections.abc import Callable, Iterator
from random import Random

import pytest

from server.errors import ImageAspectRatio, ImageTokenCap
from server.imaging.sizing import BestGrid, NativeResolution, Size
from server.imaging.tokens import (
    Claim,
    Count,
    Detail,
    MeasuredTokens,
    TokenRule,
    allocate_together,
    detail_cap,
    kv_bytes_per_token,
    share,
)
from server.imaging.tokens.anyres import AnyResTokens
from server.imaging.tokens.native import PixtralTokens, QwenTokens
from server.imaging.tokens.tiles import IdeficsTokens, InternVLTokens
from server.imaging.tokens.views import FixedTokens, GemmaTokens, PanAndScan


def tags(tokens: int) -> Callable[[int, int], int]:
    """One way a tokenizer may count: two tags per tile, a line break per row."""
    return lambda rows, columns: (rows * columns + 1) * (tokens + 2) + rows + 1


# As published.
QWEN2 = QwenTokens(NativeResolution(28, 56 * 56, 28 * 28 * 16384))
QWEN3 = QwenTokens(NativeResolution(32, 256 * 256, 4096 * 4096))
PIXTRAL = PixtralTokens(16, 1024)
MISTRAL3 = PixtralTokens(28, 1540)
LLAVA = FixedTokens("llava", 576, 576, (336, 336), 336)
PALIGEMMA = FixedTokens("paligemma", 1024, 1025, (448, 448))
LLAVA_NEXT = AnyResTokens(
    "llava_next",
    BestGrid(((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))),
    tile=336,
    side=24,
    base=576,
)
ONEVISION = AnyResTokens(
    "llava_onevision",
    BestGrid(tuple((384 * rows, 384 * columns) for rows in range(1, 7) for columns in range(1, 7))),
    tile=384,
    side=27,
    base=729,
    shrinks=True,
)
INTERNVL = InternVLTokens((448, 448), 256, 1, 12, True, "max_patches")
IDEFICS3 = IdeficsTokens(364, 4 * 364, 169, tags(169))
SMOLVLM = IdeficsTokens(512, 4 * 512, 64, tags(64))
GEMMA3 = GemmaTokens((896, 896), 256, lambda crops: 260 * (1 + crops), PanAndScan(256, 4, 1.2))

RULES: dict[str, TokenRule] = {
    "qwen2": QWEN2,
    "qwen2, few pixels": QwenTokens(NativeResolution(28, 28 * 28 * 4, 28 * 28 * 60)),
    "qwen3": QWEN3,
    "pixtral": PIXTRAL,
    "mistral3": MISTRAL3,
    "pixtral, odd edge": PixtralTokens(16, 1000),
    "llava": LLAVA,
    "paligemma": PALIGEMMA,
    "llava_next": LLAVA_NEXT,
    "llava_onevision": ONEVISION,
    "internvl": INTERNVL,
    "internvl, no thumbnail": InternVLTokens((448, 448), 256, 1, 6, False, "max_patches"),
    "idefics3": IDEFICS3,
    "smolvlm": SMOLVLM,
    "gemma3": GEMMA3,
}


# ------------------------------------------------------------------ published numbers


@pytest.mark.parametrize(
    ("size", "patches"),
    [
        ((224, 224), 256), ((336, 336), 576), ((448, 448), 1024), ((672, 672), 2304),
        ((896, 896), 4096), ((1344, 1344), 9216), ((1568, 784), 6272),
    ],
)  # fmt: skip
def test_patch_counts_of_14_pixel_models_match_published_numbers(size: Size, patches: int) -> None:
    rule = QwenTokens(NativeResolution(14, 14 * 14, 14 * 14 * 10_000))
    assert rule.allocate(*size).tokens == patches
    assert PixtralTokens(14, 2000).allocate(*size).tokens == patches
    merged = QWEN2.allocate(*size)  # merged two by two
    assert merged.tokens == patches // 4
    assert merged.processed == size


@pytest.mark.parametrize(
    ("rule", "size", "tokens", "processed"),
    [
        (QWEN2, (1, 1), 4, (56, 56)),
        (QWEN2, (1000, 700), 36 * 25, (1008, 700)),
        (QWEN2, (8000, 6000), 147 * 110, (4116, 3080)),
        (QWEN3, (100, 100), 64, (256, 256)),
        (QWEN3, (1920, 1080), 60 * 34, (1920, 1088)),
        (PIXTRAL, (1024, 1024), 4096, (1024, 1024)),
        (PIXTRAL, (2048, 1024), 2048, (1024, 512)),
        (PIXTRAL, (17, 16), 2, (32, 16)),
        (MISTRAL3, (1540, 1540), 55 * 55, (1540, 1540)),
        (LLAVA_NEXT, (672, 672), 576 + 48 * 48 + 48, (672, 672)),
        (LLAVA_NEXT, (336, 336), 576 + 24 * 24 + 24, (336, 336)),
        (LLAVA_NEXT, (1344, 672), 576 + 24 * 48 + 24, (672, 336)),
        (ONEVISION, (384, 384), 729 + 27 * 27 + 27, (384, 384)),
        (ONEVISION, (2304, 2304), 729 + 81 * 81 + 81, (2304, 2304)),
        (INTERNVL, (448, 448), 256, (448, 448)),
        (INTERNVL, (896, 448), 3 * 256, (896, 448)),
        (INTERNVL, (4000, 3000), 13 * 256, (1792, 1344)),
        (IDEFICS3, (3000, 3000), 17 * 169, (1456, 1456)),
        (IDEFICS3, (1000, 250), 5 * 169, (1456, 364)),
        (SMOLVLM, (1600, 1200), 13 * 64, (2048, 1536)),
        (GEMMA3, (896, 896), 256, (896, 896)),
        (GEMMA3, (2000, 1000), 3 * 256, (896, 896)),
        (LLAVA, (4000, 3000), 576, (336, 336)),
    ],
)
def test_token_counts_and_sizes_match_published_numbers(
    rule: TokenRule, size: Size, tokens: int, processed: Size
) -> None:
    got = rule.allocate(*size)
    assert (got.tokens, got.processed) == (tokens, processed)
    assert (got.resize, got.options) == (None, {})


def test_placeholder_text_tokens_are_counted() -> None:
    assert PIXTRAL.allocate(160, 320).prompt_tokens == (10 + 1) * 20
    assert INTERNVL.allocate(448, 448).prompt_tokens == 256 + 2
    assert IDEFICS3.allocate(1456, 728).prompt_tokens == 9 * 171 + 3
    assert IDEFICS3.allocate(1456, 728, 169).prompt_tokens == 171 + 1
    assert GEMMA3.allocate(2000, 1000).prompt_tokens == 3 * 260
    assert PALIGEMMA.allocate(10, 10).prompt_tokens == 1025


@pytest.mark.parametrize(
    ("rule", "most"),
    [
        (QWEN2, 16384), (QWEN3, 16384), (PIXTRAL, 4096), (MISTRAL3, 3025), (LLAVA, 576),
        (LLAVA_NEXT, 2928), (INTERNVL, 3328), (IDEFICS3, 2873), (SMOLVLM, 1088), (GEMMA3, 1280),
        (ONEVISION, 8829),
    ],
)  # fmt: skip
def test_the_maximum_of_tokens_matches_published_numbers(rule: TokenRule, most: int) -> None:
    assert rule.most == rule.high == most


def test_the_maximum_of_onevision_is_nearly_reached() -> None:
    """By the largest picture that is not shrunk; vLLM's worst case is the same in landscape."""
    assert ONEVISION.allocate(944, 1153).tokens == 729 + 98 * 81 + 98


def test_kv_cache_bytes_match_published_numbers() -> None:
    assert kv_bytes_per_token(32, 8, 128, 2) == 128 * 1024  # Llama-3.1-8B, fp16
    assert kv_bytes_per_token(32, 8, 128, 2) * 576 == 72 * 2**20
    assert (
        kv_bytes_per_token(32, 32, 128, 2) == 512 * 1024
    )  # a 7B model without grouped-query attention


# ------------------------------------------------------------------ caps, family by family


@pytest.mark.parametrize(
    ("rule", "size", "cap", "tokens", "processed"),
    [
        (QWEN2, (2000, 2000), 256, 256, (448, 448)),
        (QWEN2, (4000, 3000), 1000, 36 * 27, (1008, 756)),
        (QWEN2, (5600, 28), 100, 100, (2800, 28)),
        (QWEN2, (500, 500), 1, 1, (28, 28)),
        (QWEN3, (100, 100), 20, 9, (96, 96)),
        (PIXTRAL, (1024, 1024), 1000, 31 * 31, (496, 496)),
        (PIXTRAL, (4000, 10), 30, 30, (480, 16)),
        (LLAVA_NEXT, (1000, 1000), 2000, 1176, (336, 336)),
        (LLAVA_NEXT, (4000, 3000), 2000, 576 + 24 * 32 + 24, (448, 336)),
        (ONEVISION, (4000, 3000), 5000, 729 + 54 * 73 + 54, (1024, 768)),
        (INTERNVL, (4000, 3000), 3327, 7 * 256, (3 * 448, 2 * 448)),
        (INTERNVL, (4000, 3000), 600, 256, (448, 448)),
        (IDEFICS3, (3000, 3000), 2872, 10 * 169, (1092, 1092)),
        (IDEFICS3, (3000, 3000), 845, 5 * 169, (728, 728)),
        (IDEFICS3, (3000, 3000), 300, 169, (364, 364)),
        (GEMMA3, (4000, 1000), 1000, 3 * 256, (896, 896)),
        (GEMMA3, (4000, 1000), 767, 256, (896, 896)),
    ],
)
def test_a_cap_gives_the_expected_tokens_and_size(
    rule: TokenRule, size: Size, cap: int, tokens: int, processed: Size
) -> None:
    got = rule.allocate(*size, cap)
    assert (got.tokens, got.processed) == (tokens, processed)
    assert got.region == (0, 0, *size)


def test_a_cap_is_met_by_resizing_or_by_an_option() -> None:
    """A resize to a size that the processor keeps, or an option with few values."""
    assert QWEN2.allocate(2000, 2000, 256).resize == (448, 448)
    assert QWEN2.allocate(2000, 2000, 256).options == {}
    tiny = QWEN3.allocate(2000, 2000, 20)
    assert tiny.resize == (128, 128)
    assert tiny.options == {"min_pixels": 1024, "max_pixels": 4096 * 4096}
    assert PIXTRAL.allocate(2000, 1000, 100).resize == PIXTRAL.allocate(2000, 1000, 100).processed
    assert LLAVA_NEXT.allocate(1000, 1000, 2000).resize == (336, 336)
    assert INTERNVL.allocate(4000, 3000, 2000).options == {"max_patches": 6}
    assert IDEFICS3.allocate(3000, 3000, 845).options == {"size": {"longest_edge": 728}}
    assert GEMMA3.allocate(4000, 1000, 1000).options == {"pan_and_scan_max_num_crops": 2}
    assert GEMMA3.allocate(4000, 1000, 256).options == {"do_pan_and_scan": False}


@pytest.mark.parametrize(
    ("rule", "size"),
    [(QWEN2, (10_000, 49)), (QWEN3, (1, 201)), (PIXTRAL, (5000, 2)), (MISTRAL3, (1, 1541))],
)
def test_extreme_aspect_ratios_are_refused(rule: TokenRule, size: Size) -> None:
    for cap in (None, 100):
        with pytest.raises(ImageAspectRatio):
            rule.allocate(*size, cap)
    with pytest.raises(ImageAspectRatio):
        rule.fewest(*size)


@pytest.mark.parametrize("rule", [LLAVA, PALIGEMMA])
def test_caps_below_the_size_of_fixed_families_are_refused(rule: FixedTokens) -> None:
    assert rule.allocate(50, 50, rule.tokens) == rule.allocate(50, 50)
    with pytest.raises(ImageTokenCap, match=f"at least {rule.tokens} tokens"):
        rule.allocate(50, 50, rule.tokens - 1)


def test_regions_of_the_original_are_those_the_model_sees() -> None:
    assert PALIGEMMA.allocate(600, 300).region == (0, 0, 600, 300)
    assert LLAVA.allocate(600, 300).region == (150, 0, 450, 300)  # the centre square
    assert LLAVA.allocate(300, 600).region == (0, 150, 300, 450)
    assert LLAVA.allocate(600, 300).original(168, 336) == (300, 300)
    padded = FixedTokens("padded", 1, 1, (400, 400), 200).allocate(200, 200)
    assert padded.region == (-100, -100, 300, 300)
    assert QWEN2.allocate(2000, 1000, 100).original(0, 0) == (0, 0)
    capped = QWEN2.allocate(2000, 1000, 100)
    assert capped.original(*capped.processed) == (2000, 1000)


# ------------------------------------------------------------------ properties of every picture

# Edges of patches and tiles.
EDGES = [14, 16, 28, 32, 56, 256, 336, 364, 384, 448, 512, 672, 896, 1024, 1456, 1540, 2304, 4096]


def _side(random: Random) -> int:
    """Mostly sides of usual pictures, often one that is next to an edge, sometimes extreme ones."""
    kind = random.random()
    if kind < 0.3:
        return random.choice(EDGES) * random.choice((1, 1, 2, 3)) + random.choice((-1, 0, 1))
    if kind < 0.6:
        return random.randint(1, 3000)
    if kind < 0.8:
        return random.randint(1, 30_000)
    return int(10 ** random.uniform(0, 4.4))


def sizes(random: Random, count: int) -> Iterator[Size]:
    """`count` sizes, after those that once were rounded wrongly."""
    yield from ((5600, 28), (8200, 41), (1, 1))
    for _ in range(count):
        yield _side(random), _side(random)


def allowed(rule: TokenRule, size: Size) -> bool:
    """Whether `rule` takes pictures of this aspect ratio."""
    try:
        rule.fewest(*size)
    except ImageAspectRatio:
        return False
    return True


@pytest.mark.parametrize("name", RULES)
def test_the_cap_is_never_exceeded(name: str) -> None:
    rule, random = RULES[name], Random(name)
    usable = [size for size in sizes(random, 400) if allowed(rule, size)]
    assert len(usable) > 200
    for size in usable:
        natural, fewest = rule.allocate(*size), rule.fewest(*size)
        assert 1 <= rule.least <= fewest <= natural.tokens, size
        assert rule.most is not None
        assert natural.tokens <= rule.most, size
        assert rule.least <= rule.low <= rule.most
        with pytest.raises(ImageTokenCap):
            rule.allocate(*size, fewest - 1)
        for part in (0.5, 0.86, 1.0, random.random()):
            check_cap(rule, size, fewest + int(part * (natural.tokens - fewest)))


def check_cap(rule: TokenRule, size: Size, cap: int) -> None:
    case = (size, cap)
    got = rule.allocate(*size, cap)
    assert rule.fewest(*size) <= got.tokens <= cap, case
    assert got.prompt_tokens >= got.tokens, case
    assert got.region == rule.allocate(*size).region, case
    if got.resize is not None and not got.options:
        again = rule.allocate(*got.resize)  # the picture that the processor gets
        assert (again.tokens, again.prompt_tokens) == (got.tokens, got.prompt_tokens), case
        assert again.processed == got.processed, case


@pytest.mark.parametrize("name", RULES)
def test_a_higher_cap_gives_no_fewer_tokens(name: str) -> None:
    rule, random = RULES[name], Random(name)
    for size in sizes(random, 200):
        if not allowed(rule, size):
            continue
        low = rule.fewest(*size) + random.randint(1, 6000)
        high = low + random.randint(0, 6000)
        fewer, more = (rule.allocate(*size, cap).tokens for cap in (low, high))
        assert fewer <= more, (size, low, high)


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "pixtral", "mistral3"])
def test_native_families_keep_the_aspect_ratio_and_use_the_cap(name: str) -> None:
    rule, random = RULES[name], Random(name)
    for _ in range(400):
        width, height, cap = *(random.randint(200, 6000) for _ in "wh"), random.randint(400, 4000)
        if max(width, height) >= 8 * min(width, height):
            continue
        natural, got = rule.allocate(width, height), rule.allocate(width, height, cap)
        shape = got.processed[0] / got.processed[1]
        assert 0.8 < shape / (width / height) < 1.25, (width, height, cap)
        if natural.tokens > cap:
            assert got.tokens > 0.75 * cap, (width, height, cap)
            assert got.processed[0] <= natural.processed[0], (width, height, cap)
            assert got.processed[1] <= natural.processed[1], (width, height, cap)


def test_a_qwen_cap_gives_the_size_of_the_same_max_pixels() -> None:
    """If no side is shorter than one token, the size is that of `max_pixels`."""
    random = Random(1)
    for _ in range(800):
        width, height, cap = *(random.randint(100, 4000) for _ in "wh"), random.randint(4, 70)
        if max(width, height) >= 3 * min(width, height):
            continue
        got = QWEN2.allocate(width, height, cap)
        own = NativeResolution(28, 28 * 28, cap * 28 * 28).target(width, height)
        if got.resize is not None:
            assert got.processed == own, (width, height, cap)


def test_caps_need_few_sets_of_options() -> None:
    """The workers keep a processor for each set."""
    for rule, most in [(QWEN3, 2), (IDEFICS3, 4), (INTERNVL, 12), (GEMMA3, 5)]:
        distinct = {
            repr(rule.allocate(width, height, cap).options)
            for width in range(100, 4000, 390)
            for height in range(100, 4000, 410)
            for cap in (*range(rule.least, 512, 9), *range(512, 4000, 97))
        }
        assert 1 < len(distinct) <= most


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("size", [(40, 30), (1000, 700), (3000, 900), (700, 3000)])
def test_low_detail_takes_at_most_the_tokens_of_high(name: str, size: Size) -> None:
    rule = RULES[name]

    def tokens(detail: Detail) -> int:
        return rule.allocate(*size, detail_cap(rule, detail, *size)).tokens

    assert tokens("low") <= tokens("high") == tokens("auto")
    assert tokens("low") <= max(rule.low, rule.fewest(*size))


# ------------------------------------------------------------------ measuring


def by_size(rule: TokenRule) -> Callable[[int, int], Count]:
    return lambda width, height: Count(*_both(rule, width, height))


def _both(rule: TokenRule, width: int, height: int) -> tuple[int, int]:
    got = rule.allocate(width, height)
    return got.tokens, got.prompt_tokens


@pytest.mark.parametrize("name", ["pixtral", "llava_next", "llava_onevision", "gemma3"])
def test_a_cap_on_a_measured_model_is_never_exceeded(name: str) -> None:
    real, random = RULES[name], Random(name)
    refused = 0
    for _ in range(100):
        width, height = random.randint(1, 4000), random.randint(1, 4000)
        if max(width, height) >= 200 * min(width, height):
            continue
        cap = random.randint(1, random.choice((100, 1000, 5000)))
        rule = MeasuredTokens(by_size(real))
        try:
            got = rule.allocate(width, height, cap)
        except ImageTokenCap:
            refused += 1
            assert cap < rule.fewest(width, height), (width, height, cap)
            continue
        natural = real.allocate(width, height)
        assert got.tokens <= cap, (width, height, cap)
        if natural.tokens <= cap:
            assert got.resize is None, (width, height, cap)
        else:
            assert got.resize == got.processed, (width, height, cap)
            assert real.allocate(*got.processed).tokens == got.tokens, (width, height, cap)
    assert refused < 90


def test_measuring_finds_nearly_the_best_size_in_few_steps() -> None:
    asked: list[Size] = []

    def count(width: int, height: int) -> Count:
        asked.append((width, height))
        return Count(math.ceil(width / 10) * math.ceil(height / 10), 0)

    rule = MeasuredTokens(count)
    got = rule.allocate(4000, 3000, 2000)
    assert 0.95 * 2000 < got.tokens <= 2000
    assert got.processed[0] / got.processed[1] == pytest.approx(4 / 3, rel=0.01)
    assert len(asked) == len(set(asked)) < 20
    before = len(asked)
    assert rule.allocate(4000, 3000, 2000) == got
    assert len(asked) == before  # remembered


def test_measuring_works_if_smaller_pictures_take_more_tokens() -> None:
    """This model takes the fewest tokens for medium pictures; the result was measured."""
    rule = MeasuredTokens(lambda width, _: Count(100 if 300 <= width <= 340 else 900, 0))
    got = rule.allocate(1000, 1000, 200)
    assert got.tokens == 100
    assert 300 <= got.processed[0] <= 340
    with pytest.raises(ImageTokenCap, match="at least 100 tokens"):
        rule.allocate(1000, 1000, 99)


# ------------------------------------------------------------------ one budget for many images


def some_claims(random: Random) -> list[Claim]:
    """One to eight, often of small numbers, so that budgets are short, and some are equal."""
    found = []
    for _ in range(random.randint(1, 8)):
        area = random.randint(1, random.choice((3, 20_000_000)))
        least, low = (random.randint(1, random.choice((3, 600))) for _ in range(2))
        more = random.choice((0, random.randint(0, 10), random.randint(0, 16_000)))
        found.append(Claim(area, max(least, low) + more, least, low))
    return found


def some_budget(random: Random, claims: list[Claim]) -> int:
    """A budget from well below the fewest tokens of `claims` to more than they want."""
    bounds = [sum(each) for each in zip(*((c.least, c.low, c.tokens) for c in claims), strict=True)]
    around = random.choice(bounds) + random.randint(-3, 3)
    return max(
        1, random.choice((around, random.randint(1, max(bounds)), random.randint(1, 60_000)))
    )


def test_a_budget_is_shared_fairly() -> None:
    random = Random(1)
    refused = 0
    for _ in range(3000):
        claims = some_claims(random)
        budget = some_budget(random, claims)
        if sum(claim.least for claim in claims) > budget:
            refused += 1
            with pytest.raises(ImageTokenCap):
                share(budget, claims)
            continue
        check_shares(budget, claims)
    assert 200 < refused < 1500


def check_shares(budget: int, claims: list[Claim]) -> None:
    caps, case = share(budget, claims), (budget, claims)
    assert sum(caps) <= budget, case
    wanted = [claim.tokens for claim in claims]
    bounded = (claim.least <= cap <= claim.tokens for claim, cap in zip(claims, caps, strict=True))
    assert all(bounded), case
    if sum(wanted) <= budget:
        assert caps == wanted, case
    elif caps != wanted:  # except for rounding, no tokens are left over while an image wants more
        assert budget - sum(caps) <= len(claims), case
    useful = [min(claim.tokens, max(claim.low, claim.least)) for claim in claims]
    if sum(useful) <= budget:  # no image gets less than its useful minimum
        assert all(cap >= least for cap, least in zip(caps, useful, strict=True)), case
    else:  # no image gets more than it
        assert all(cap <= most for cap, most in zip(caps, useful, strict=True)), case


def test_shares_do_not_depend_on_the_order() -> None:
    random = Random(2)
    for _ in range(1500):
        claims = some_claims(random)
        budget = some_budget(random, claims)
        if sum(claim.least for claim in claims) > budget:
            continue
        order = random.sample(range(len(claims)), len(claims))
        caps = share(budget, claims)
        shuffled = share(budget, [claims[index] for index in order])
        assert shuffled == [caps[index] for index in order], (budget, claims, order)


def test_a_budget_is_shared_by_area() -> None:
    large, half, small = Claim(200, 900, 1, 50), Claim(100, 900, 1, 50), Claim(2, 40, 1, 50)
    assert share(640, [large, half, small]) == [400, 200, 40]
    assert share(640, [half, small, large]) == [200, 40, 400]
    thrifty = Claim(200, 100, 1, 50)  # a large picture that needs few tokens
    assert share(640, [thrifty, half, small]) == [100, 500, 40]
    assert share(60, [large, half, small]) == [39, 19, 1]  # below the useful minimum, evenly


@pytest.mark.parametrize("name", RULES)
def test_images_allocated_together_stay_within_the_budget(name: str) -> None:
    rule, random = RULES[name], Random(name)
    for _ in range(60):
        count = random.randint(1, 6)
        shown = [(random.randint(50, 4000), random.randint(50, 4000)) for _ in range(count)]
        budget = random.randint(100, random.choice((3000, 20_000)))
        check_together(rule, shown, budget, random.choice((None, random.randint(2000, 5000))))


def check_together(rule: TokenRule, shown: list[Size], budget: int, cap: int | None) -> None:
    case = (shown, budget, cap)
    caps = [cap] * len(shown)
    if sum(rule.fewest(*size) for size in shown) > budget:
        with pytest.raises(ImageTokenCap):
            allocate_together(rule, shown, budget, caps)
        return
    allocations = allocate_together(rule, shown, budget, caps)
    assert sum(got.tokens for got in allocations) <= budget, case
    assert cap is None or all(got.tokens <= cap for got in allocations), case
    alone = [rule.allocate(*size, cap) for size in shown]
    if sum(got.tokens for got in alone) <= budget:
        assert allocations == alone, case
    assert allocate_together(rule, shown, None, caps) == alone, case


def test_tokens_unused_by_tiled_images_are_not_given_to_one_image() -> None:
    """Four images share 4000: 1000 each, of which two tiles and a thumbnail use 768. What is left
    is too little for the next step of all three large ones, so none of them is preferred."""
    sizes = [(2000, 1000)] * 3 + [(1000, 500)]
    allocations = allocate_together(INTERNVL, sizes, 4000, [None] * 4)
    assert [got.tokens for got in allocations] == [768, 768, 768, 256]
    allocations = allocate_together(INTERNVL, [*sizes[:2], (1000, 500)], 6000, [None] * 3)
    assert [got.tokens for got in allocations] == [2304, 2304, 768]


# ------------------------------------------------------------------ views


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("size", [(640, 480), (200, 900), (2000, 300), (4000, 3000), (33, 31)])
def test_views_have_all_tokens_and_show_all_of_the_picture(name: str, size: Size) -> None:
    rule = RULES[name]
    full = rule.allocate(*size)
    for cap in (None, (full.tokens + rule.fewest(*size)) // 2):
        allocation = rule.allocate(*size, cap)
        views = rule.views(*size, allocation)
        assert sum(view.tokens for view in views) == allocation.tokens
        for view in views:
            if view.grid is not None and view.kind not in ("tile", "joined"):
                assert math.prod(view.grid) == view.tokens
        tiles = [view for view in views if view.kind == "tile"]
        (left, top, right, bottom) = allocation.region
        for shown in (tiles, [view for view in views if view.kind in ("whole", "overview")]):
            if shown:
                assert min(view.region[0] for view in shown) <= left + 1e-6
                assert min(view.region[1] for view in shown) <= top + 1e-6
                assert max(view.region[2] for view in shown) >= right - 1e-6
                assert max(view.region[3] for view in shown) >= bottom - 1e-6


def test_the_grid_of_a_native_resolution() -> None:
    (view,) = QWEN3.views(640, 480, QWEN3.allocate(640, 480))
    assert (view.kind, view.size, view.grid) == ("whole", (640, 480), (20, 15))
    assert view.region == (0, 0, 640, 480)


def test_internvl_sees_tiles_row_by_row_and_then_the_overview() -> None:
    views = INTERNVL.views(900, 600, INTERNVL.allocate(900, 600))
    assert [view.kind for view in views] == ["tile"] * 6 + ["overview"]
    assert views[1].region == (300, 0, 600, 300)
    assert views[3].region == (0, 300, 300, 600)
    assert views[-1].region == (0, 0, 900, 600)
    assert {view.grid for view in views} == {(16, 16)}


def test_tiles_of_llava_next_reach_beyond_the_picture_where_it_is_padded() -> None:
    views = LLAVA_NEXT.views(500, 300, LLAVA_NEXT.allocate(500, 300))
    assert [view.kind for view in views] == ["overview", "tile", "tile", "joined"]
    assert [view.region for view in views[1:3]] == [(-50, 0, 250, 300), (250, 0, 550, 300)]
    joined = views[-1]
    assert joined.grid == (40, 24)  # 560 of 672 pixels, without the padding
    assert joined.tokens == 40 * 24 + 24


def test_gemma_sees_crops_along_the_longer_side() -> None:
    views = GEMMA3.views(1800, 600, GEMMA3.allocate(1800, 600))
    assert [view.kind for view in views] == ["overview", "crop", "crop", "crop"]
    assert [view.region for view in views[1:]] == [
        (0, 0, 600, 600),
        (600, 0, 1200, 600),
        (1200, 0, 1800, 600),
    ]
    tall = GEMMA3.views(600, 1800, GEMMA3.allocate(600, 1800))
    assert tall[2].region == (0, 600, 600, 1200)
