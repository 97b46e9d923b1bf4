"""Ask about one picture with nothing but an HTTP client.

python clients/examples/plain_httpx.py
"""

import base64
import os
from pathlib import Path

import httpx

HERE = Path(__file__).parent


def main() -> None:
    picture = base64.b64encode((HERE / "red_circle.png").read_bytes()).decode()
    base_url = os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1")
    response = httpx.post(
        f"{base_url}/chat/completions",
        json={
            "model": "saccade-tiny",
            "temperature": 0,
            "messages": [
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
        },
        timeout=60,
    )
    response.raise_for_status()
    print(response.json()["choices"][0]["message"]["content"])


if __name__ == "__main__":
    main()
