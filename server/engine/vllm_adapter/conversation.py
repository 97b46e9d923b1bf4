"""From a conversation to tokens: vLLM's Hugging Face renderer, with typed placeholders as text."""

import asyncio
import contextlib
import functools
import logging
import time
from collections.abc import Awaitable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from jinja2 import TemplateError
from vllm import envs
from vllm.config import VllmConfig
from vllm.exceptions import VLLMError
from vllm.inputs import TextPrompt
from vllm.model_executor.model_loader.utils import get_model_cls
from vllm.renderers import ChatParams, TokenizeParams
from vllm.renderers.hf import HfRenderer, safe_apply_chat_template

from server.concurrency import submitted
from server.engine.vllm_adapter import typed_placeholders
from server.engine.vllm_adapter.typed_placeholders import TypedPlaceholders
from server.errors import ClientError, SaccadeError
from server.request import context as requests
from server.request.context import RequestContext

log = logging.getLogger("saccade.engine")

# How `render_chat_async` passes its `TokenizeParams` to the thread that runs the chat template.
_TOKENIZE = "saccade_tokenize"


class _Tokenized(str):
    """The text that a chat template has made, with its tokens under `params`."""

    params: TokenizeParams
    prompt: Any


class ConversationRenderer(HfRenderer):
    """Renders as `HfRenderer` does until `keep_typed_placeholders` is called, but the thread that
    runs the chat template also tokenizes. vLLM hands that to a thread once more."""

    def __init__(self, config: VllmConfig, tokenizer: Any) -> None:
        super().__init__(config, tokenizer)
        self._typed = TypedPlaceholders({})
        self._apply_chat_template_async = self._template_in_thread
        self._vllm_tokenize_prompt_async = self._tokenize_prompt_async
        self._tokenize_prompt_async = self._known_tokens
        self._eos_token_id = super().get_eos_token_id()

    def get_eos_token_id(self) -> int | None:
        """vLLM's, which each request asks for: the tokenizer looks it up through its vocabulary."""
        return self._eos_token_id

    def keep_typed_placeholders(self) -> None:
        """Let the model's placeholders be text where a user types them."""
        processor = self.get_mm_processor()
        model_class: Any = get_model_cls(self.model_config)
        self._typed = typed_placeholders.of_model(
            processor.info.get_hf_processor(),
            self.get_tokenizer(),
            processor.info.get_hf_config(),
            model_class.get_placeholder_str,
        )

    async def render_chat_async(
        self,
        conversations: Sequence[Any],
        chat_params: ChatParams,
        tok_params: Any = None,
        *,
        prompt_extras: dict[str, Any] | None = None,
        skip_mm_cache: bool = False,
    ) -> Any:
        """vLLM's, with the steps of a single conversation in the task of the request. vLLM starts
        a task for each step of each conversation."""
        if len(conversations) != 1:
            return await super().render_chat_async(
                conversations, chat_params, tok_params,
                prompt_extras=prompt_extras, skip_mm_cache=skip_mm_cache,
            )  # fmt: skip
        arrived = time.time()
        tok_params = tok_params or self.default_chat_tok_params
        options = {**chat_params.chat_template_kwargs, _TOKENIZE: tok_params}
        conversation, prompt = await self.render_messages_async(
            conversations[0], replace(chat_params, chat_template_kwargs=options)
        )
        tokens = await self.tokenize_prompt_async(prompt, tok_params)
        media_io_kwargs = chat_params.media_io_kwargs or {}
        extras = {**(prompt_extras or {}), "media_io_kwargs": media_io_kwargs}
        self._apply_prompt_extras([tokens], extras)
        engine_prompt = await self.process_for_engine_async(
            tokens, arrived, skip_mm_cache=skip_mm_cache, tok_params=tok_params
        )
        return [conversation], [engine_prompt]

    async def render_messages_async(self, messages: Any, params: ChatParams) -> Any:
        """vLLM's, with typed placeholders marked while the chat template runs.

        Raises:
            ClientError: vLLM or the chat template cannot read the messages.
        """
        with unfit_messages():
            return await self._rendered(messages, params)

    async def _rendered(self, messages: Any, params: ChatParams) -> Any:
        messages = with_videos(messages)
        marked = self._typed.mark(messages)
        options = self._typed.mark(params.chat_template_kwargs)
        if marked is messages and options is params.chat_template_kwargs:
            return await super().render_messages_async(messages, params)
        with_marks = replace(params, chat_template_kwargs=options)
        conversation, prompt = await super().render_messages_async(marked, with_marks)
        if "prompt_token_ids" in prompt or "prompt_embeds" in prompt:
            # The template has made tokens, as it is told to for embeddings in the prompt.
            return await super().render_messages_async(messages, params)
        return self._typed.restored(conversation), prompt

    def _template_in_thread(self, *args: Any, **options: Any) -> "asyncio.Future[Any]":
        return submitted(self._executor, functools.partial(self._template, *args, **options))

    async def _render_with_timeout(self, rendering: Awaitable[Any]) -> Any:
        """vLLM's, without the future and the callbacks of `asyncio.wait_for`."""
        timeout = envs.VLLM_CHAT_TEMPLATE_RENDER_TIMEOUT
        try:
            async with asyncio.timeout(timeout if timeout > 0 else None):
                return await rendering
        except TimeoutError:
            self._replace_executor()
            raise TimeoutError(f"the chat template took more than {timeout} s") from None

    def _template(self, *args: Any, **options: Any) -> Any:
        """Run the chat template, and tokenize its text if it is taken as it is."""
        params = options.pop(_TOKENIZE, None)
        text = safe_apply_chat_template(*args, **options)
        if not isinstance(params, TokenizeParams) or not isinstance(text, str):
            return text
        if params.return_token_offsets:  # they depend on the media of the prompt
            return text
        tokenizer: Any = self.get_tokenizer()
        prompt = params.apply_pre_tokenization(tokenizer, TextPrompt(prompt=text))
        if prompt["prompt"] is not text:
            return text
        tokenized = _Tokenized(text)
        tokenized.params = params
        tokenized.prompt = self._tokenize_prompt(prompt, params)
        return tokenized

    async def _known_tokens(self, prompt: Any, params: Any) -> Any:
        text = prompt["prompt"]
        if isinstance(text, _Tokenized) and text.params is params:
            return {**prompt, **text.prompt}
        return await self._vllm_tokenize_prompt_async(prompt, params)

    def _tokenize_prompt(self, prompt: Any, params: Any) -> Any:
        """vLLM's, with marked placeholders as text."""
        if not self._typed.is_marked(prompt["prompt"]):
            return super()._tokenize_prompt(prompt, params)
        text, flags = self._typed.read(prompt["prompt"])
        tokens: Any = super()._tokenize_prompt({**prompt, "prompt": text}, params)  # type: ignore[typeddict-item]
        cut_left = getattr(self.get_tokenizer(), "truncation_side", "right") == "left"
        ids, origin = self._typed.as_text(tokens["prompt_token_ids"], flags, cut_left=cut_left)
        tokens["prompt_token_ids"] = ids
        if (offsets := tokens.get("prompt_token_offsets")) is not None:
            tokens["prompt_token_offsets"] = [offsets[place] for place in origin]
        return tokens


def with_videos(messages: Any) -> Any:
    """`messages` with parts of videos in the place of those images that are videos: vLLM takes none
    on some routes, and of a file only its bytes may tell that it is one."""
    context = requests.current()
    has_videos = any(ref.kind == "video" for ref in context.media)
    if not has_videos and context.retained is None:  # earlier turns may have some
        return messages
    return [
        {**message, "content": [_as_video(part, context) for part in content]}
        if isinstance(message, dict) and isinstance(content := message.get("content"), list)
        else message
        for message in messages
    ]


def _as_video(part: Any, context: RequestContext) -> Any:
    holder = part.get("image_url") if isinstance(part, dict) else None
    url = holder.get("url") if isinstance(holder, dict) else holder
    found = context.resolve(url) if isinstance(url, str) else None
    if found is None or found.ref.kind != "video":
        return part
    named = {} if found.ref.uuid is None else {"uuid": found.ref.uuid}
    others = {key: value for key, value in part.items() if key not in ("image_url", "detail")}
    return {**others, **named, "type": "video_url", "video_url": {"url": url}}


@contextlib.contextmanager
def unfit_messages() -> Iterator[None]:
    """Raise a ClientError for messages that vLLM or the chat template cannot read."""
    try:
        yield
    except SaccadeError:
        raise
    except Exception as error:
        if isinstance(error, VLLMError) and error.__cause__ is None:
            raise
        raise _unfit(error) from error


def _unfit(error: Exception) -> ClientError:
    """The error for messages on which vLLM or the chat template failed. A template that refuses
    messages says why, for the client."""
    log.info("failed to render messages: %r", error)
    param = "input" if requests.current().record.path == "/v1/responses" else "messages"
    causes = (error, error.__cause__)
    refusal = next((str(cause) for cause in causes if type(cause) is TemplateError), None)
    text = refusal or "the messages, tools or chat_template_kwargs do not fit the chat template"
    return ClientError(text, param=param)
