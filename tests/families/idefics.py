"""Idefics3 and SmolVLM."""

from pathlib import Path

from tests.families.parts import (
    END_OF_TEXT,
    HALF,
    LANCZOS,
    Maker,
    language_model,
    save_image_processor,
    save_json,
    save_model,
    save_tokenizer,
    vision_tower,
)


def _idefics3(directory: Path) -> None:
    _idefics_like(directory, "idefics3", "Idefics3", tile=112, scale_factor=2)


def _smolvlm(directory: Path) -> None:
    _idefics_like(directory, "smolvlm", "SmolVLM", tile=126, scale_factor=3)


def _idefics_like(
    directory: Path, model_type: str, name: str, *, tile: int, scale_factor: int
) -> None:
    """The longer edge to four tiles, split into tiles row by row, then the whole picture."""
    cells = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    markers = ["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>"]
    vocabulary = save_tokenizer(directory, image="<image>", special=[*markers, *cells])
    save_model(
        directory,
        model_type,
        text_config=language_model(vocabulary, model_type="llama"),
        vision_config=vision_tower(tile),
        image_token_id=vocabulary["<image>"],
        scale_factor=scale_factor,
        pad_token_id=vocabulary[END_OF_TEXT],
    )
    split = {
        "size": {"longest_edge": 4 * tile},
        "max_image_size": {"longest_edge": tile},
        "do_pad": True,
        "resample": LANCZOS,
        "image_mean": HALF,
        "image_std": HALF,
    }
    save_image_processor(
        directory,
        f"{name}ImageProcessor",
        f"{name}Processor",
        do_image_splitting=True,
        **split,
    )
    save_json(
        directory / "processor_config.json",
        processor_class=f"{name}Processor",
        image_seq_len=(tile // 14 // scale_factor) ** 2,
    )


FAMILIES: dict[str, Maker] = {
    "idefics3": _idefics3,
    "smolvlm": _smolvlm,
}
