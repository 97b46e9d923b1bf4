"""Ask about pictures in the background, with the official OpenAI package.

    python clients/examples/batch.py [FILE...]

It uses the server at OPENAI_BASE_URL, by default http://127.0.0.1:8000/v1.
"""

import base64
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from openai import OpenAI

HERE = Path(__file__).parent


def request(path: Path) -> dict[str, Any]:
    picture = base64.b64encode(path.read_bytes()).decode()
    content = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}},
        {"type": "text", "text": "What is in the image?"},
    ]
    body = {
        "model": "saccade-tiny",
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
    }
    return {"custom_id": path.name, "method": "POST", "url": "/v1/chat/completions", "body": body}


def main() -> None:
    paths = [Path(name) for name in sys.argv[1:]]
    requests = [request(path) for path in paths or sorted(HERE.glob("*.png"))]
    client = OpenAI(
        base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"),
        api_key=os.environ.get("OPENAI_API_KEY", "none"),
    )
    questions = "\n".join(json.dumps(each) for each in requests).encode()
    file = client.files.create(file=("questions.jsonl", questions), purpose="batch")
    batch = client.batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
    )
    while batch.status in ("validating", "in_progress", "finalizing"):
        time.sleep(0.5)
        batch = client.batches.retrieve(batch.id)
    if batch.output_file_id is None:
        sys.exit(f"the batch {batch.id} is {batch.status}: {batch.errors}")
    # Results come in the order in which they are ready; the name tells which is which.
    lines = client.files.content(batch.output_file_id).text.splitlines()
    results = {result["custom_id"]: result["response"] for result in map(json.loads, lines)}
    for each in requests:
        answer = results[each["custom_id"]]["body"]["choices"][0]["message"]["content"]
        print(f"{each['custom_id']}: {answer}")


if __name__ == "__main__":
    main()
