"""Scores of the demo model's answers; its evaluation always asks the same questions."""

import json
import subprocess
import sys

import numpy as np
import pytest
from vllm.multimodal.video import VIDEO_LOADER_REGISTRY

from server.demo import media
from server.demo.scoring import OUTSIDE, Answer, score
from server.demo.training import asking, report, words
from server.demo.training.examples import TASKS
from server.demo.training.report import BARS, Outcome

BOX = "[100, 100, 300, 300]"
FACTS = '{"color": "red", "count": 1}'
DIGEST = """
import hashlib, sys
from server.demo.training import asking
made = [repr(asking.prepare(7, task, 3)) for task in sys.argv[1:]]
print(hashlib.sha256("".join(made).encode()).hexdigest())
"""


@pytest.mark.parametrize(
    ("task", "expected", "got", "right"),
    [
        ("color", "red", " red\n", 1),
        ("color", "red", "Red", 0),
        ("color", "red", "a red", 0),
        ("read", "A1", "A1", 1),
        ("chat", words.HELLO, words.HELLO, 1),
        ("chat", words.HELLO, words.ABILITIES, 0),
        ("outside", OUTSIDE, OUTSIDE, 1),
        ("outside", OUTSIDE, "This is not for a tiny demo model.", 1),
        ("outside", OUTSIDE, "a red circle", 0),
        ("json", FACTS, '{"count":1,"color":"red"}', 1),
        ("json", FACTS, '{"color": "red", "count": "1"}', 0),
        ("json", FACTS, '{"color": "red", "count": true}', 0),
        ("json", FACTS, '{"color": "red"}', 0),
        ("json", FACTS, '{"color": "red", "count": 1', 0),
        ("box", BOX, BOX, 1),
        ("box", BOX, "[100,100,300,200]", 1 / 2),
        ("box", BOX, "[200, 200, 400, 400]", 1 / 7),
        ("box", BOX, "[300, 100, 500, 300]", 0),
        ("box", BOX, "[400, 400, 500, 500]", 0),
        ("box", BOX, "[300, 300, 100, 100]", 0),
        ("box", BOX, "[100, 100, 300]", 0),
        ("box", BOX, "[100, 100, 300, 300, 300]", 0),
        ("box", BOX, '[100, 100, 300, "300"]', 0),
        ("box", BOX, "[100, 100, 300, Infinity]", 0),
        ("box", BOX, "100, 100, 300, 300", 0),
        ("box", BOX, "300", 0),
    ],
)
def test_answers_are_scored(task, expected, got, right):
    assert score(task, expected, got) == pytest.approx(right)


def answers(task, right, wrong, size=""):
    said = ["yes"] * right + ["no"] * wrong
    return [Answer(task, f"{number}?", "yes", got, size) for number, got in enumerate(said)]


def test_a_task_passes_at_its_threshold():
    assert Outcome("color", answers("color", 19, 1)).passed
    assert not Outcome("color", answers("color", 18, 2)).passed
    assert Outcome("value", answers("value", 0, 1)).passed
    assert set(BARS) < set(TASKS)


def test_the_table_has_separate_scores_for_each_size():
    mixed = [*answers("color", 3, 1, "224x224"), *answers("color", 1, 3, "larger")]
    shown = ("color", "0.500", "0.95", "8", "MISS", "0.750", "0.250")
    assert report.cells(Outcome("color", mixed)) == shown
    small = Outcome("color", answers("color", 2, 0, "224x224"))
    assert report.cells(small) == ("color", "1.000", "0.95", "2", "pass", "1.000", "-")
    assert report.cells(Outcome("chat", answers("chat", 1, 1)))[1:] == (
        "0.500",
        "-",
        "2",
        "",
        "-",
        "-",
    )


def test_reading_is_scored_by_length():
    read = [Answer("read", "?", text, "AB") for text in ("AB", "ABC", "CD")]
    assert report.by_length(Outcome("read", read)) == {"2": (0.5, 2), "3": (0, 1)}


def test_the_result_contains_the_first_wrong_answers_of_a_task():
    outcomes = [Outcome("color", answers("color", 1, 30)), Outcome("what", answers("what", 2, 0))]
    found = json.loads(json.dumps(report.result(outcomes, seed=5)))
    assert list(found["misses"]) == ["color"]
    assert found["misses"]["color"] == [
        {"question": f"{number}?", "expected": "yes", "got": "no"} for number in range(1, 21)
    ]
    assert found["scores"]["what"]["passed"]
    assert not found["scores"]["color"]["passed"]
    assert found["seed"] == 5


def test_writing_the_table_leaves_the_rest_of_the_card_unchanged():
    outcomes = [Outcome("color", answers("color", 1, 1))]
    card = "# Model\n<!-- scores -->\nold\n<!-- /scores -->\nend\n"
    filled = report.filled_card(card, outcomes)
    assert filled.startswith("# Model\n<!-- scores -->\n| task | score | bar | n |")
    assert filled.endswith("|\n<!-- /scores -->\nend\n")
    assert "| color | 0.500 | 0.95 | 2 |" in filled
    assert "old" not in filled
    assert report.filled_card(filled, outcomes) == filled
    with pytest.raises(ValueError, match="<!-- scores -->"):
        report.filled_card("# Model\n", outcomes)


@pytest.mark.parametrize("task", TASKS)
def test_every_task_has_examples(task):
    for index in range(4):
        asked = asking.prepare(1, task, index)
        kinds = [part["type"] for part in asked.content]
        assert kinds.pop() == "text"
        assert asked.content[-1]["text"] == asked.question
        if task == "motion":
            assert kinds == ["video_url"]
        elif task == "pair":
            assert len(kinds) >= 2
        else:
            assert len(kinds) == (task != "chat")
        assert (asked.size == "") == (task == "chat")
        assert score(task, asked.expected, asked.expected) == 1


def test_examples_depend_only_on_seed_task_and_number():
    """Not on the process, its string hashes or earlier examples."""
    tasks = ["json", "pair", "read", "motion", "outside"]
    command = [sys.executable, "-c", DIGEST]
    digests = [
        subprocess.run(
            [*command, *order],
            env={"PYTHONHASHSEED": number},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for number, order in (("1", tasks), ("2", tasks))
    ]
    assert digests[0] == digests[1]
    first = asking.prepare(7, "json", 3)
    assert first != asking.prepare(7, "json", 4)
    assert first != asking.prepare(8, "json", 3)
    assert first == asking.prepare(7, "json", 3)


@pytest.mark.parametrize("count", range(4, 9))
def test_the_model_gets_every_frame_of_a_clip(count):
    made = (asking.example(1, "motion", index).pictures[0].frames for index in range(20))
    frames = (next(made) * 2)[:count]
    shown, about = VIDEO_LOADER_REGISTRY.load("qwen3_vl").load_bytes(media.mp4(frames))
    assert about["frames_indices"] == list(range(count))
    assert about["fps"] == media.CLIP_FPS
    drawn = np.stack([np.asarray(frame) for frame in frames])
    assert np.abs(shown.astype(int) - drawn).mean() < 4  # levels of 256
    others = np.roll(drawn, 1, axis=0)
    assert np.abs(shown.astype(int) - drawn).sum() < np.abs(shown.astype(int) - others).sum()
