"""Explains why a request does not fit its route, in one sentence about one value.

If a value may have one of several forms, pydantic lists the errors of all forms: hundreds for one
missing field. This module chooses the form that the value comes closest to, and reports its first
error.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

from fastapi.exceptions import RequestValidationError
from pydantic import TypeAdapter
from pydantic_core import SchemaValidator

from server.http import fail_fast

# Fields that determine which of several forms a value has.
_TAGS = ("type", "role")
# Steps in pydantic's paths that are not a form.
_WRAPPERS = ("union[", "tagged-union[", "function-", "nullable[", "lax-or-strict[")


class _Problem(NamedTuple):
    """What is wrong, and where: `path` is relative to the value that is looked at."""

    path: tuple[str | int, ...]
    error: dict[str, Any]


def explained(error: RequestValidationError) -> tuple[str, str | None]:
    """The message for the client and the path of the wrong value."""
    errors = error.errors()
    if not errors:
        return "the request is not valid", None
    if not isinstance(errors[0], dict):  # vLLM's check of the content type
        return str(errors[0]), None
    for each in errors:
        cause = each.get("ctx", {}).get("error")
        if (parameter := getattr(cause, "parameter", None)) is not None:
            return str(cause), str(parameter)
    if errors[0]["type"] == "json_invalid":
        why = errors[0].get("ctx", {}).get("error", "")
        return f"the body is not valid JSON: {why}", None
    loc = errors[0]["loc"]
    if isinstance(error.body, dict) and len(loc) > 1 and isinstance(loc[1], int):
        # An item of a list in a message, which vLLM validates without its place.
        param = "messages" if "messages" in error.body else "input"
        return f"{param}: a part of a message has a wrong type or form", param
    value = error.body if loc[:1] == ("body",) else _names([each["loc"] for each in errors])
    problem = _closest([_Problem(tuple(each["loc"][1:]), each) for each in errors], value)
    param = _param(problem.path)
    return _message(problem, param), param or None


@functools.cache
def _validator(model: Any, name: str) -> SchemaValidator:
    """The validator of one field of a model."""
    return fail_fast.validator(TypeAdapter(model.model_fields[name].annotation))


def unfit_field(model: Any, body: Any) -> str | None:
    """The first field of `body` whose value has a wrong type by itself, for a route that takes
    `model` as its body; None if there is none."""
    declared = getattr(model, "model_fields", {})
    for name, value in body.items() if isinstance(body, dict) else ():
        if name in declared:
            try:
                _validator(model, name).validate_python(value)
            except Exception:  # validators of parts of the value may fail as well
                return str(name)
    return None


def _closest(problems: Sequence[_Problem], value: Any) -> _Problem:
    """The problem to report, with its whole path."""
    first = problems[0]
    if not first.path:
        return first
    head = first.path[0]
    if not _is_child(head, value) and not _is_missing(first):
        return _of_forms(problems, value)
    inner = value[head] if _is_child(head, value) else None
    below = [_Problem(each.path[1:], each.error) for each in problems if each.path[:1] == (head,)]
    found = _closest(below, inner)
    return _Problem((head, *found.path), found.error)


def _of_forms(problems: Sequence[_Problem], value: Any) -> _Problem:
    """The problem of the form that `value` comes closest to."""
    forms: dict[str | int, list[_Problem]] = {}
    for path, error in problems:
        label = None
        while path and str(path[0]).startswith(_WRAPPERS):
            label, path = path[0], path[1:]
        # Wrapped forms may all have the same name.
        is_inside = path and (_is_child(path[0], value) or _is_missing(_Problem(path, error)))
        if label is not None and is_inside:  # the wrapper is of the form itself
            forms.setdefault(label, []).append(_Problem(path, error))
        elif path:
            forms.setdefault(path[0], []).append(_Problem(path[1:], error))
    candidates = [form for form in forms.values() if not any(map(_is_other_form, form))]
    if candidates:
        # The form with the deepest problem fits best.
        form = min(candidates, key=lambda form: (-_depth(form), len(form)))
        form.sort(key=_is_missing)  # the value may be meant for a form that does not lack it
        return _closest(form, value)
    tagged = {each.path[0] for form in forms.values() for each in form if _is_of_tag(each)}
    if isinstance(value, dict) and tagged:
        names = [tag for tag in _TAGS if tag in tagged]
        name = next((tag for tag in names if tag in value), None)
        if name is None:
            return _Problem((names[0],), {"type": "missing"})
        return _Problem((name,), {"type": "no_form", "msg": "the value is not known here"})
    return _Problem((), {"type": "no_form", "msg": "the value has a wrong type or form"})


def _depth(form: Sequence[_Problem]) -> int:
    return max(len(each.path) for each in form)


def _is_other_form(problem: _Problem) -> bool:
    """Whether the value was not meant to have this form. A form that needs an `id` is one of the
    server's, and clients rarely mean it."""
    lacks_id = problem.path == ("id",) and problem.error["type"] == "missing"
    return not problem.path or lacks_id or _is_of_tag(problem)


def _is_of_tag(problem: _Problem) -> bool:
    if len(problem.path) != 1 or problem.path[0] not in _TAGS:
        return False
    kind = problem.error["type"]
    return kind in ("literal_error", "enum") or (kind == "missing" and problem.path[0] == "type")


def _is_child(name: str | int, value: Any) -> bool:
    if isinstance(value, dict):
        return name in value
    return isinstance(value, list) and isinstance(name, int) and name < len(value)


def _is_missing(problem: _Problem) -> bool:
    return problem.error["type"] == "missing" and len(problem.path) == 1


def _names(locs: Sequence[Sequence[str | int]]) -> dict[str | int, None]:
    """A stand-in for values outside of the body, such as parameters of the query."""
    return {loc[1]: None for loc in locs if len(loc) > 1}


def _param(path: Sequence[str | int]) -> str:
    """`messages[0].content`."""
    text = ""
    for step in path:
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else str(step)
    return text


def _message(problem: _Problem, param: str) -> str:
    if problem.error["type"] == "missing":
        return f"{param or 'the body'} is missing"
    text = str(problem.error["msg"]).removeprefix("Value error, ")
    text = text[:1].lower() + text[1:]
    return f"{param}: {text}" if param else text
