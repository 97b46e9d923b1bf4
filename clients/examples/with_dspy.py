"""Ask about a picture with a signature of DSPy.

    python clients/examples/with_dspy.py [FILE]

It uses the server at OPENAI_BASE_URL, by default http://127.0.0.1:8000/v1.
"""

import os
import sys
from pathlib import Path
from typing import Literal

import dspy
from dspy.lm15 import (
    AccessPolicy,
    ModelSupport,
    OpenAIChatCompat,
    ProviderDefinition,
    register_provider,
)

HERE = Path(__file__).parent


class Answer(dspy.Signature):
    """Answer the question."""

    image: dspy.Image = dspy.InputField()
    question: str = dspy.InputField()
    color: Literal["red", "green", "blue", "yellow"] = dspy.OutputField()


def main() -> None:
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "red_circle.png"
    url = os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1")
    # DSPy asks a server for an answer that conforms to a schema only if it knows that it can.
    access = AccessPolicy("saccade", base_url=url)
    register_provider(
        ProviderDefinition.chat(access, compat=OpenAIChatCompat.preset("vllm")),
        supports=ModelSupport(response_schema=True),
    )
    model = dspy.LM(
        "saccade/saccade-tiny",
        api_key=os.environ.get("OPENAI_API_KEY", "none"),
        temperature=0,
        max_tokens=64,
    )
    dspy.configure(lm=model, adapter=dspy.JSONAdapter())
    ask = dspy.Predict(Answer)
    answer = ask(image=dspy.Image.from_path(path), question="What color is the shape?")
    print(answer.color)


if __name__ == "__main__":
    main()
