"""Which layers the body of a stream passes."""

import ast
import inspect

from vllm.entrypoints.serve.middleware.register import init_entrypoints_middleware

from server.http import app


def added(source: str) -> set[str]:
    """The classes that `source` adds as middleware."""
    calls = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    return {
        ast.unparse(call.args[0])
        for call in calls
        if ast.unparse(call.func).endswith(".add_middleware") and call.args
    }


def test_no_layer_of_the_server_holds_streams_up() -> None:
    names = added(inspect.getsource(app))
    assert len(names) == 3
    modules = {f"server.http.{name.split('.')[0]}" for name in names}
    assert modules <= app._LOOK_AT_STARTS


def test_the_layers_of_vllm_are_known() -> None:
    names = added(inspect.getsource(init_entrypoints_middleware))
    assert names == {
        "AuthenticationMiddleware",
        "CORSMiddleware",
        "ScalingMiddleware",
        "WebSocketMetricsMiddleware",
        "XRequestIdMiddleware",
        "imported",  # of `--middleware`
    }
