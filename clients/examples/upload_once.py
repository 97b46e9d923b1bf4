"""Upload a picture once and ask about it twice, with the official OpenAI package.

    python clients/examples/upload_once.py [FILE]

It uses the server at OPENAI_BASE_URL, by default http://127.0.0.1:8000/v1.
"""

import os
import sys
from pathlib import Path
from typing import Any

from openai import OpenAI

HERE = Path(__file__).parent


def main() -> None:
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "blue_square.png"
    client = OpenAI(
        base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"),
        api_key=os.environ.get("OPENAI_API_KEY", "none"),
    )
    file = client.files.create(file=path, purpose="vision")
    picture: Any = {"type": "image_url", "image_url": {"file_id": file.id}}
    for question in ("What is in the image?", "What color is the shape?"):
        answer = client.chat.completions.create(
            model="saccade-tiny",
            messages=[{"role": "user", "content": [picture, {"type": "text", "text": question}]}],
            temperature=0,
        )
        print(answer.choices[0].message.content)
    client.files.delete(file.id)


if __name__ == "__main__":
    main()
