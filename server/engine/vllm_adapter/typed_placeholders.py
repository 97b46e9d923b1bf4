"""Keeps the placeholders of a model's media apart from the same words typed by a user.

A chat template writes a placeholder such as `<|image_pad|>` for each image, and the tokenizer makes
one token of it, which the processor replaces by the image. It would make the same token of the
same word in a user's text. There it is text:

    messages with typed placeholders marked -> template -> text with marks -> text, tokens
                                                           those that were marked become plain text

Most placeholders are tokens of their own. The few that are not, such as InternVL's `<image>`, are
found as text by vLLM's processor. Where they are typed, an invisible character parts them.
"""

import re
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from server.errors import ClientError

# What a mark looks like: it stands for `placeholders[number][start:end]` as text. A client that
# sends one gets just that text.
_MARK = "saccade3b0f9e6d41c8a527"
_READ = re.compile(_MARK + r"x(\d+)x(\d+)x(\d+)x")
WORD_JOINER = "\u2060"
# Values of message parts that name media, and are never shown to the model.
_MEDIA_KEYS = frozenset(
    ("image_url", "video_url", "audio_url", "input_audio", "image_embeds", "video_embeds",
     "audio_embeds", "image_pil", "uuid")
)  # fmt: skip

Flags = dict[int, list[bool]]
"""For each token of a placeholder, whether it was typed, at each of its places in order."""


class TypedPlaceholders:
    """`tokens`: placeholder -> (its token, the tokens of the same word as text). `words`: those
    that are no tokens."""

    def __init__(
        self, tokens: Mapping[str, tuple[int, Sequence[int]]], words: Iterable[str] = ()
    ) -> None:
        self._tokens = dict(tokens)
        self._as_text = {token: list(text) for token, text in self._tokens.values()}
        self._all = [*self._tokens, *words]
        longest_first = sorted(self._all, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    # ------------------------------------------------------------------ before the template

    def mark(self, value: Any) -> Any:
        """`value`, of JSON, with a mark for each placeholder in its texts; itself if there is
        none.

        Raises:
            ClientError: it is nested too deeply.
        """
        try:
            return self._marked(value)
        except RecursionError:
            raise ClientError("the messages are nested too deeply", param="messages") from None

    def _marked(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._mark_texts([value])[0]
        if isinstance(value, list):
            new: list[Any] = [self._marked(item) for item in value]
            new = self._mark_across_parts(new)
            return new if any(a is not b for a, b in zip(new, value, strict=True)) else value
        if isinstance(value, dict):
            marked = {
                key: item if key in _MEDIA_KEYS else self._marked(item)
                for key, item in value.items()
            }
            return marked if any(marked[key] is not value[key] for key in value) else value
        return value

    def _mark_across_parts(self, parts: list[Any]) -> list[Any]:
        """`parts` of a message, with marks for placeholders that begin in one part and end in a
        later one: templates write neighbouring parts without anything in between."""
        start, new = 0, parts
        for end in range(1, len(parts) + 1):
            if end < len(parts) and _text_of(parts[end - 1]) is not None:
                continue
            run = parts[start:end]
            texts = [text for part in run if (text := _text_of(part)) is not None]
            if len(texts) > 1 and (marked := self._mark_texts(texts)) is not texts:
                new = list(parts) if new is parts else new
                for place, text in enumerate(marked, start):  # the texts stand first in the run
                    new[place] = {**parts[place], "text": text}
            start = end
        return new

    def _mark_texts(self, texts: list[str]) -> list[str]:
        """The neighbouring `texts`, marked; the same object if there is nothing to mark."""
        joined = texts[0] if len(texts) == 1 else "".join(texts)
        if not any(placeholder in joined for placeholder in self._all):
            return texts
        matches = deque(self._pattern.finditer(joined))
        marked, begin = [], 0
        for text in texts:
            end, done, pieces = begin + len(text), begin, []
            while matches and matches[0].start() < end:
                match = matches[0]
                low, high = max(match.start(), begin), min(match.end(), end)
                if low < high:
                    mark = self._mark(match[0], low - match.start(), high - match.start())
                    pieces += [joined[done:low], mark]
                    done = high
                if match.end() > end:  # the rest of it stands in the next texts
                    break
                matches.popleft()
            marked.append("".join([*pieces, joined[done:end]]))
            begin = end
        return marked

    def _mark(self, placeholder: str, start: int, end: int) -> str:
        if placeholder in self._tokens:
            return f"{_MARK}x{self._all.index(placeholder)}x{start}x{end}x"
        text = placeholder[start:end]
        return text if start else text[0] + WORD_JOINER + text[1:]

    # ------------------------------------------------------------------ after the template

    def restored(self, value: Any) -> Any:
        """`value` without its marks."""
        if isinstance(value, str):
            return self.read(value)[0] if _MARK in value else value
        if isinstance(value, list):
            return [self.restored(item) for item in value]
        if isinstance(value, dict):
            return {key: self.restored(item) for key, item in value.items()}
        return value

    @staticmethod
    def is_marked(text: str) -> bool:
        return _MARK in text

    def read(self, text: str) -> tuple[str, Flags]:
        """`text` without its marks, and which of its placeholders were typed."""
        pieces: list[str] = []
        typed: list[tuple[int, int]] = []
        at = length = 0
        for match in _READ.finditer(text):
            number, start, end = (int(group[:9]) for group in match.groups())
            meant = self._all[number][start:end] if number < len(self._all) else ""
            pieces += [text[at : match.start()], meant]
            length += match.start() - at
            typed.append((length, length + len(meant)))
            length += len(meant)
            at = match.end()
        plain = "".join([*pieces, text[at:]])
        return plain, self._flags(plain, typed)

    def _flags(self, text: str, typed: Sequence[tuple[int, int]]) -> Flags:
        """`typed`: the stretches of `text` that were marked, in order."""
        flags: Flags = {}
        behind = 0
        for match in self._pattern.finditer(text):
            if match[0] not in self._tokens:
                continue
            while behind < len(typed) and typed[behind][1] <= match.start():
                behind += 1
            is_typed = behind < len(typed) and typed[behind][0] < match.end()
            flags.setdefault(self._tokens[match[0]][0], []).append(is_typed)
        return flags

    def as_text(
        self, ids: Sequence[int], flags: Flags, *, cut_left: bool = False
    ) -> tuple[list[int], list[int]]:
        """`ids` with those of typed placeholders as text; and for each token the place in `ids`
        that it comes from. `cut_left`: where some are missing, they are the first ones."""
        wanted = {token: iter(places) for token, places in flags.items()}
        if cut_left:
            for token, places in flags.items():
                wanted[token] = iter(places[max(0, len(places) - ids.count(token)) :])
        new: list[int] = []
        origin: list[int] = []
        for place, token in enumerate(ids):
            is_typed = token in wanted and next(wanted[token], False)
            tokens = self._as_text[token] if is_typed else [token]
            new += tokens
            origin += [place] * len(tokens)
        return new, origin


def _text_of(part: Any) -> str | None:
    """The text of a message's part, if it is one of text."""
    text = part.get("text") if isinstance(part, dict) else None
    return text if isinstance(text, str) else None


# ---------------------------------------------------------------------- of a model

_TOKENS = ("image_token", "video_token", "audio_token", "boi_token")
_TOKEN_IDS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index",
              "audio_token_id", "audio_token_index")  # fmt: skip
# As many as families that number their placeholders are asked for.
_MOST_NUMBERED = 32


def of_model(
    processor: Any, tokenizer: Any, config: Any, placeholder: Callable[[str, int], str | None]
) -> TypedPlaceholders:
    """The placeholders of a model. `processor` is the Hugging Face processor, `config` the model's
    configuration, `placeholder(modality, number)` what vLLM writes for one item."""
    found: dict[str, None] = {}
    for name in _TOKENS:
        for owner in (processor, tokenizer):
            if token := getattr(owner, name, None):
                found[str(token)] = None
    for name in _TOKEN_IDS:
        token_id = getattr(config, name, None)
        if isinstance(token_id, int) and 0 <= token_id < len(tokenizer):
            found[str(tokenizer.convert_ids_to_tokens(token_id))] = None
    for modality in ("image", "video", "audio"):
        for number in range(1, _MOST_NUMBERED + 1):
            written = _written(placeholder, modality, number)
            if not written or any(token in written for token in found):
                break
            found[written] = None
    tokens = {word: made for word in found if (made := _token_and_text(tokenizer, word))}
    return TypedPlaceholders(tokens, [word for word in found if word not in tokens])


def _written(
    placeholder: Callable[[str, int], str | None], modality: str, number: int
) -> str | None:
    try:
        return placeholder(modality, number)
    except (ValueError, NotImplementedError):  # the model has no such modality
        return None


def _token_and_text(tokenizer: Any, word: str) -> tuple[int, list[int]] | None:
    """The token of `word`, and those of the same word as text; None if it is no token."""

    def encoded(text: str, **options: Any) -> list[int]:
        """Of `text` in the middle of another: some tokenizers put a blank before the first word."""
        before = tokenizer.encode("\n", add_special_tokens=False)
        found = tokenizer.encode("\n" + text, add_special_tokens=False, **options)
        return list(found[len(before) :] if found[: len(before)] == before else found)

    ids = tokenizer.encode(word, add_special_tokens=False)
    if len(ids) != 1:
        return None
    text = encoded(word, split_special_tokens=True)
    if ids[0] in text:  # an added token that is not a special one
        text = [*encoded(word[:1]), *encoded(word[1:])]
    return (ids[0], text) if ids[0] not in text else None
