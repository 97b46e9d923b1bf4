"""`POST /v1/chat/completions`, on vLLM's serving class."""

from http import HTTPStatus

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from server.engine.vllm_http import (
    ChatCompletionRequest,
    ChatCompletionResponse,
    ErrorResponse,
    OpenAIServingChat,
    load_aware_call,
    metrics_header,
    validate_json_request,
    with_cancellation,
    with_sse_keep_alive,
)

router = APIRouter()


@router.post(
    "/v1/chat/completions",
    dependencies=[Depends(validate_json_request)],
    responses={HTTPStatus.OK.value: {"content": {"text/event-stream": {}}}},
)
@with_cancellation  # type: ignore[untyped-decorator]
@load_aware_call  # type: ignore[untyped-decorator]
async def create_chat_completion(request: ChatCompletionRequest, raw_request: Request) -> Response:
    """Answer a conversation, whole or streamed. A client that leaves cancels its work."""
    state = raw_request.app.state
    serving: OpenAIServingChat | None = state.openai_serving_chat
    if serving is None:
        raise NotImplementedError("the model does not support chat completions")
    answer = await serving.create_chat_completion(request, raw_request)
    if isinstance(answer, ErrorResponse):
        return JSONResponse(answer.model_dump(), status_code=answer.error.code)
    if isinstance(answer, ChatCompletionResponse):
        load_format = raw_request.headers.get("endpoint-load-metrics-format", "")
        return JSONResponse(answer.model_dump(), headers=metrics_header(load_format))
    interval = float(state.args.sse_keep_alive_interval)
    return StreamingResponse(with_sse_keep_alive(answer, interval), media_type="text/event-stream")
