"""The pages for people: the playground at `/`, and `/docs`.

Their files are sent as they are. A page loads nothing from another server, and its policy lets it
run no script and no style that stand inside of HTML.
"""

import asyncio
import functools
import gzip
from collections.abc import Mapping
from pathlib import Path

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from server.demo.samples import samples

PLAYGROUND = Path(__file__).parents[1] / "playground"
_TYPES = {
    ".mp4": "video/mp4",
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".png": "image/png",
    ".svg": "image/svg+xml",
}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' blob: data:; media-src blob:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
# The playground writes no HTML. Swagger UI does.
_NO_HTML = "; require-trusted-types-for 'script'; trusted-types 'none'"


def playground() -> list[BaseRoute]:
    """`/`, its files below `/playground`, and the sample pictures of the demo model."""
    files = [
        _file(f"/playground/{path.name}", path)
        for path in sorted(PLAYGROUND.iterdir())
        if path.suffix in _TYPES and path.suffix != ".html"
    ]
    return [
        _file("/", PLAYGROUND / "index.html", _POLICY + _NO_HTML),
        *files,
        Route("/playground/samples.json", _list_samples, include_in_schema=False),
        Route("/playground/samples/{name}", _show_sample, include_in_schema=False),
    ]


def docs(swagger_ui: Path) -> list[BaseRoute]:
    """`/docs`: Swagger UI, whose files are in this folder."""
    return [
        _file("/docs", PLAYGROUND / "docs.html", _POLICY),
        _file("/docs/icon.svg", PLAYGROUND / "icon.svg"),
        _file("/docs/start.js", PLAYGROUND / "docs.js"),
        _file("/docs/swagger-ui.css", swagger_ui / "swagger-ui.css"),
        _file("/docs/swagger-ui-bundle.js", swagger_ui / "swagger-ui-bundle.js"),
    ]


def _file(url: str, path: Path, policy: str | None = None) -> Route:
    """The route of one file, which is read now."""
    headers = {"Content-Type": _TYPES[path.suffix], "Vary": "Accept-Encoding"}
    if policy is not None:
        headers["Content-Security-Policy"] = policy
    body = path.read_bytes()
    packed = gzip.compress(body, mtime=0)

    async def send(request: Request) -> Response:
        if "gzip" in request.headers.get("accept-encoding", ""):
            return Response(packed, headers={**headers, "Content-Encoding": "gzip"})
        return Response(body, headers=headers)

    return Route(url, send, include_in_schema=False)


@functools.cache
def _samples() -> tuple[list[dict[str, list[str]]], Mapping[str, bytes]]:
    """Names of files and questions of each sample, and all files. Draws them, in a second."""
    made = samples()
    listed = [
        {"files": list(sample.files), "questions": [asked.text for asked in sample.questions]}
        for sample in made
    ]
    return listed, {name: data for sample in made for name, data in sample.files.items()}


async def _list_samples(_: Request) -> Response:
    listed, _files = await asyncio.to_thread(_samples)
    return JSONResponse(listed)


async def _show_sample(request: Request) -> Response:
    _listed, files = await asyncio.to_thread(_samples)
    name = request.path_params["name"]
    if name not in files:
        raise HTTPException(404, "there is no sample with this name")
    return Response(files[name], headers={"Content-Type": _TYPES[Path(name).suffix]})
