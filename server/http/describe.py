"""What `/openapi.json` says of Saccade's own fields, which vLLM's models do not know, and examples
of requests."""

from typing import Any

# A blue square.
_SQUARE = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAEAAAABAAQMAAACQp+OdAAAABlBMVEX///8rS9j6X7ZXAAAA"
    "FUlEQVR42mNgGHTgPxCMMnAzBhUAAHqhf4GokM9QAAAAAElFTkSuQmCC"
)
_ABOUT = """The routes of vLLM and a few more, with Saccade's own fields.

Pictures come as `data:` or `http(s)` URLs, uploaded files, or pages of a PDF, in the same
way on all routes of conversations. `POST /v1/images/tokens` tells what they cost before they are
sent. Where the server requires an API key, send it as `Authorization: Bearer KEY`."""

_TAGS = {
    "Conversations": "Questions about pictures, and their answers.",
    "Images and files": "What pictures cost, and files that are uploaded once.",
    "The server": "Its state, its caches and its metrics.",
    "More of vLLM": "Routes that Saccade takes from vLLM as they are.",
}
_TAG_OF = {
    "/v1/chat/completions": "Conversations",
    "/v1/responses": "Conversations",
    "/v1/messages": "Conversations",
    "/v1/completions": "Conversations",
    "/tokenize": "Conversations",
    "/v1/images": "Images and files",
    "/v1/files": "Images and files",
    "/v1/batches": "Images and files",
    "/health": "The server",
    "/ready": "The server",
    "/version": "The server",
    "/metrics": "The server",
    "/v1/cache": "The server",
    "/v1/models": "The server",
}

_REQUEST_FIELDS: dict[str, Any] = {
    "max_image_tokens": {
        "type": "integer",
        "minimum": 1,
        "description": "Saccade: a budget of tokens for all images of the request together. It is "
        "divided by area.",
    },
    "include_image_details": {
        "type": "boolean",
        "default": False,
        "description": "Saccade: the answer has `image_details`, in the order of the prompt: the "
        "size of each image, the size that the encoder saw, the region that it shows, its tokens, "
        "and what was cached.",
    },
    "include_grounding": {
        "anyOf": [
            {"type": "boolean"},
            {
                "type": "object",
                "properties": {
                    "scale": {
                        "anyOf": [{"const": "pixels"}, {"type": "number", "exclusiveMinimum": 0}]
                    },
                    "image": {"type": "integer", "minimum": 0},
                },
                "additionalProperties": False,
            },
        ],
        "default": False,
        "description": "Saccade: the answer has `grounding`, the boxes and points in its text in "
        "pixels of the original image. `scale` is the range of the model's numbers where its "
        "notation does not tell it, or `pixels`; `image` is the index of the image.",
    },
}
_IMAGE_FIELDS: dict[str, Any] = {
    "detail": {
        "enum": ["auto", "low", "high", "original", "trim", "salient"],
        "default": "auto",
        "description": "A budget of tokens by the model's family. Saccade: trim shows the image "
        "without its margins; salient shows a small view of the whole, and crops where there is "
        "detail.",
    },
    "max_tokens": {
        "type": "integer",
        "minimum": 1,
        "description": "Saccade: the most tokens that this image may take. The cap is exact.",
    },
    "frames": {
        "anyOf": [
            {"type": "integer", "minimum": 1},
            {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1},
        ],
        "description": "Saccade: of an animation, how many evenly spaced frames the model sees, or "
        "the numbers of the frames, from 0.",
    },
}
_FILE_FIELDS = {
    "pages": {
        "type": "string",
        "description": 'Saccade: the pages of a PDF, such as "1-3,7"; without it, all.',
    },
    "include_text": {
        "type": "boolean",
        "default": False,
        "description": "Saccade: of a PDF, the text of each page stands before its picture.",
    },
    "max_tokens": _IMAGE_FIELDS["max_tokens"],
    "detail": _IMAGE_FIELDS["detail"],
}
_UUID = {
    "uuid": {
        "type": "string",
        "description": "The client's own name of the image, under which it can be sent again "
        "without data while it is cached.",
    }
}
# Fields by the name of the model in the description.
_FIELDS: dict[str, dict[str, Any]] = {
    "ChatCompletionRequest": _REQUEST_FIELDS,
    "ResponsesRequest": _REQUEST_FIELDS,
    "AnthropicMessagesRequest": _REQUEST_FIELDS,
    "ImageTokensRequest": {"max_image_tokens": _REQUEST_FIELDS["max_image_tokens"]},
    "ImageURL": _IMAGE_FIELDS,
    "ChatCompletionContentPartImageParam": _UUID,
    "FileFile": _FILE_FIELDS,
}


def _asking(*parts: dict[str, Any], **fields: Any) -> dict[str, Any]:
    question = {"type": "text", "text": "What is in the image?"}
    return {"messages": [{"role": "user", "content": [*parts, question]}], **fields}


def _picture(**options: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": _SQUARE, **options}}


_EXAMPLES: dict[str, dict[str, dict[str, Any]]] = {
    "/v1/chat/completions": {
        "A picture": _asking(_picture()),
        "Two pictures with caps": _asking(
            _picture(detail="low"), _picture(max_tokens=4), include_image_details=True
        ),
        "A budget for all pictures": _asking(_picture(), _picture(), max_image_tokens=8),
        "A stream with its usage": _asking(
            _picture(), stream=True, stream_options={"include_usage": True}
        ),
    },
    "/v1/images/tokens": {
        "Sizes": {"images": [{"width": 4000, "height": 3000}, {"width": 640, "height": 480}]},
        "Caps": {
            "images": [
                {"width": 4000, "height": 3000, "detail": "low"},
                {"width": 4000, "height": 3000, "max_tokens": 100},
            ],
            "max_image_tokens": 200,
        },
        "What the encoder sees": {
            "images": [{"width": 640, "height": 480}],
            "include_views": True,
        },
        "A conversation": _asking(_picture()),
    },
    "/v1/responses": {
        "A picture": {
            "input": [
                {
                    "role": "user",
                    "content": [
                        {"type": "input_image", "image_url": _SQUARE, "detail": "low"},
                        {"type": "input_text", "text": "What is in the image?"},
                    ],
                }
            ],
            "include_image_details": True,
        }
    },
    "/v1/messages": {
        "A picture": {
            "max_tokens": 64,
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {
                            "type": "image",
                            "source": {
                                "type": "base64",
                                "media_type": "image/png",
                                "data": _SQUARE.partition(",")[2],
                            },
                        },
                        {"type": "text", "text": "What is in the image?"},
                    ],
                }
            ],
        }
    },
}


def describe(schema: dict[str, Any], model: str) -> None:
    """Complete the description of the routes: Saccade's fields, groups of routes, and examples with
    the name of the `model`."""
    schema["info"]["description"] = _ABOUT
    schema["tags"] = [{"name": name, "description": text} for name, text in _TAGS.items()]
    schema["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    schema["security"] = [{}, {"key": []}]
    models = schema["components"]["schemas"]
    for name, fields in _FIELDS.items():
        if name in models:
            models[name].setdefault("properties", {}).update(fields)
    for path, operations in schema["paths"].items():
        matching = [prefix for prefix in _TAG_OF if (path + "/").startswith(prefix + "/")]
        for operation in operations.values():
            operation["tags"] = [_TAG_OF[matching[0]] if matching else "More of vLLM"]
    for path, examples in _EXAMPLES.items():
        if path in schema["paths"]:
            body = schema["paths"][path]["post"]["requestBody"]["content"]["application/json"]
            body["examples"] = {
                name: {"summary": name, "value": {"model": model, **example}}
                for name, example in examples.items()
            }
