"""The renderers replace only those methods of vLLM's renderer that they mean to."""

import pytest
from vllm.renderers.hf import HfRenderer
from vllm.renderers.registry import RENDERER_REGISTRY
from vllm.utils.import_utils import resolve_obj_by_qualname

from server.engine.vllm_adapter import other_renderers
from server.engine.vllm_adapter.conversation import ConversationRenderer
from server.engine.vllm_adapter.renderer import MediaRenderer, PooledRenderer, _common_options
from server.errors import ImageTokenCap
from server.imaging.encoded import EncodedImage
from server.imaging.header import ImageHeader
from server.imaging.tokens import TokenAllocation

MEANT = {
    "_render_with_timeout",
    "_tokenize_prompt",
    "get_eos_token_id",
    "render_chat_async",
    "render_messages_async",
}


def test_no_method_of_vllm_is_replaced_by_accident() -> None:
    """A method of ours with the name of one of vLLM's would be called in its place."""
    for ours in (ConversationRenderer, MediaRenderer, PooledRenderer):
        replaced = {name for name in vars(ours) if hasattr(HfRenderer, name)}
        assert {name for name in replaced - MEANT if not name.startswith(("__", "_abc"))} == set()


def test_every_renderer_that_shows_pictures_has_the_image_path() -> None:
    before = dict(RENDERER_REGISTRY.renderers)
    try:
        other_renderers.install()
        for mode, place in RENDERER_REGISTRY.renderers.items():
            if mode not in other_renderers._LEFT:
                assert issubclass(resolve_obj_by_qualname(".".join(place)), MediaRenderer)
    finally:
        RENDERER_REGISTRY.renderers.update(before)


def test_the_image_whose_cap_differs_from_the_first_one_is_named() -> None:
    header = ImageHeader("PNG", 100, 100, 1, False)
    images = [EncodedImage(b"", "", header, path=path) for path in ("first", "second", "third")]
    allocations = [
        TokenAllocation(10, 10, header.size, (0, 0, 100, 100), options={"max_pixels": most})
        for most in (1, 1, 2)
    ]
    with pytest.raises(ImageTokenCap) as refused:
        _common_options(images, allocations, {})
    assert refused.value.param == "third"
