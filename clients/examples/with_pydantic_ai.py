"""Get an object of a Pydantic class from a picture, with an agent of pydantic-ai.

    python clients/examples/with_pydantic_ai.py [FILE]

It uses the server at OPENAI_BASE_URL, by default http://127.0.0.1:8000/v1.
"""

import os
import sys
from pathlib import Path
from typing import Literal

from pydantic import BaseModel
from pydantic_ai import Agent, BinaryContent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

HERE = Path(__file__).parent


class Shape(BaseModel):
    color: Literal["red", "green", "blue", "yellow"]


def main() -> None:
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "red_circle.png"
    provider = OpenAIProvider(
        base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"),
        api_key=os.environ.get("OPENAI_API_KEY", "none"),
    )
    model = OpenAIChatModel("saccade-tiny", provider=provider)
    # With NativeOutput the server makes the answer conform to the schema.
    agent = Agent(model, output_type=NativeOutput(Shape), model_settings={"temperature": 0})
    picture = BinaryContent.from_path(path)
    answer = agent.run_sync([picture, "What color is the shape?"]).output
    print(answer.color)


if __name__ == "__main__":
    main()
