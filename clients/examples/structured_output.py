"""Get an answer that conforms to a JSON schema.

    python clients/examples/structured_output.py [FILE]

It uses the server at OPENAI_BASE_URL, by default http://127.0.0.1:8000/v1.
"""

import base64
import json
import os
import sys
from pathlib import Path

from openai import OpenAI

HERE = Path(__file__).parent
SCHEMA = {
    "type": "object",
    "properties": {"color": {"type": "string", "enum": ["red", "green", "blue", "yellow"]}},
    "required": ["color"],
    "additionalProperties": False,
}


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
                    {"type": "text", "text": "What color is the shape?"},
                ],
            }
        ],
        temperature=0,
        max_completion_tokens=64,
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "shape", "schema": SCHEMA, "strict": True},
        },
    )
    print(json.loads(answer.choices[0].message.content or "")["color"])


if __name__ == "__main__":
    main()
