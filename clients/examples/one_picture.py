"""Ask about one picture, with the official OpenAI package.

    python clients/examples/one_picture.py [FILE]

It uses the server at OPENAI_BASE_URL, by default http://127.0.0.1:8000/v1.
"""

import base64
import os
import sys
from pathlib import Path

from openai import OpenAI

HERE = Path(__file__).parent


def main() -> None:
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "red_circle.png"
    picture = base64.b64encode(path.read_bytes()).decode()
    client = OpenAI(
        base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"),
        api_key=os.environ.get("OPENAI_API_KEY", "none"),
    )
    answer = client.chat.completions.create(
        model="saccade-tiny",
        messages=[
            {
                "role": "user",
                "content": [
                    {
                        "type": "image_url",
                        "image_url": {"url": f"data:image/png;base64,{picture}"},
                    },
                    {"type": "text", "text": "What is in the image?"},
                ],
            }
        ],
        temperature=0,
    )
    print(answer.choices[0].message.content)


if __name__ == "__main__":
    main()
