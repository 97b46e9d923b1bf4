"""Ask about a picture with LangChain.

    python clients/examples/with_langchain.py [FILE]

It uses the server at OPENAI_BASE_URL, by default http://127.0.0.1:8000/v1.
"""

import base64
import os
import sys
from pathlib import Path

from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI

HERE = Path(__file__).parent


def main() -> None:
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "red_circle.png"
    picture = base64.b64encode(path.read_bytes()).decode()
    model = ChatOpenAI(
        model="saccade-tiny",
        base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"),
        api_key=os.environ.get("OPENAI_API_KEY", "none"),
        temperature=0,
    )
    message = HumanMessage(
        content_blocks=[
            {"type": "image", "base64": picture, "mime_type": "image/png"},
            {"type": "text", "text": "What is in the image?"},
        ]
    )
    for chunk in model.stream([message]):
        print(chunk.text, end="", flush=True)
    print()


if __name__ == "__main__":
    main()
