"""Ask about the second of two pictures: the model sees them in the order of the parts.

    python clients/examples/two_pictures.py [FILE FILE]

It uses the server at OPENAI_BASE_URL, by default http://127.0.0.1:8000/v1.
"""

import base64
import os
import sys
from pathlib import Path

from openai import OpenAI
from openai.types.chat import ChatCompletionContentPartParam

HERE = Path(__file__).parent


def picture(path: Path) -> ChatCompletionContentPartParam:
    data = base64.b64encode(path.read_bytes()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}


def main() -> None:
    pictures = [HERE / "red_circle.png", HERE / "blue_square.png"]
    first, second = [Path(name) for name in sys.argv[1:]] or pictures
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
                    picture(first),
                    picture(second),
                    {"type": "text", "text": "What is in the second image?"},
                ],
            }
        ],
        temperature=0,
    )
    print(answer.choices[0].message.content)


if __name__ == "__main__":
    main()
