"""A page with a picture and a question, whose answer is shown while it is generated.

    python clients/examples/gradio_app.py

It uses the server at OPENAI_BASE_URL, by default http://127.0.0.1:8000/v1, and prints its own
address. GRADIO_SERVER_PORT selects its port.
"""

import base64
import os
from collections.abc import Iterator
from pathlib import Path

import gradio as gr
from openai import OpenAI

HERE = Path(__file__).parent
CLIENT = OpenAI(
    base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"),
    api_key=os.environ.get("OPENAI_API_KEY", "none"),
)


def ask(path: str, question: str) -> Iterator[str]:
    picture = base64.b64encode(Path(path).read_bytes()).decode()
    stream = CLIENT.chat.completions.create(
        model="saccade-tiny",
        messages=[
            {
                "role": "user",
                "content": [
                    {
                        "type": "image_url",
                        "image_url": {"url": f"data:image/png;base64,{picture}"},
                    },
                    {"type": "text", "text": question},
                ],
            }
        ],
        temperature=0,
        stream=True,
    )
    answer = ""
    for chunk in stream:
        answer += chunk.choices[0].delta.content or ""
        yield answer


app = gr.Interface(
    ask,
    inputs=[
        gr.Image(type="filepath", label="Picture"),
        gr.Textbox("What is in the image?", label="Question"),
    ],
    outputs=gr.Textbox(label="Answer"),
    examples=[[str(HERE / "red_circle.png"), "What is in the image?"]],
    cache_examples=False,
    flagging_mode="never",
    api_name="ask",
)

if __name__ == "__main__":
    app.launch()
