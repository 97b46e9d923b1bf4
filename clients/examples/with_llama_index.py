"""Ask about a picture with LlamaIndex.

    python clients/examples/with_llama_index.py [FILE]

It uses the server at OPENAI_BASE_URL, by default http://127.0.0.1:8000/v1.
"""

import os
import sys
from pathlib import Path

from llama_index.core.llms import ChatMessage, ImageBlock, TextBlock
from llama_index.llms.openai_like import OpenAILike

HERE = Path(__file__).parent


def main() -> None:
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "red_circle.png"
    model = OpenAILike(
        model="saccade-tiny",
        api_base=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"),
        api_key=os.environ.get("OPENAI_API_KEY", "none"),
        is_chat_model=True,
        temperature=0,
    )
    question = [ImageBlock(path=path), TextBlock(text="What is in the image?")]
    for chunk in model.stream_chat([ChatMessage(role="user", blocks=question)]):
        print(chunk.delta or "", end="", flush=True)
    print()


if __name__ == "__main__":
    main()
