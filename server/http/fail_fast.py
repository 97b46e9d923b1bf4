"""Makes the validation of bodies stop at the first wrong item of a list.

pydantic reports the errors of all items, in every form that an item may have: one wrong item of a
response's `input` has 236 errors, of 2 kB each. A thousand of them would hold the event loop for
seconds. An answer names only one error.
"""

from collections.abc import Iterable
from typing import Any

from fastapi.routing import APIRoute
from pydantic import TypeAdapter
from pydantic_core import SchemaValidator
from starlette.routing import BaseRoute

_LISTS = frozenset({"list", "tuple", "set", "frozenset"})


def stop_at_first_error(routes: Iterable[BaseRoute]) -> None:
    """Let the validators of the bodies of `routes` stop at the first error in a list."""
    for route in routes:
        if isinstance(route, APIRoute):
            for field in route.dependant.body_params:
                adapter = field._type_adapter
                adapter.validator = validator(adapter)


def validator(adapter: TypeAdapter[Any]) -> SchemaValidator:
    """The validator of `adapter`, but it stops at the first error in a list."""
    # The validators that its models have already do not.
    return SchemaValidator(_failing_fast(adapter.core_schema), _use_prebuilt=False)


def _failing_fast(schema: Any) -> Any:
    """A copy of `schema`, pydantic's core schema, with `fail_fast` in each list."""
    if isinstance(schema, dict):
        copy = {key: _failing_fast(value) for key, value in schema.items()}
        kind = schema.get("type")
        if isinstance(kind, str) and kind in _LISTS:  # and no field with the name `type`
            copy["fail_fast"] = True
        return copy
    if isinstance(schema, (list, tuple)):
        return type(schema)(map(_failing_fast, schema))
    return schema
