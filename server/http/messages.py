"""`POST /v1/messages` and its count of tokens, on vLLM's serving class.

vLLM's own routes make a 500 of every error that is raised below them.
"""

from http import HTTPStatus

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from server.engine.vllm_http import (
    AnthropicCountTokensRequest,
    AnthropicMessagesRequest,
    AnthropicMessagesResponse,
    AnthropicServingMessages,
    ErrorResponse,
    load_aware_call,
    validate_json_request,
    with_cancellation,
)

router = APIRouter(prefix="/v1/messages", dependencies=[Depends(validate_json_request)])


@router.post("", responses={HTTPStatus.OK.value: {"content": {"text/event-stream": {}}}})
@with_cancellation  # type: ignore[untyped-decorator]
@load_aware_call  # type: ignore[untyped-decorator]
async def create_message(request: AnthropicMessagesRequest, raw_request: Request) -> Response:
    """Answer a conversation in Anthropic's dialect, whole or streamed."""
    answer = await _serving(raw_request).create_messages(request, raw_request)
    if isinstance(answer, ErrorResponse):
        return JSONResponse(answer.model_dump(), status_code=answer.error.code)
    if isinstance(answer, AnthropicMessagesResponse):
        return JSONResponse(answer.model_dump(exclude_none=True))
    return StreamingResponse(answer, media_type="text/event-stream")


@router.post("/count_tokens")
@with_cancellation  # type: ignore[untyped-decorator]
@load_aware_call  # type: ignore[untyped-decorator]
async def count_tokens(request: AnthropicCountTokensRequest, raw_request: Request) -> Response:
    """The tokens that a conversation would take."""
    answer = await _serving(raw_request).count_tokens(request, raw_request)
    if isinstance(answer, ErrorResponse):
        return JSONResponse(answer.model_dump(), status_code=answer.error.code)
    return JSONResponse(answer.model_dump(exclude_none=True))


def _serving(raw_request: Request) -> AnthropicServingMessages:
    serving: AnthropicServingMessages | None = raw_request.app.state.anthropic_serving_messages
    if serving is None:
        raise NotImplementedError("the model does not support messages")
    return serving
