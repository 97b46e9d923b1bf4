"""Only a few places ask for the time of day. It jumps when it is corrected, so everything that
lasts or falls due is measured by the monotonic clock."""

import ast
from collections.abc import Iterator
from pathlib import Path

SERVER = Path(__file__).parents[2] / "server"
# {function, or class with fields: why it needs the time of day}.
NEED_WALL_CLOCK = {
    "ingest/fetch_cache.py FetchCache.__init__": "the clocks of `_entry`",
    "ingest/fetch_cache.py FetchCache._entry": "the age of a response counts from its `Date`",
    "ingest/files/store.py FileStore.__init__": "the clocks of `_put` and `_kept`",
    "ingest/files/store.py FileStore._put": "a client learns when its file was stored",
    "ingest/files/store.py FileStore._kept": "how long a file lives on, after a restart as well",
    "ingest/files/store.py FileStore._keep_input": "as `_kept`, for the input of a batch",
    "ingest/files/store.py FileStore._adopt": "as `_put`, for the results of a batch",
    "ingest/files/reader.py FileReader.__init__": "the clock of `get`",
    "ingest/files/reader.py FileReader.get": "whether a file has expired, as in the store",
    "batches/store.py BatchStore.__init__": "the clock of `create` and `change`",
    "batches/store.py BatchStore.create": "a client learns when its batch was made and expires",
    "batches/store.py BatchStore.change": "a client learns when its batch began and ended",
    "batches/runner.py BatchRunner._run": "until when a batch may run, after a restart as well",
    "telemetry/log.py _second": "a line of the log says when a request ended",
    "http/observe.py Observed.__call__": "as `Record`, which is made after the request's turn",
    "telemetry/record.py Record": "a trace says when a request began; spans count from there",
    "engine/vllm_adapter/conversation.py ConversationRenderer.render_chat_async": "vLLM's "
    "`arrival_time`, by which it orders requests",
    "engine/vllm_adapter/text_stream.py TextStream.__init__": "`created` of an answer, as in vLLM",
    "demo/training/report.py result": "the date of a training run, for people",
}
# What reads the wall clock, by the last name before the dot. The event loop's `time` is monotonic.
_CLOCK = {"time", "time_ns"}
WALL = {
    "time": {*_CLOCK, "localtime", "gmtime", "ctime", "asctime", "strftime", "CLOCK_REALTIME"},
    "clock": _CLOCK,
    "_clock": _CLOCK,
    "datetime": {"now", "utcnow", "today"},
    "date": {"today"},
    "utils": {"formatdate", "localtime"},
}


def readings(node: ast.AST, scope: str = "") -> Iterator[str]:
    """The function or class of each place that reads the wall clock, or passes on what does."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from readings(child, f"{scope}.{child.name}".lstrip("."))
        elif isinstance(child, ast.ImportFrom):
            module = (child.module or "").rpartition(".")[2]
            if module in ("time", "utils") and WALL[module] & {name.name for name in child.names}:
                yield scope
        elif isinstance(child, ast.Attribute):
            base = child.value
            name = base.attr if isinstance(base, ast.Attribute) else getattr(base, "id", "")
            if child.attr in WALL.get(name, ()):
                yield scope
            if not isinstance(base, ast.Name):
                yield from readings(child, scope)
        elif isinstance(child, ast.Name) and child.id == "time":
            yield scope  # the module as a clock
        else:
            yield from readings(child, scope)


def test_only_listed_places_read_the_wall_clock() -> None:
    found = {
        f"{path.relative_to(SERVER)} {scope}"
        for path in sorted(SERVER.rglob("*.py"))
        for scope in readings(ast.parse(path.read_text()))
    }
    assert found == NEED_WALL_CLOCK.keys()


def test_every_way_to_read_the_wall_clock_is_found() -> None:
    for text in (
        "time.time()",
        "from time import time",
        "from time import monotonic, time_ns",
        "time.clock_gettime(time.CLOCK_REALTIME)",
        "time.strftime('%H')",
        "datetime.datetime.now(datetime.UTC)",
        "datetime.now().timestamp()",
        "date.today()",
        "email.utils.formatdate()",
        "from email.utils import formatdate",
        "FileStore(clock=time)",
        "self._clock.time()",
    ):
        assert list(readings(ast.parse(text))) == [""], text
    assert list(readings(ast.parse("def f(clock=time.time): ..."))) == ["f"]
    for text in ("time.monotonic()", "loop.time()", "asyncio.get_running_loop().time()"):
        assert list(readings(ast.parse(text))) == [], text
