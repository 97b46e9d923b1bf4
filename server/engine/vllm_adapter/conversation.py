"""From a conversation to tokens: vLLM's Hugging Face renderer, with typed placeholders as text."""

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from vllm.config import VllmConfig
from vllm.model_executor.model_loader.utils import get_model_cls
from vllm.renderers import ChatParams
from vllm.renderers.hf import HfRenderer

from server.engine.vllm_adapter import typed_placeholders
from server.engine.vllm_adapter.typed_placeholders import TypedPlaceholders


class ConversationRenderer(HfRenderer):
    """Renders as `HfRenderer` does until `keep_typed_placeholders` is called."""

    def __init__(self, config: VllmConfig, tokenizer: Any) -> None:
        super().__init__(config, tokenizer)
        self._typed = TypedPlaceholders({})

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
        conversation, prompt = await self.render_messages_async(conversations[0], chat_params)
        tokens = await self.tokenize_prompt_async(prompt, tok_params)
        media_io_kwargs = chat_params.media_io_kwargs or {}
        extras = {**(prompt_extras or {}), "media_io_kwargs": media_io_kwargs}
        self._apply_prompt_extras([tokens], extras)
        engine_prompt = await self.process_for_engine_async(
            tokens, arrived, skip_mm_cache=skip_mm_cache, tok_params=tok_params
        )
        return [conversation], [engine_prompt]

    async def render_messages_async(self, messages: Any, params: ChatParams) -> Any:
        """vLLM's, with typed placeholders marked while the chat template runs."""
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
