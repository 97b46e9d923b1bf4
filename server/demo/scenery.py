"""Natural-looking pictures made with noise: landscapes, faces, rooms, textures and the like.

Each painter takes a generator, a height and a width in pixels (both at least 32) and returns
RGB as floats of shape (height, width, 3) in 0..255; values may lie a little outside.
"""

from collections.abc import Callable
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

Array = NDArray[np.floating]
T = TypeVar("T")
Colour = tuple[int, int, int]
Painter = Callable[[np.random.Generator, int, int], Array]

_SKIN = ((244, 214, 190), (224, 178, 142), (188, 132, 96), (134, 86, 58), (84, 54, 40))
_HAIR = ((28, 22, 20), (76, 48, 30), (150, 104, 56), (206, 172, 110), (150, 150, 150))
_LEAVES = ((24, 44, 16), (56, 92, 30), (104, 140, 50), (164, 176, 84), (176, 104, 36))
_WOOD = ((70, 40, 22), (120, 76, 42), (166, 116, 70), (196, 156, 108))
_STONE = ((84, 82, 80), (126, 120, 112), (168, 164, 158), (110, 120, 110), (150, 116, 92))
_SKIES = (
    ((60, 110, 180), (190, 215, 235)),
    ((40, 46, 90), (250, 160, 90)),
    ((110, 120, 135), (215, 215, 215)),
    ((70, 60, 110), (245, 190, 180)),
    ((16, 20, 44), (70, 80, 120)),
)
_GROUNDS = ((52, 76, 40), (98, 104, 52), (120, 98, 62), (70, 74, 82), (210, 214, 222))


def landscape(rng: np.random.Generator, height: int, width: int) -> Array:
    """A sky with a sun, ridges of hills that fade with distance, often water that mirrors them."""
    rows = _rows(height, width)
    top, low = _pick(rng, _SKIES)
    horizon = rng.uniform(0.4, 0.7)
    picture = _ramp(rows / horizon + 0.3 * (noise(rng, height, width, 3) - 0.5), (top, low))
    sun = (rng.uniform(0.1, 0.9), rng.uniform(0.05, horizon))
    picture += _glow(height, width, sun, rng.uniform(0.03, 0.08))[..., None] * (90, 80, 50)
    ground = np.array(_vary(rng, _pick(rng, _GROUNDS)))
    grass = noise(rng, height, width, 12, 4)
    layers = int(rng.integers(2, 5))
    for layer in range(layers):
        near = (layer + 1) / layers
        ridge = noise(rng, 2, width, 3, 5)[0]
        line = horizon * (0.75 + 0.35 * near) + 0.25 * (0.5 - ridge)
        colour = near * ground + (1 - near) * np.array(low) * 0.8
        shade = 1 + (grass - 0.5) * 1.2 * near
        _where(picture, rows > line[None, :], shade[..., None] * colour)
    if rng.random() < 0.5:
        shore = int(height * rng.uniform(0.6, 0.8))
        depth = height - shore
        ripple = (noise(rng, depth, width, 6, 4, stretch=4) - 0.5) * depth * 0.5
        source = np.clip(shore - 1 - np.arange(depth)[:, None] - ripple, 0, shore - 1)
        mirrored = picture[source.astype(np.intp), np.arange(width)[None, :]]
        picture[shore:] = 0.7 * mirrored + 0.3 * np.array((40, 70, 90), np.float32)
    return picture


def clouds(rng: np.random.Generator, height: int, width: int) -> Array:
    """Clouds before a sky."""
    top, low = _pick(rng, _SKIES)
    sky = _ramp(_rows(height, width), (top, low))
    field = noise(rng, height, width, 3, 6, stretch=rng.uniform(0.4, 1))
    cover = np.clip((field - rng.uniform(0.35, 0.5)) * rng.uniform(3, 6), 0, 1)[..., None]
    lit = 110 + 145 * noise(rng, height, width, 5, 4)[..., None]
    picture: Array = sky * (1 - cover) + lit * cover
    return picture


def portrait(rng: np.random.Generator, height: int, width: int) -> Array:
    """The head and shoulders of a person, out of focus, before a blurred background."""
    colours = [_colour(rng) for _ in range(4)]
    image = _image(_ramp(noise(rng, height, width, 3, 3), colours))
    image = image.filter(ImageFilter.GaussianBlur(height / 40))
    size = min(height, width) * rng.uniform(0.5, 0.95)
    _person(rng, ImageDraw.Draw(image), width * rng.uniform(0.35, 0.65), height * 0.45, size)
    image = image.filter(ImageFilter.GaussianBlur(size / rng.uniform(40, 120)))
    light = _glow(height, width, (rng.uniform(0, 1), rng.uniform(0, 0.5)), 0.6)
    return _array(image) * (0.55 + 0.5 * light + 0.3 * noise(rng, height, width, 8, 4))[..., None]


def crowd(rng: np.random.Generator, height: int, width: int) -> Array:
    """Rows of people, smaller and higher up in the distance."""
    image = _image(_ramp(noise(rng, height, width, 6, 4), [_colour(rng) for _ in range(3)]))
    draw = ImageDraw.Draw(image)
    for far in np.sort(rng.uniform(0.15, 1, int(rng.integers(25, 60)))):
        size = min(height, width) * 0.4 * float(far)
        _person(rng, draw, float(rng.uniform(0, width)), height * float(far), size)
    image = image.filter(ImageFilter.GaussianBlur(height / 250))
    return _array(image) * (0.6 + 0.8 * noise(rng, height, width, 5, 6))[..., None]


def wood(rng: np.random.Generator, height: int, width: int) -> Array:
    """Planks of wood, upright or lying."""
    upright = rng.random() < 0.5
    rows, columns = (height, width) if upright else (width, height)
    across = np.linspace(0, 1, columns, dtype=np.float32)[None, :]
    plank = (across * rng.integers(2, 7)).astype(np.intp)
    tones = rng.uniform(-0.2, 0.2, 8).astype(np.float32)[plank]
    bend = noise(rng, rows, columns, 3, 3, stretch=0.3) + rng.uniform(0, 9, 8)[plank]
    rings = np.sin(across * rng.uniform(20, 60) + bend * rng.uniform(6, 16))
    grain = noise(rng, rows, columns, 24, 3, stretch=0.08)
    seam = np.diff(plank, axis=1, prepend=plank[:, :1]) > 0
    field = 0.5 + 0.15 * rings + 0.6 * (grain - 0.5) + tones - 0.5 * seam
    picture = _ramp(field, [_vary(rng, colour) for colour in _WOOD])
    return picture if upright else picture.transpose(1, 0, 2)


def stone(rng: np.random.Generator, height: int, width: int) -> Array:
    """Rock or marble with veins."""
    vein = 1 - np.abs(2 * noise(rng, height, width, 4, 5, stretch=rng.uniform(0.4, 1.5)) - 1)
    field = 0.6 * noise(rng, height, width, 12, 5) + 0.5 * vein ** rng.uniform(3, 12)
    return _ramp(field, [_vary(rng, _pick(rng, _STONE)) for _ in range(4)])


def skyline(rng: np.random.Generator, height: int, width: int) -> Array:
    """A city at night: rows of towers with lit windows before a glowing sky."""
    haze = _vary(rng, _pick(rng, ((60, 50, 80), (90, 60, 50), (30, 50, 80))))
    picture = _ramp(_rows(height, width), ((6, 8, 20), haze))
    picture *= (0.6 + 0.8 * noise(rng, height, width, 3, 4))[..., None]
    pane = max(2, height // int(rng.integers(45, 90)))
    for near in (0.3, 0.6, 1.0):
        left = 0
        while left < width:
            span = int(width * rng.uniform(0.05, 0.16)) + 3
            top = int(height * (rng.uniform(0.15, 0.55) + 0.25 * near))
            tower = picture[top:, left : left + span]
            rows, columns = tower.shape[:2]
            tower[:] = np.array(haze, np.float32) * (1 - 0.75 * near) * rng.uniform(0.6, 1.1)
            grid = rng.random((rows // pane // 2 + 1, columns // pane // 2 + 1))
            lit = np.where(grid < rng.uniform(0.15, 0.7), rng.uniform(0.3, 1, grid.shape), 0)
            panes = np.kron(lit, ((0, 0), (0, 1))).repeat(pane, 0).repeat(pane, 1)
            lamp = _pick(rng, ((250, 220, 150), (255, 190, 100), (200, 220, 250)))
            tower += panes[:rows, :columns, None] * np.array(lamp, np.float32) * (0.3 + 0.6 * near)
            left += span + int(rng.integers(0, max(2, width // 25)))
    return picture


def foliage(rng: np.random.Generator, height: int, width: int) -> Array:
    """Leaves over leaves, brighter towards the front."""
    image = _image(_ramp(noise(rng, height, width, 8, 4), _LEAVES[:2]))
    draw = ImageDraw.Draw(image)
    count = int(rng.integers(150, 450))
    palette = np.array([_pick(rng, _LEAVES) for _ in range(3)])
    length = min(height, width) * rng.uniform(0.5, 1.2) / count**0.5
    turns = rng.normal(rng.uniform(0, 6.3), 0.8, count)
    sizes = length * rng.uniform(0.5, 1.5, count)
    middles = rng.uniform(0, 1, (count, 2)) * (width, height)
    for n, (turn, size, (x, y)) in enumerate(zip(turns, sizes, middles, strict=True)):
        along = np.array((np.cos(turn), np.sin(turn))) * size
        beside = np.array((-along[1], along[0])) * 0.35
        corners = [along, 0.3 * along + beside, -along, 0.3 * along - beside]
        light = (0.4 + 0.8 * n / count) * rng.uniform(0.7, 1.3)
        fill = _clip(palette[n % 3] * light)
        draw.polygon([(x + dx, y + dy) for dx, dy in corners], fill=fill)
    return _array(image) * (0.5 + noise(rng, height, width, 5, 6))[..., None]


def room(rng: np.random.Generator, height: int, width: int) -> Array:
    """A room seen along its length: a window, boards, furniture, light that falls off."""
    wall, floor = _vary(rng, (190, 180, 165)), _vary(rng, _pick(rng, _WOOD))
    left, right = sorted(rng.uniform((0.15, 0.6), (0.4, 0.85)) * width)
    top, low = rng.uniform((0.1, 0.5), (0.3, 0.7)) * height
    image = Image.new("RGB", (width, height), wall)
    draw = ImageDraw.Draw(image)
    far = [(left, top), (right, top), (right, low), (left, low)]
    near = [(0, 0), (width, 0), (width, height), (0, height)]
    for side, (base, light) in enumerate(((wall, 1.2), (wall, 0.75), (floor, 1), (wall, 0.6))):
        after = (side + 1) % 4
        fill = _clip(np.array(base) * light)
        draw.polygon([near[side], near[after], far[after], far[side]], fill=fill)
    for end in np.linspace(-1, 2, 16):
        seam = _clip(np.array(floor) * 0.7)
        draw.line([(left + (right - left) * (end + 1) / 3, low), (width * end, height)], seam, 1)
    across, down = (right - left) * rng.uniform(0.2, 0.3), (low - top) * rng.uniform(0.2, 0.3)
    x, y = (left + right) / 2 + across * rng.uniform(-1, 1), top + (low - top) * 0.4
    draw.rectangle((x - across, y - down, x + across, y + down), (225, 235, 245), seam, 2)
    draw.line((x, y - down, x, y + down), seam, 2)
    for _ in range(int(rng.integers(2, 5))):
        x, y = rng.uniform((0, 0.7), (0.8, 0.95)) * (width, height)
        w, h = rng.uniform(0.12, 0.35) * width, rng.uniform(0.1, 0.3) * height
        lean, rise = (width / 2 - x) * 0.15, h * 0.3
        tone = np.array(_colour(rng)) * 0.7
        draw.rectangle((x, y - h, x + w, y), _clip(tone))
        lid = [(x, y - h), (x + w, y - h), (x + w + lean, y - h - rise), (x + lean, y - h - rise)]
        draw.polygon(lid, _clip(tone * 1.4))
    glow = _glow(height, width, ((left + right) / 2 / width, 0.4), 0.5)
    return _array(image) * (0.35 + 0.6 * glow + 0.4 * noise(rng, height, width, 6, 6))[..., None]


def noise(
    rng: np.random.Generator,
    height: int,
    width: int,
    cells: int,
    octaves: int = 4,
    *,
    stretch: float = 1,
) -> Array:
    """Fractal noise of shape (height, width) in 0..1 with ``cells`` coarse cells across.

    ``stretch`` is the number of cells down over the number across.
    """
    down, across = max(2, round(cells * stretch)), cells
    field = rng.random((down, across), np.float32)
    for octave in range(1, octaves):
        if across * 2 > 2 * width or down * 2 > 2 * height:
            break
        down, across = down * 2, across * 2
        field = _resized(field, down, across)
        field = field + rng.random((down, across), np.float32) * 0.55**octave
    field = _resized(field, height, width)
    low, high = field.min(), field.max()
    scaled: Array = (field - low) / (high - low)
    return scaled


def _person(
    rng: np.random.Generator, draw: ImageDraw.ImageDraw, x: float, y: float, size: float
) -> None:
    """Draw a head at (x, y) and shoulders below; ``size`` is about their height, in pixels."""
    head, skin = size * 0.22, _vary(rng, _pick(rng, _SKIN))
    hair, shadow = _vary(rng, _pick(rng, _HAIR)), _clip(np.array(skin) * 0.7)
    wide, fall = rng.uniform(1.05, 1.3), rng.uniform(0.2, 1.6)

    def blob(dx: float, dy: float, rx: float, ry: float, fill: Colour) -> None:
        cx, cy = x + dx * head, y + dy * head
        draw.ellipse((cx - rx * head, cy - ry * head, cx + rx * head, cy + ry * head), fill)

    blob(0, fall - 0.9, wide, wide + fall * 0.5, hair)
    blob(0, 3.9, rng.uniform(1.9, 2.4), 2.5, _colour(rng))
    blob(0, 1.2, 0.42, 0.6, shadow)
    blob(0, 0, 0.85, 1.15, skin)
    blob(0, -0.95, 0.8, rng.uniform(0.2, 0.45), hair)
    for side in (-0.35, 0.35):
        blob(side, -0.3, 0.17, 0.05, hair)
        blob(side, -0.1, 0.14, 0.08, (40, 30, 28))
    blob(0, 0.25, 0.12, 0.18, shadow)
    blob(0, 0.62, 0.3, rng.uniform(0.05, 0.12), _clip(np.array(skin) * (0.8, 0.5, 0.5)))


def _rows(height: int, width: int) -> Array:
    """Each pixel's distance from the top, 0..1, of shape (height, width)."""
    rows = np.linspace(0, 1, height, dtype=np.float32)[:, None]
    return np.broadcast_to(rows, (height, width))


def _glow(height: int, width: int, at: tuple[float, float], radius: float) -> Array:
    """Light of shape (height, width) in 0..1 around ``at``; lengths are fractions of a side."""
    x = np.linspace(0, 1, width, dtype=np.float32)[None, :] - np.float32(at[0])
    y = np.linspace(0, 1, height, dtype=np.float32)[:, None] - np.float32(at[1])
    return np.float32(1) / (1 + (x * x + y * y) / np.float32(radius * radius))


def _ramp(field: Array, colours: object) -> Array:
    """RGB of shape (height, width, 3): ``field`` 0..1 through equally spaced colours."""
    stops = np.asarray(colours, np.float32)
    at, steps = np.linspace(0, 1, len(stops)), np.linspace(0, 1, 256)
    table = np.stack([np.interp(steps, at, stops[:, c]) for c in range(3)], 1).astype(np.float32)
    return table[np.clip(field * 255, 0, 255).astype(np.uint8)]


def _where(picture: Array, mask: NDArray[np.bool_], values: Array) -> None:
    np.copyto(picture, values, where=mask[..., None], casting="same_kind")


def _resized(field: Array, height: int, width: int) -> Array:
    return np.asarray(Image.fromarray(field).resize((width, height), Image.Resampling.BICUBIC))


def _pick(rng: np.random.Generator, choices: tuple[T, ...]) -> T:
    return choices[int(rng.integers(len(choices)))]


def _colour(rng: np.random.Generator) -> Colour:
    return _clip(rng.uniform(20, 235) + rng.normal(0, 35, 3))


def _vary(rng: np.random.Generator, colour: Colour) -> Colour:
    return _clip(np.array(colour) * rng.uniform(0.8, 1.2) + rng.normal(0, 8, 3))


def _clip(colour: Array) -> Colour:
    red, green, blue = np.clip(colour, 0, 255).astype(int).tolist()
    return red, green, blue


def _image(picture: Array) -> Image.Image:
    return Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8))


def _array(image: Image.Image) -> Array:
    return np.asarray(image, np.float32)
