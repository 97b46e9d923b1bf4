"""Get an object of a Pydantic class from a picture, with instructor.

    python clients/examples/with_instructor.py [FILE]

It uses the server at OPENAI_BASE_URL, by default http://127.0.0.1:8000/v1.
"""

import os
import sys
from pathlib import Path
from typing import Literal

import instructor
from openai import OpenAI
from pydantic import BaseModel

HERE = Path(__file__).parent


class Shape(BaseModel):
    color: Literal["red", "green", "blue", "yellow"]


def main() -> None:
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "red_circle.png"
    openai = OpenAI(
        base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"),
        api_key=os.environ.get("OPENAI_API_KEY", "none"),
    )
    # In this mode the server makes the answer conform to the schema.
    client = instructor.from_openai(openai, mode=instructor.Mode.JSON_SCHEMA)
    answer = client.chat.completions.create(
        model="saccade-tiny",
        response_model=Shape,
        messages=[
            {
                "role": "user",
                "content": [instructor.Image.from_path(path), "What color is the shape?"],
            }
        ],
        temperature=0,
        max_tokens=64,
    )
    print(answer.color)


if __name__ == "__main__":
    main()
