"""Writes a trained network as a folder that can be served, and its learning curve."""

import json
from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib.figure import Figure
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from server.demo.training import vocabulary
from server.demo.training.language import TextConfig
from server.demo.training.network import configuration
from server.demo.training.vision import CELL, DEVIATION, FRAMES, MEAN, MERGE, PATCH, VisionConfig

MIN_PIXELS = (2 * CELL) ** 2
MAX_PIXELS = 640 * 480
MAX_VIDEO_PIXELS = 2 * MAX_PIXELS  # of all frames
_PREFIX = "network."
_SMOOTHED = 15  # lines of the log


def save(weights: dict[str, Tensor], tokenizer: Tokenizer, folder: Path) -> None:
    """Writes everything that a server needs; weights in bfloat16."""
    folder.mkdir(parents=True, exist_ok=True)
    shipped = {
        name.removeprefix(_PREFIX): weight.to(torch.bfloat16).contiguous()
        for name, weight in weights.items()
        if name.startswith(_PREFIX)
    }
    save_file(shipped, folder / "model.safetensors", metadata={"format": "pt"})
    vocabulary.save(tokenizer, folder)
    _write(folder / "config.json", configuration(TextConfig(), VisionConfig()))
    generation = {
        "bos_token_id": vocabulary.END_OF_TEXT,
        "eos_token_id": vocabulary.END,
        "pad_token_id": vocabulary.END_OF_TEXT,
        "do_sample": False,  # read by Transformers
        "temperature": 0.0,  # vLLM's default for requests that set none
    }
    _write(folder / "generation_config.json", generation)
    processor = {
        "processor_class": "Qwen3VLProcessor",
        "patch_size": PATCH,
        "temporal_patch_size": FRAMES,
        "merge_size": MERGE,
        "image_mean": MEAN,
        "image_std": DEVIATION,
        "size": {"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS},
    }
    image = {"image_processor_type": "Qwen2VLImageProcessorFast"} | processor
    _write(folder / "preprocessor_config.json", image)
    video = {"video_processor_type": "Qwen3VLVideoProcessor"} | processor
    video["size"] = {"shortest_edge": MIN_PIXELS, "longest_edge": MAX_VIDEO_PIXELS}
    _write(folder / "video_preprocessor_config.json", video)


def _write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def draw_learning_curve(log: Path) -> None:
    """Draws learning_curve.png beside a log: the loss, and the share of right answers by task."""
    mpl.use("agg")
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    minutes = [line["seconds"] / 60 for line in lines]
    figure = Figure(figsize=(11, 8), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    above.plot(minutes, _smooth([line["losses"].get("answers") for line in lines]))
    above.set(ylabel="loss of the answers", yscale="log")
    tasks = sorted({task for line in lines for task in line["right"]})
    for number, task in enumerate(tasks):
        counts = [line["right"].get(task, [0, 0]) for line in lines]
        style = ("-", "--", ":")[number // 10 % 3]
        below.plot(minutes, _share(counts), style, label=task)
    below.set(xlabel="minutes", ylabel="right answers (training distribution)", ylim=(0, 1.01))
    below.legend(ncols=2, fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(log.with_name("learning_curve.png"), dpi=80)


def _smooth(values: list[float | None]) -> list[float]:
    known: list[float] = []
    smoothed = []
    for value in values:
        if value is not None:
            known.append(value)
        recent = known[-_SMOOTHED:] or [float("nan")]
        smoothed.append(sum(recent) / len(recent))
    return smoothed


def _share(counts: list[list[int]]) -> list[float]:
    shares = []
    for index in range(len(counts)):
        recent = counts[max(0, index + 1 - _SMOOTHED) : index + 1]
        asked = sum(count for _, count in recent)
        shares.append(sum(right for right, _ in recent) / asked if asked else float("nan"))
    return shares
