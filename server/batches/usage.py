"""The tokens and the model of answers, read from their lines in the log of results."""

from typing import Any

import msgspec


class Usage(msgspec.Struct, frozen=True):
    """The tokens of all answers of a batch."""

    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0
    total_tokens: int = 0

    def __add__(self, other: "Usage") -> "Usage":
        sums = (getattr(self, name) + getattr(other, name) for name in self.__struct_fields__)
        return Usage(*sums)

    def shown(self) -> dict[str, Any]:
        """The usage of OpenAI's Batch object."""
        return {
            "input_tokens": self.input_tokens,
            "input_tokens_details": {"cached_tokens": self.cached_tokens},
            "output_tokens": self.output_tokens,
            "output_tokens_details": {"reasoning_tokens": self.reasoning_tokens},
            "total_tokens": self.total_tokens,
        }


class _Details(msgspec.Struct):
    cached_tokens: int | None = None
    reasoning_tokens: int | None = None


class _Tokens(msgspec.Struct):
    """The usage of an answer: chat completions, completions and embeddings have one set of names,
    responses have another."""

    prompt_tokens: int | None = None
    prompt_tokens_details: _Details | None = None
    completion_tokens: int | None = None
    completion_tokens_details: _Details | None = None
    input_tokens: int | None = None
    input_tokens_details: _Details | None = None
    output_tokens: int | None = None
    output_tokens_details: _Details | None = None
    total_tokens: int | None = None


class _Body(msgspec.Struct):
    model: str | None = None
    usage: _Tokens | None = None


_BODIES = msgspec.json.Decoder(_Body)
_NO_DETAILS = _Details()


def read_answer(body: msgspec.Raw) -> tuple[Usage, str | None]:
    """The tokens of an answer and the name of its model; nothing of an answer in another form."""
    try:
        answer = _BODIES.decode(body)
    except (ValueError, RecursionError):  # ValueError is also msgspec's
        return Usage(), None
    tokens = answer.usage or _Tokens()
    asked = tokens.prompt_tokens_details or tokens.input_tokens_details or _NO_DETAILS
    said = tokens.completion_tokens_details or tokens.output_tokens_details or _NO_DETAILS
    usage = Usage(
        tokens.prompt_tokens or tokens.input_tokens or 0,
        asked.cached_tokens or 0,
        tokens.completion_tokens or tokens.output_tokens or 0,
        said.reasoning_tokens or 0,
        tokens.total_tokens or 0,
    )
    return usage, answer.model
