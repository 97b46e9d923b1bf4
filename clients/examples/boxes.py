"""Map a box in a model's answer back to your picture.

    python clients/examples/boxes.py [FILE]

Models that ground their answers return boxes in pixels of the processed picture, or in a range
of 0 to 1000 over it. `image_details` report the picture's processed size, and the region of the
original that this size covers. `to_original` uses them to map a box back.

It uses the server at OPENAI_BASE_URL, by default http://127.0.0.1:8000/v1.
"""

import base64
import os
import sys
from pathlib import Path
from typing import Any

from openai import OpenAI

HERE = Path(__file__).parent

Box = tuple[float, float, float, float]


def to_original(box: Box, details: dict[str, Any], scale: float | None = None) -> Box:
    """Return `box` (left, top, right, bottom) of the processed picture in pixels of the original.

    `details` is an entry of `image_details`. `scale` is the range of the model's coordinates, such
    as 1000 for Qwen3-VL; None means pixels of the processed picture, as in answers of Qwen2.5-VL.
    """
    width, height = details["processed_width"], details["processed_height"]
    left, top, right, bottom = details["region"]
    across = (right - left) / (scale or width)
    down = (bottom - top) / (scale or height)
    return (
        left + box[0] * across,
        top + box[1] * down,
        left + box[2] * across,
        top + box[3] * down,
    )


def main() -> None:
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "red_circle.png"
    picture = base64.b64encode(path.read_bytes()).decode()
    client = OpenAI(
        base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"),
        api_key=os.environ.get("OPENAI_API_KEY", "none"),
    )
    url = {"url": f"data:image/png;base64,{picture}", "detail": "low"}
    answer = client.chat.completions.create(
        model="saccade-tiny",
        messages=[
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": url},
                    {"type": "text", "text": "What is in the image?"},
                ],
            }
        ],
        extra_body={"include_image_details": True},
    )
    (details,) = (answer.model_extra or {})["image_details"]
    print("{width}x{height} shown as {processed_width}x{processed_height}".format(**details))
    print("the middle half is at", to_original((250, 250, 750, 750), details, scale=1000))


if __name__ == "__main__":
    main()
