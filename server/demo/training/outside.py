"""Pictures outside the demo model's world, to which its only answer is what it is.

Half are crops of the photos in scikit-image's wheel, half are scenery made with noise. Some photos
and some kinds of scenery are held out: the evaluation uses only these, training never does.
"""

import random
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops

from server.demo import scenery

# Excluded: plain shapes (horse, phantom, coins, color, logo), writing (page, text), near-plain
# pictures (moon, cell), and a second view of one scene (motorcycle_right).
PHOTOS = {
    "training": (
        "astronaut.png",
        "brick.png",
        "coffee.png",
        "gravel.png",
        "hubble_deep_field.jpg",
        "ihc.png",
        "motorcycle_left.png",
        "retina.jpg",
    ),
    "held out": ("camera.png", "chelsea.png", "grass.png", "rocket.jpg"),
}
_RETINA_INSIDE = (230, 230, 1180, 1180)  # the whole would be a red disc on black
_PHOTO_SIDE = 640  # pixels; a photo's longest side in memory

SCENES: dict[str, tuple[scenery.Painter, ...]] = {
    "training": (
        scenery.clouds,
        scenery.crowd,
        scenery.landscape,
        scenery.portrait,
        scenery.skyline,
        scenery.stone,
        scenery.wood,
    ),
    "held out": (scenery.foliage, scenery.room),
}
_SCENE_SIDE = 288  # pixels; larger scenes are painted at this size and enlarged


def outside(rng: random.Random, width: int, height: int, *, held_out: bool) -> Image.Image:
    """An RGB picture of ``width`` x ``height`` pixels (at least 32 each) from outside the model's
    world.

    Raises ModuleNotFoundError if scikit-image's photos are missing.
    """
    generator = np.random.default_rng(rng.getrandbits(64))
    split = "held out" if held_out else "training"
    if generator.random() < 0.5:
        names = PHOTOS[split]
        photo = _photo(names[int(generator.integers(len(names)))])
        picture = _view(generator, photo, width, height)
    else:
        painters = SCENES[split]
        painter = painters[int(generator.integers(len(painters)))]
        picture = _scene(generator, painter, width, height)
    return _grain(generator, _recolour(generator, picture))


@cache
def _photo(name: str) -> Image.Image:
    # scikit-image is only a folder of files here: importing it takes a second.
    spec = find_spec("skimage")
    for root in (spec and spec.submodule_search_locations) or ():
        path = Path(root) / "data" / name
        if path.is_file():
            break
    else:
        raise ModuleNotFoundError(
            f'no photo {name} in scikit-image; run: pip install -e ".[demo-train]"',
            name="skimage",
        )
    with Image.open(path) as file:
        image = file.convert("RGB")
    if name == "retina.jpg":
        image = image.crop(_RETINA_INSIDE)
    image.thumbnail((_PHOTO_SIDE, _PHOTO_SIDE))
    return image


def _view(rng: np.random.Generator, photo: Image.Image, width: int, height: int) -> Image.Image:
    """A random crop of the photo, often mirrored, at ``width`` x ``height`` pixels."""
    scale = min(photo.width / width, photo.height / height) * rng.uniform(0.55, 1)
    left = rng.uniform(0, photo.width - scale * width)
    top = rng.uniform(0, photo.height - scale * height)
    box = (left, top, left + scale * width, top + scale * height)
    view = photo.resize((width, height), Image.Resampling.BILINEAR, box=box)
    if rng.random() < 0.5:
        view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if rng.random() < 0.1:
        view = view.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    return view


def _scene(
    rng: np.random.Generator, painter: scenery.Painter, width: int, height: int
) -> Image.Image:
    scale = min(1, _SCENE_SIDE / max(width, height))
    picture = painter(rng, max(32, round(height * scale)), max(32, round(width * scale)))
    image = Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8))
    return image.resize((width, height), Image.Resampling.BICUBIC)


def _recolour(rng: np.random.Generator, image: Image.Image) -> Image.Image:
    """Change hue, saturation, the light's colour, contrast and brightness, in one matrix."""
    turn = rng.uniform(-np.pi, np.pi) if rng.random() < 0.2 else rng.normal(0, 0.15)
    grey = np.full((3, 3), 1 / 3)
    cross = np.array(((0, -1, 1), (1, 0, -1), (-1, 1, 0))) / 3**0.5
    hue = np.cos(turn) * (np.eye(3) - grey) + np.sin(turn) * cross
    contrast = rng.uniform(0.7, 1.3)
    light = rng.uniform(0.85, 1.15, (3, 1)) * contrast
    matrix = np.empty((3, 4))
    matrix[:, :3] = light * (grey + rng.uniform(0.3, 1.1) * hue)
    matrix[:, 3] = 128 * (1 - contrast) + rng.uniform(-25, 25)
    return image.convert("RGB", tuple(matrix.ravel().tolist()))


def _grain(rng: np.random.Generator, image: Image.Image) -> Image.Image:
    """Add a sensor's grain of 0 to 12 grey levels."""
    reach = rng.uniform(0, 12)
    levels = [round(128 + reach * (level - 127.5) / 127.5) for level in range(256)]
    grain = Image.frombytes("L", image.size, rng.bytes(image.width * image.height)).point(levels)
    return ImageChops.add(image, Image.merge("RGB", (grain, grain, grain)), offset=-128)
