"""Ask about a picture with the official Anthropic package.

    python clients/examples/with_anthropic.py [FILE]

It uses the server at ANTHROPIC_BASE_URL, by default http://127.0.0.1:8000.
"""

import base64
import os
import sys
from pathlib import Path

from anthropic import Anthropic

HERE = Path(__file__).parent


def main() -> None:
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "red_circle.png"
    picture = base64.b64encode(path.read_bytes()).decode()
    client = Anthropic(
        base_url=os.environ.get("ANTHROPIC_BASE_URL", "http://127.0.0.1:8000"),
        api_key=os.environ.get("ANTHROPIC_API_KEY", "none"),
    )
    with client.messages.stream(
        model="saccade-tiny",
        max_tokens=64,
        messages=[
            {
                "role": "user",
                "content": [
                    {
                        "type": "image",
                        "source": {"type": "base64", "media_type": "image/png", "data": picture},
                    },
                    {"type": "text", "text": "What is in the image?"},
                ],
            }
        ],
    ) as stream:
        for text in stream.text_stream:
            print(text, end="", flush=True)
    print()


if __name__ == "__main__":
    main()
