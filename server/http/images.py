"""`POST /v1/images/tokens`: the cost of images and videos, computed from their headers alone."""

import asyncio
from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from server.engine.token_allocator import patch_size
from server.engine.video_costs import encoded_videos, media_costs
from server.engine.vllm_http import validate_json_request
from server.errors import ClientError
from server.http.scope import context_of
from server.http.usage import detail, video_detail, view_detail
from server.imaging.encoded import ImageOptions, check_size
from server.imaging.tokens import Detail
from server.imaging.video.encoded import EncodedVideo
from server.ingest.load import MediaLoader
from server.request.media import MediaLimits, MediaRef

router = APIRouter()

# A picture may have dozens of views.
_MOST_IMAGES_WITH_VIEWS = 64


class ImageSize(BaseModel):
    """An image given by its size only: `width` and `height` of the upright image, in pixels."""

    model_config = ConfigDict(extra="forbid")

    width: PositiveInt
    height: PositiveInt
    detail: Detail = "auto"
    max_tokens: PositiveInt | None = None


class ImageTokensRequest(BaseModel):
    """Images as parts of `messages` (or of `input`), as sizes in `images`, or both.

    Messages may have the form of any API that takes images; their texts are ignored.
    `max_image_tokens` is the budget for all images together. With `include_views`, the answer tells
    what the encoder sees: its tiles, and the grid of tokens.
    """

    model_config = ConfigDict(extra="allow")

    images: Annotated[list[ImageSize], Field(max_length=1000)] = []
    include_views: bool = False


async def _videos(engine: Any, refs: Sequence[MediaRef], limits: MediaLimits) -> list[EncodedVideo]:
    if not refs:
        return []
    return await asyncio.to_thread(encoded_videos, engine, refs, limits.max_shown_frames)


@router.post("/v1/images/tokens", dependencies=[Depends(validate_json_request)])
async def image_tokens(body: ImageTokensRequest, raw_request: Request) -> dict[str, Any]:
    """Tokens, processed size and KV cache of each image, in the order of the request; the same of
    each video under `videos`, with its frames.

    Nothing is decoded and the model does not run.
    """
    context = context_of(raw_request.scope)
    loader: MediaLoader = raw_request.app.state.loader
    if not context.media and not body.images:
        raise ClientError("the request has no images", param="messages")
    engine = raw_request.app.state.engine_client
    refs = [ref for ref in context.media if ref.kind == "video"]
    videos = await _videos(engine, refs, loader.limits)
    sized, paths = [], []
    for ref in context.media:
        if ref.kind == "video":
            continue
        if not ref.images:
            raise ClientError(f"a {ref.kind} part has no image tokens", param=ref.path)
        sized += [(image.size, image.options) for image in ref.images]
        paths += [image.path for image in ref.images]
    for index, named in enumerate(body.images):
        size, path = (named.width, named.height), f"images[{index}]"
        try:
            check_size(size, loader.limits.image)
        except ClientError as error:
            error.param = path
            raise
        sized.append((size, ImageOptions(named.detail, named.max_tokens)))
        paths.append(path)
    if body.include_views and len(sized) > _MOST_IMAGES_WITH_VIEWS:
        raise ClientError(
            f"include_views is for at most {_MOST_IMAGES_WITH_VIEWS} images", param="include_views"
        )
    costs, clips = await media_costs(
        engine, sized, paths, videos, context.max_image_tokens, with_views=body.include_views
    )
    rows: list[dict[str, Any]] = [
        {
            "index": index,
            **detail(cost.shown),
            "prompt_tokens": cost.prompt_tokens,
            "kv_bytes": cost.kv_bytes,
        }
        for index, cost in enumerate(costs)
    ]
    if body.include_views:
        patch = patch_size(engine)
        for row, cost in zip(rows, costs, strict=True):
            row |= {"patch_size": patch, "views": list(map(view_detail, cost.views))}
    video_rows = [
        {
            "index": index,
            **video_detail(cost.shown),
            "prompt_tokens": cost.prompt_tokens,
            "kv_bytes": cost.kv_bytes,
        }
        for index, cost in enumerate(clips)
    ]
    usage = {
        "image_tokens": sum(row["tokens"] for row in rows),
        "kv_bytes": sum(row["kv_bytes"] for row in (*rows, *video_rows)),
    }
    answer = {"object": "list", "data": rows, "usage": usage}
    if video_rows:
        usage["video_tokens"] = sum(row["tokens"] for row in video_rows)
        answer["videos"] = video_rows
    return answer
