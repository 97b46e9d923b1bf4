"""Decoding and preprocessing for one model, inside an image worker.

The features are those of the Hugging Face processor that vLLM would call. For the families with
native resolution (Qwen2-VL to Qwen3-VL), resizing and patchifying are fused here. The fused path is
only used if a check at start-up has shown that it returns the processor's output bit for bit.
"""

import contextlib
import copy
import functools
import importlib
import logging
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import cloudpickle
import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from server.engine.vllm_adapter import plugin
from server.errors import InvalidImage
from server.imaging import pdf, sizing
from server.imaging.convert import ArrayImage
from server.imaging.decode import Decoded, DecodeOptions, OpenAnimation, TargetSize, decode
from server.imaging.reduction import Box, size_of
from server.imaging.tokens import TokenRule
from server.workers.jobs import FindDetail, PictureJob, ProcessJob, decode_kwargs, encode_kwargs
from server.workers.worker import Array, Extractor, Feature, WorkerSpec

if TYPE_CHECKING:
    from vllm.config import ModelConfig
    from vllm.multimodal.processing import BaseMultiModalProcessor

log = logging.getLogger("saccade.images")

# Sizes at which the fused path must equal the processor: above, within and below the usual range.
_CHECK_SIZES = ((640, 480), (2000, 1500), (97, 33), (31, 300))
# The picture with which a resize rule is checked: its size, and that of its cells, in pixels.
_LARGE_SIZE, _CELL = (2400, 1800), 2
# What a loader tells of a video of two frames.
_TWO_FRAMES = {
    "total_num_frames": 2,
    "fps": 1.0,
    "duration": 2.0,
    "video_backend": "opencv",
    "frames_indices": [0, 1],
    "do_sample_frames": False,
}
# Smaller arrays hold sizes and counts, not pixels.
_FEW = 64
# Features are alike if their mean difference is below this share of their standard deviation.
_LIKENESS = 0.5


def worker_spec(
    model_config: "ModelConfig", *, fast: bool, max_pixels: int, **limits: Any
) -> WorkerSpec:
    """The spec with which workers build an `ImageExtractor` of this model. `fast`: decoding may
    shrink pictures; `max_pixels`: the limit for width x height; `limits`: see `WorkerSpec`."""
    model_config = copy.copy(model_config)
    model_config.hf_token = None  # workers must not know any key
    payload = cloudpickle.dumps((model_config, fast, max_pixels))
    return WorkerSpec("server.engine.extractor:load", payload, **limits)


def load(payload: bytes) -> Extractor:
    """Build the extractor; called once, before workers are forked. `payload` is `worker_spec`'s."""
    plugin.make_torchvision_importable()
    torch.set_num_threads(1)  # one picture per process; also, threads do not survive a fork
    from vllm.multimodal import MULTIMODAL_REGISTRY
    from vllm.plugins import load_general_plugins

    load_general_plugins()  # type: ignore[no-untyped-call]
    model_config, fast, max_pixels = cloudpickle.loads(payload)
    processor = MULTIMODAL_REGISTRY.create_processor(model_config)
    return ImageExtractor(processor, fast=fast, max_pixels=max_pixels)


@dataclass(frozen=True)
class _Pipeline:
    """How pictures are processed with one set of processor options.

    `rule` says how far decoding may shrink pictures (None: not at all). `tokens` counts the tokens,
    which shrinking must not change. `patches` is the fused path, if it may be used.
    """

    rule: sizing.ResizeRule | None
    tokens: TokenRule | None = None
    patches: "_NativePatches | None" = None


class ImageExtractor:
    """The `workers.worker.Extractor` for a multimodal processor of vLLM's."""

    def __init__(
        self, processor: "BaseMultiModalProcessor[Any]", *, fast: bool, max_pixels: int
    ) -> None:
        self._processor = processor
        self._fast = fast
        self._max_pixels = max_pixels
        self._pipeline = functools.lru_cache(maxsize=64)(self._build_pipeline)
        self._warm: set[bytes] = set()
        self._import_all()
        # Checked here, before the fork, rather than once in each worker.
        if isinstance(rule := self._pipeline(encode_kwargs({})).rule, sizing.NativeResolution):
            capped = {"min_pixels": rule.factor**2, "max_pixels": rule.max_pixels}
            self._pipeline(encode_kwargs(capped))
        from server.engine.vllm_adapter.processors import configuration_files

        # vLLM loads the processor again for some options, such as those that limit tiles. The caps
        # of the Qwen-VL families are options that it passes with the picture.
        self.files = configuration_files(processor.info.ctx.model_config)
        self.needs_files = not isinstance(rule, sizing.NativeResolution)

    def _import_all(self) -> None:
        """Import what the first picture would import, because workers cannot open files."""
        import torchvision.transforms.v2.functional  # noqa: F401

        import server.engine.token_rules  # noqa: F401

        with contextlib.suppress(Exception):  # the processor may need the whole prompt
            self._processed(Image.new("RGB", (64, 48)), {})
        with contextlib.suppress(ImportError):  # without the library there are no videos
            importlib.import_module("server.imaging.video.frames")
        # What the child process of a video runs.
        importlib.import_module("server.engine.video_extractor")
        self.warm_up_videos({})

    def decode(
        self, data: bytes, job: PictureJob, animation: OpenAnimation | None = None
    ) -> Decoded:
        """Decode a picture to the size and mode of `job`. `Decoded.size` is the size by which the
        processor chooses its output size. `animation` keeps `data` open for its next frame.

        Raises:
            InvalidImage: the picture is damaged, or its size is not `job.size`.
            Otherwise as `imaging.decode.decode` and `imaging.pdf.render`.
        """
        resize = job.resize
        if job.format == "PDF":
            size = job.size if job.crop is not None else resize or job.size
            decoded = Decoded(pdf.render(data, job.frame, size), size)
            resize = resize or (job.size if job.crop is None else size_of(job.crop))
        else:
            options, target = self._decode_options(job), self._target_size(job)
            decoded = decode(data, options, target, animation)
            if decoded.size != job.size:
                raise InvalidImage("the image does not have the size in its header")
        if job.crop is not None:
            decoded = _cropped(decoded, job.crop)
        if resize is None:
            return decoded
        if self._fused(decoded.image, job) is not None:
            return Decoded(decoded.image, resize)  # `features` resizes it
        return Decoded(_resized(decoded.image, resize), resize)

    def _decode_options(self, job: PictureJob) -> DecodeOptions:
        return DecodeOptions(job.io.image_mode, job.io.background, self._max_pixels, job.frame)

    def _target_size(self, job: PictureJob) -> TargetSize | None:
        """How far decoding may shrink the picture; None: not at all."""
        if job.crop is not None or not (self._fast or isinstance(job, FindDetail)):
            return None
        if job.resize is not None:
            return lambda width, height: job.resize
        if not isinstance(job, ProcessJob):
            return None
        pipeline = self._pipeline(job.kwargs)
        if pipeline.rule is None:
            return None
        return functools.partial(_reducible, pipeline.rule, pipeline.tokens)

    def features(self, decoded: Decoded, job: ProcessJob) -> dict[str, Feature]:
        """The fields that vLLM's processor returns for one picture, by name."""
        patches = self._fused(decoded.image, job)
        features = patches.features(decoded.image, decoded.size) if patches is not None else None
        return features or self._processed(decoded.image, decode_kwargs(job.kwargs))

    def warm_up_videos(self, kwargs: Mapping[str, Any]) -> None:
        """Import and load what a video with these options needs, while files can be opened."""
        encoded = encode_kwargs(kwargs)
        if encoded in self._warm:
            return
        frames = np.zeros((2, 64, 64, 3), np.uint8)
        with contextlib.suppress(Exception):  # the model may take no videos, or no such options
            self.video_features(frames, _TWO_FRAMES, kwargs)
        self._warm.add(encoded)

    def video_features(
        self, frames: npt.NDArray[np.uint8], metadata: Mapping[str, Any], kwargs: Mapping[str, Any]
    ) -> dict[str, Feature]:
        """The fields that vLLM's processor returns for one video, uint8 (frames, height, width, 3),
        by name."""
        from server.engine.vllm_adapter.processors import video_processed  # imports vLLM

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outputs, fields = video_processed(self._processor, frames, metadata, kwargs)
        return {name: _export(outputs[name]) for name in fields if outputs.get(name) is not None}

    def _fused(self, image: Image.Image, job: PictureJob) -> "_NativePatches | None":
        if not isinstance(job, ProcessJob) or image.mode != "RGB":
            return None
        return self._pipeline(job.kwargs).patches

    def _processed(self, image: Image.Image, kwargs: Mapping[str, Any]) -> dict[str, Feature]:
        from server.engine.vllm_adapter.processors import processed  # imports vLLM: see `load`

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the processor's deprecations, once per picture
            outputs, fields = processed(self._processor, image, kwargs)
        return {name: _export(outputs[name]) for name in fields if outputs.get(name) is not None}

    # ------------------------------------------------------------------ pipelines

    def _build_pipeline(self, encoded_kwargs: bytes) -> _Pipeline:
        kwargs = decode_kwargs(encoded_kwargs)
        image_processor = getattr(self._processor.info.get_hf_processor(), "image_processor", None)
        if image_processor is None:
            return _Pipeline(None)
        merged = _flat(self._processor.info.ctx.get_merged_mm_kwargs(kwargs))
        rule = _rule(image_processor, merged)
        if isinstance(rule, sizing.NativeResolution):
            patches = _NativePatches.of(image_processor, rule)
            if patches is not None and self._equals_processor(patches, kwargs):
                return _Pipeline(rule, patches=patches)
            return _Pipeline(None)  # without a successful check, the processor does the work
        if rule is None:
            return _Pipeline(None)
        from server.engine.token_rules import token_rule  # imports vLLM: see `load`

        tokens = token_rule(self._processor, kwargs)
        return _Pipeline(rule if self._tolerates_reduction(rule, tokens, kwargs) else None, tokens)

    def _tolerates_reduction(
        self, rule: sizing.ResizeRule, tokens: TokenRule | None, kwargs: Mapping[str, Any]
    ) -> bool:
        """Whether the processor returns nearly the same for a large picture and a reduced one.

        The attributes of an image processor may be misleading: if another component cuts tiles,
        they have the size of one tile, and reduction would lose detail that the tiles show.
        """
        width, height = _LARGE_SIZE
        cells = np.random.default_rng(0).integers(
            0, 256, (height // _CELL, width // _CELL, 3), dtype=np.uint8
        )
        image = Image.fromarray(cells.repeat(_CELL, axis=0).repeat(_CELL, axis=1))
        scale = sizing.jpeg_scale(_LARGE_SIZE, _reducible(rule, tokens, width, height))
        if scale == 1:
            return True
        whole = self._processed(image, kwargs)
        reduced = self._processed(image.reduce(scale), kwargs)
        return all(_near(reduced.get(name), value) for name, value in whole.items())

    def _equals_processor(self, patches: "_NativePatches", kwargs: Mapping[str, Any]) -> bool:
        random = np.random.default_rng(0)
        for width, height in _CHECK_SIZES:
            noise = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
            image = Image.fromarray(noise)
            ours = patches.features(image, image.size)
            if ours is None or not _same(ours, self._processed(image, kwargs)):
                log.info("fused preprocessing differs from this model's processor; not using it")
                return False
        return True


@dataclass(frozen=True)
class _NativePatches:
    """The resize and patchify steps of the Qwen2-VL image processor, fused.

    Pixels stay uint8; vLLM normalises them on the device. A row of `pixel_values` is one patch:
    channels x `temporal` x `patch` x `patch`. Rows are ordered so that the `merge` x `merge`
    patches of one token are consecutive.
    """

    rule: sizing.NativeResolution
    patch: int
    merge: int
    temporal: int

    @classmethod
    def of(cls, image_processor: Any, rule: sizing.NativeResolution) -> "_NativePatches | None":
        if getattr(image_processor, "resample", None) != Image.Resampling.BICUBIC:
            return None
        return cls(
            rule,
            image_processor.patch_size,
            image_processor.merge_size,
            image_processor.temporal_patch_size,
        )

    def features(self, image: Image.Image, size: sizing.Size) -> dict[str, Feature] | None:
        """`pixel_values`, uint8 (patches, patch bytes), and `image_grid_thw`, int64 (1, 3): frames,
        rows and columns of patches. None if the processor refuses the size.

        `size` is the full (width, height), by which the processor would choose the grid.
        """
        target = self.rule.target(*size)
        if target is None:
            return None
        width, height = target
        pixels = _resize(np.asarray(image), height, width)
        rows, columns = height // self.patch, width // self.patch
        merge, patch = self.merge, self.patch
        # A line of a patch is copied as one item, and whole patches for the other frames.
        line = np.dtype((np.void, patch))
        shape = (3, rows // merge, merge, patch, columns // merge, merge)
        source = pixels.view(line).reshape(shape).transpose(1, 4, 2, 5, 0, 3)
        out = np.empty(
            (rows // merge, columns // merge, merge, merge, 3, self.temporal, patch, patch),
            np.uint8,
        )
        out.view(line)[..., 0, :, 0] = source
        out[..., 1:, :, :] = out[..., :1, :, :]
        grid = np.array([[1, rows, columns]], np.int64)
        return {
            "pixel_values": Array("uint8", out.reshape(rows * columns, -1)),
            "image_grid_thw": Array("int64", grid),
        }


def _cropped(decoded: Decoded, box: Box) -> Decoded:
    """The part `box` of the picture, whose pixels may be smaller than those of `box`."""
    image, (width, height) = decoded.image, decoded.size
    across, down = image.width / width, image.height / height
    scaled = (box[0] * across, box[1] * down, box[2] * across, box[3] * down)
    left, top, right, bottom = map(round, scaled)
    right, bottom = max(right, left + 1), max(bottom, top + 1)
    if image.mode == "RGB":
        pixels = np.ascontiguousarray(np.asarray(image)[top:bottom, left:right])
        part: Image.Image = ArrayImage(pixels)
    else:
        part = image.crop((left, top, right, bottom))
    return Decoded(part, size_of(box))


def resized(frame: npt.NDArray[np.uint8], size: sizing.Size) -> npt.NDArray[np.uint8]:
    """Resize uint8 (height, width, 3) bicubically to (width, height)."""
    return _resize(frame, size[1], size[0]).transpose(1, 2, 0)


def _resize(pixels: npt.NDArray[np.uint8], height: int, width: int) -> npt.NDArray[np.uint8]:
    """Resize uint8 (height, width, 3) bicubically with antialiasing, as the processor's backend
    does; returns uint8 (3, height, width)."""
    import torchvision.transforms.v2.functional as tv

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's buffer is read-only, which does no harm here
        planes = torch.from_numpy(pixels).permute(2, 0, 1)
    if planes.shape[1:] != (height, width):
        planes = tv.resize(
            planes, [height, width], interpolation=tv.InterpolationMode.BICUBIC, antialias=True
        )
    resized: npt.NDArray[np.uint8] = planes.contiguous().numpy()
    return resized


def _resized(image: Image.Image, size: sizing.Size) -> Image.Image:
    """Resize a picture bicubically to (width, height)."""
    if image.size == size:
        return image
    if image.mode != "RGB":
        return image.resize(size, Image.Resampling.BICUBIC)
    planes = _resize(np.asarray(image), size[1], size[0])
    return Image.fromarray(np.ascontiguousarray(planes.transpose(1, 2, 0)))


def _reducible(
    rule: sizing.ResizeRule, tokens: TokenRule | None, width: int, height: int
) -> sizing.Size | None:
    """The rule's target size; None if shrinking to it would change the tokens or the grid."""
    target = rule.target(width, height)
    scale = sizing.jpeg_scale((width, height), target)
    reduced = (-(-width // scale), -(-height // scale))
    if tokens is None:
        same = sizing.covers(rule, (width, height), reduced)
    else:
        whole, less = tokens.allocate(width, height), tokens.allocate(*reduced)
        same = (whole.tokens, whole.prompt_tokens) == (less.tokens, less.prompt_tokens)
    return target if same else None


def _rule(image_processor: Any, kwargs: Mapping[str, Any]) -> sizing.ResizeRule | None:
    """The resize rule of an image processor, from its attributes and options; None if unknown."""
    size = dict(getattr(image_processor, "size", None) or {})
    size = {name: value for name, value in size.items() if value is not None}
    override = kwargs.get("size")
    if not getattr(image_processor, "do_resize", True) or kwargs.get("do_resize") is False:
        return None
    size |= override or {}
    if hasattr(image_processor, "merge_size") and hasattr(image_processor, "temporal_patch_size"):
        least = kwargs.get("min_pixels") or size.get("shortest_edge")
        most = kwargs.get("max_pixels") or size.get("longest_edge")
        if not least or not most:
            return None
        factor = image_processor.patch_size * image_processor.merge_size
        return sizing.NativeResolution(factor, least, most)
    if set(kwargs) - {"size"}:  # an unknown option may change the rule
        return None
    if pinpoints := getattr(image_processor, "image_grid_pinpoints", None):
        return sizing.BestGrid(sizing.grids(pinpoints))
    if getattr(image_processor, "do_image_splitting", False) and "longest_edge" in size:
        return sizing.LongestEdge(size["longest_edge"])
    tiled = ("crop_to_patches", "do_pan_and_scan", "max_patches", "do_image_splitting")
    if any(getattr(image_processor, name, None) for name in tiled):
        return None
    if set(size) == {"height", "width"}:
        return sizing.FixedSize(size["width"], size["height"])
    if set(size) == {"shortest_edge"}:
        return sizing.ShortestEdge(size["shortest_edge"])
    return None


def _flat(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Processor options, with those in the scope `images_kwargs` at the top level."""
    flat = {name: value for name, value in kwargs.items() if not name.endswith("_kwargs")}
    return flat | dict(kwargs.get("images_kwargs") or {})


def _export(value: Any) -> Feature:
    """An output of the processor as a feature. Tensors become arrays over the same memory; lists
    stay lists."""
    if isinstance(value, torch.Tensor):
        tensor = value.detach().contiguous()
        dtype = str(tensor.dtype).removeprefix("torch.")
        if tensor.dtype == torch.bfloat16:
            tensor = tensor.view(torch.uint16)
        return Array(dtype, tensor.numpy())
    if isinstance(value, np.ndarray):
        return Array(value.dtype.name, np.ascontiguousarray(value))
    if isinstance(value, list | tuple):
        return [_export(item) for item in value]
    if isinstance(value, int | float | str | None):
        return value
    raise InvalidImage(f"the image processor returned an unsupported type: {type(value).__name__}")


def _near(ours: Feature, theirs: Feature) -> bool:
    """Whether two arrays have the same shape and differ by a small share of their spread."""
    if not isinstance(ours, Array) or not isinstance(theirs, Array):
        return ours == theirs
    if ours.dtype != theirs.dtype or ours.data.shape != theirs.data.shape:
        return False
    if theirs.data.dtype.kind != "f" or theirs.data.size < _FEW:
        return True
    difference = np.abs(ours.data.astype(np.float32) - theirs.data.astype(np.float32)).mean()
    return bool(difference < _LIKENESS * theirs.data.astype(np.float32).std())


def _same(ours: Mapping[str, Feature], theirs: Mapping[str, Feature]) -> bool:
    """Whether the features are arrays that are equal bit for bit."""
    if ours.keys() != theirs.keys():
        return False
    for name, value in ours.items():
        other = theirs[name]
        if not isinstance(value, Array) or not isinstance(other, Array):
            return False
        if value.dtype != other.dtype or not np.array_equal(value.data, other.data):
            return False
    return True
