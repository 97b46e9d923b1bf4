"""`POST /v1/images/tokens`: the cost of images in tokens, computed from their headers alone."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from server.engine.token_allocator import image_costs
from server.engine.vllm_http import validate_json_request
from server.errors import ClientError
from server.http.scope import context_of
from server.http.usage import detail
from server.imaging.encoded import ImageOptions, check_size
from server.imaging.tokens import Detail
from server.ingest.load import MediaLoader

router = APIRouter()


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
    `max_image_tokens` is the budget for all images together.
    """

    model_config = ConfigDict(extra="allow")

    images: Annotated[list[ImageSize], Field(max_length=1000)] = []


@router.post("/v1/images/tokens", dependencies=[Depends(validate_json_request)])
async def image_tokens(body: ImageTokensRequest, raw_request: Request) -> dict[str, Any]:
    """Tokens, processed size and KV cache of each image, in the order of the request.

    Nothing is decoded and the model does not run.
    """
    context = context_of(raw_request.scope)
    loader: MediaLoader = raw_request.app.state.loader
    if not context.media and not body.images:
        raise ClientError("the request has no images", param="messages")
    sized, paths = [], []
    for ref in context.media:
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
    engine = raw_request.app.state.engine_client
    costs = await image_costs(engine, sized, paths, context.max_image_tokens)
    rows = [
        {"index": index, **detail(image), "kv_bytes": kv_bytes}
        for index, (image, kv_bytes) in enumerate(costs)
    ]
    return {
        "object": "list",
        "data": rows,
        "usage": {
            "image_tokens": sum(row["tokens"] for row in rows),
            "kv_bytes": sum(row["kv_bytes"] for row in rows),
        },
    }
