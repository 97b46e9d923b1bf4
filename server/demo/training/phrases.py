"""The wordings of questions: some for training, others only for the evaluation.

Slots: {object} "red circle", {other} likewise, {shape}, {shapes}, {color}, {label},
{line} "second", {ordinal} "third", {number} "3", {keys} "color and shape".
"""

import random
import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Wordings:
    """The wordings of one question."""

    training: tuple[str, ...]
    held_out: tuple[str, ...]


def _wordings(training: str, held_out: str) -> Wordings:
    def lines(text: str) -> tuple[str, ...]:
        return tuple(line.strip() for line in text.strip().splitlines())

    return Wordings(lines(training), lines(held_out))


WORDINGS: dict[str, Wordings] = {
    "color": _wordings(
        """What color is the {shape}?
        What is the color of the {shape}?
        Which color does the {shape} have?
        What colour is the {shape}?
        Tell me the color of the {shape}.
        Name the color of the {shape}.
        Color of the {shape}?
        The {shape} is which color?
        In which color is the {shape} drawn?
        Look at the {shape}. What color is it?""",
        """Which colour is the {shape}?
        Can you tell what color the {shape} has?
        What color does the {shape} have?
        Please say the color of the {shape}.""",
    ),
    "color_only": _wordings(
        """What color is the object?
        What color is it?
        What is the color of the shape?
        What color is the shape?
        Which color do you see?
        What colour is this shape?
        Name the color of the object.
        Tell me the color.
        Which color has the shape?""",
        """Which color is the object?
        What is the color of this object?
        Tell me the color of the shape.
        What colour is the object?""",
    ),
    "shape": _wordings(
        """What shape is the {color} object?
        Which shape is {color}?
        What is the {color} shape?
        What is the shape of the {color} object?
        Name the shape of the {color} object.
        Tell me the shape of the {color} one.
        What {color} shape is there?
        What kind of shape is the {color} one?
        Which {color} shape do you see?""",
        """Which shape is the {color} object?
        Tell me what shape the {color} object is.
        The {color} object has which shape?
        What kind of shape is {color}?""",
    ),
    "shape_only": _wordings(
        """What shape is it?
        What shape is in the image?
        What shape is this?
        Which shape is shown?
        Name the shape.
        What is the shape of the object?
        What kind of shape is it?
        Which shape do you see?
        Tell me the shape.""",
        """Which shape is this?
        What shape is shown in the picture?
        Tell me the shape of the object.
        What shape do you see?""",
    ),
    "what": _wordings(
        """What is in the image?
        What is this?
        What do you see?
        What is shown in the picture?
        What does the image show?
        What is in this picture?
        What can you see in the image?
        What object is this?
        Tell me what you see.
        What is it?
        What's in this image?
        What is there in the photo?""",
        """What is shown here?
        What's in the picture?
        What do you see in this image?
        Tell me what is in the image.""",
    ),
    "background": _wordings(
        """What color is the background?
        What is the background color?
        Which color is the background?
        What colour is the background?
        Tell me the background color.
        What is behind the object?
        Name the color of the background.
        On which background is it?
        Background color?""",
        """What is the color of the background?
        Which background color do you see?
        What color does the background have?
        Please name the background color.""",
    ),
    "yes_no": _wordings(
        """Is there a {object}?
        Is there a {object} in the image?
        Do you see a {object}?
        Can you see a {object} in the picture?
        Does the image show a {object}?
        Is a {object} in the picture?
        Does the picture contain a {object}?
        Is a {object} shown here?
        Yes or no: is there a {object}?""",
        """Does this image contain a {object}?
        Can you see a {object}?
        Is a {object} visible?
        Is there a {object} in this picture?""",
    ),
    "count": _wordings(
        """How many objects are there?
        How many shapes are in the image?
        Count the shapes.
        How many objects do you see?
        How many shapes are there?
        How many shapes can you see?
        Count the objects in the image.
        What is the number of shapes?
        Number of objects?
        Tell me how many shapes there are.
        How many things are in the picture?
        How many of them are there?
        What is the number of things in the picture?
        Count what you see.
        Tell me the number of objects.
        How many objects does the image show?""",
        """How many objects are in the picture?
        Count all the shapes.
        How many shapes do you see here?
        What is the number of objects in the image?""",
    ),
    "count_kind": _wordings(
        """How many {shapes} are there?
        How many {shapes} are in the image?
        Count the {shapes}.
        How many {shapes} do you see?
        What is the number of {shapes}?
        Number of {shapes}?
        Tell me how many {shapes} there are.
        How many {shapes} can you see in the picture?""",
        """How many {shapes} are in the picture?
        Count all the {shapes}.
        How many {shapes} do you see here?
        How many of the objects are {shapes}?""",
    ),
    "position": _wordings(
        """Where is the {object}?
        Where is the {object} in the image?
        In which part of the image is the {object}?
        What is the position of the {object}?
        Where do you see the {object}?
        In which part of the picture is the {object}?
        Tell me where the {object} is.
        Position of the {object}?
        Where in the picture is the {object}?""",
        """In what part of the image is the {object}?
        Where can you see the {object}?
        Tell me the position of the {object}.
        Where is the {object} in the picture?""",
    ),
    "side": _wordings(
        """Is the {object} to the left or to the right of the {other}?
        Where is the {object} relative to the {other}?
        Where is the {object} compared to the {other}?
        On which side of the {other} is the {object}?
        Seen from the {other}, where is the {object}?
        Is the {object} left or right of the {other}?
        How is the {object} placed relative to the {other}?
        Which side of the {other} is the {object} on?
        Look at the {other}. Is the {object} to its left or to its right?
        Compared to the {other}, where is the {object}?
        Left or right: where is the {object}, seen from the {other}?
        Take the {other}. Where is the {object}?
        Is it left or right of the {other}, the {object}?
        To which side of the {other} is the {object} drawn?
        From the {other}, on which side do you see the {object}?
        What side of the {other} is the {object} at?
        Tell me where the {object} is, compared to the {other}.
        Does the {object} lie to the left or to the right of the {other}?
        Next to the {other}, is the {object} on the left or on the right?
        Tell me on which side of the {other} the {object} is.
        Left or right of the {other}, where do you see the {object}?
        Left or right of the {other}: how is the {object} placed?
        Left of the {other} or right of it: tell me how the {object} lies.
        To the left or to the right of the {other}, where does the {object} lie?
        Say left or right of the {other}: on which side do you see the {object}?
        On the left or on the right of the {other}, where does the {object} lie?
        Do you see the {object} on the left or on the right, seen from the {other}?""",
        """Is the {object} on the left or the right of the {other}?
        On what side of the {other} is the {object}?
        Relative to the {other}, where is the {object}?
        Where is the {object} placed relative to the {other}?""",
    ),
    "height": _wordings(
        """Is the {object} above or below the {other}?
        Where is the {object} vertically, above or below the {other}?
        Is the {object} higher or lower than the {other}? Say above or below.
        Does the {object} lie above or below the {other}?
        Above or below: where is the {object} compared to the {other}?
        Is the {object} placed above or below the {other}?
        Look at the {other}. Is the {object} above or below it?
        Compared to the {other}, is the {object} above or below?
        Is it above or below the {other}, the {object}?
        Seen from the {other}, is the {object} above or below?
        Take the {other}. Is the {object} higher or lower? Say above or below.
        Below or above the {other}, where do you see the {object}?
        Tell me where the {object} is, above or below the {other}.
        Say above or below: where is the {object}, seen from the {other}?
        Which is it for the {object}, above or below the {other}?
        Do you find the {object} above the {other} or below it?
        From the {other}, must you look above or below for the {object}?
        Can you say if the {object} lies above or below the {other}?
        Higher or lower than the {other}: how is the {object} placed? Say above or below.
        Above the {other} or below it: tell me how the {object} lies.
        Below or above the {other}: how does the {object} lie?
        Say above or below the {other}: on which side do you see the {object}?
        Below the {other} or above it, where does the {object} lie?""",
        """Above or below the {other}: where is the {object}?
        Is the {object} drawn above or below the {other}?
        Do you see the {object} above or below the {other}?
        Tell me if the {object} is above or below the {other}.""",
    ),
    "at_side": _wordings(
        """What is on the {side}?
        Which object is on the {side}?
        What object is on the {side} side?
        What do you see on the {side}?
        What is at the {side}?
        Which shape is on the {side}?
        Name the object on the {side}.""",
        """What can you see on the {side}?
        Which object do you see on the {side}?
        What is on the {side} side?
        Tell me what is on the {side}.""",
    ),
    "caption": _wordings(
        """Describe the image.
        Describe this image in one sentence.
        Write a short caption.
        Caption this image.
        Describe the picture.
        Give a caption.
        Describe what you see.
        Write a caption for this picture.
        Give a short description of the image.
        Please describe the picture.""",
        """Describe this picture.
        Write a short caption for the image.
        Give a description of this picture.
        Describe the image in a sentence.""",
    ),
    "box": _wordings(
        """Give the bounding box of the {object}.
        Locate the {object}.
        Where exactly is the {object}? Give a bounding box.
        Return the box of the {object}.
        Detect the {object}.
        What is the bounding box of the {object}?
        Find the {object} and give its box.
        Give the coordinates of the {object}.
        Box of the {object}?
        Draw a bounding box around the {object}.""",
        """Return the bounding box of the {object}.
        Find the {object} and return a bounding box.
        Give me the box of the {object}.
        What are the coordinates of the {object}?""",
    ),
    "json": _wordings(
        """Give the {keys} as JSON.
        Return JSON with the {keys}.
        Answer in JSON with {keys}.
        Write the {keys} as JSON.
        Describe the image as JSON with {keys}.
        JSON with {keys}, please.
        Output the {keys} in JSON.
        Return a JSON object with {keys}.""",
        """Give JSON with the {keys}.
        Return the {keys} as JSON.
        Answer with a JSON object: {keys}.
        Write JSON with the {keys}.""",
    ),
    "read": _wordings(
        """What does the text say?
        Read the text.
        What is written in the image?
        What text is in the image?
        Transcribe the text.
        Read the image.
        What is the text?
        What does it say?
        Which text do you see?
        What is written here?
        Tell me what is written.
        OCR this image.
        What letters or digits do you see?
        Read what is written in the picture.""",
        """What is the text in the image?
        Which text is written here?
        Read the text in the picture.
        What does the image say?""",
    ),
    "read_label": _wordings(
        """What is the {label}?
        Read the {label}.
        What does the {label} line say?
        What is written after {label}?
        Tell me the {label}.
        Which {label} is on the note?
        What {label} does it show?
        Find the {label}.
        Give the {label}.""",
        """Which {label} is written there?
        What is written for the {label}?
        Read me the {label}.
        What {label} do you see?""",
    ),
    "read_line": _wordings(
        """Read the {line} line.
        What does the {line} line say?
        What is in the {line} line?
        What is written in line {number}?
        Read line {number}.
        What does line {number} say?
        Transcribe the {line} line.""",
        """What is written in the {line} line?
        Tell me what line {number} says.
        Which text is in line {number}?
        What text is in the {line} line?""",
    ),
    "tallest": _wordings(
        """Which bar is the tallest?
        What color is the tallest bar?
        Which bar is the highest?
        Which color has the largest value?
        Which is the tallest bar?
        What is the color of the highest bar?
        Name the tallest bar.
        Which bar has the highest value?
        Which bar is the largest?""",
        """What color is the highest bar?
        Which color has the highest bar?
        Which bar has the largest value?
        Tell me the tallest bar.""",
    ),
    "shortest": _wordings(
        """Which bar is the shortest?
        What color is the shortest bar?
        Which bar is the lowest?
        Which color has the smallest value?
        Which is the shortest bar?
        What is the color of the lowest bar?
        Name the shortest bar.
        Which bar has the lowest value?
        Which bar is the smallest?""",
        """What color is the lowest bar?
        Which color has the lowest bar?
        Which bar has the smallest value?
        Tell me the shortest bar.""",
    ),
    "value": _wordings(
        """What value is printed on the {color} bar?
        What is the value of the {color} bar?
        Which value has the {color} bar?
        Read the value of the {color} bar.
        What number is on the {color} bar?
        How much is the {color} bar?
        Value of the {color} bar?""",
        """Which value is printed on the {color} bar?
        Tell me the value of the {color} bar.
        Which number is on the {color} bar?
        What value does the {color} bar have?""",
    ),
    "bars": _wordings(
        """How many bars are there?
        Count the bars.
        How many bars does the chart have?
        How many bars do you see?
        What is the number of bars?""",
        """How many bars are in the chart?
        Count all the bars.
        How many bars can you see?
        What number of bars does it have?""",
    ),
    "nth_what": _wordings(
        """What is in the {ordinal} image?
        What is in image {number}?
        What is shown in picture {number}?
        What do you see in the {ordinal} picture?
        What does the {ordinal} image show?
        What is in the {ordinal} picture?
        Describe image {number}.
        Tell me what is in picture {number}.
        What is in picture {number}?
        What can you see in the {ordinal} image?
        Tell me what you see in the {ordinal} image.
        Tell me what is shown in the {ordinal} picture.
        Say what the {ordinal} image shows.
        Say what picture {number} shows.
        What is the content of image {number}?
        Name what is in the {ordinal} picture.
        The {ordinal} image: what does it show?
        What can be seen in picture {number}?""",
        """What is shown in the {ordinal} image?
        What does picture {number} show?
        What do you see in image {number}?
        Tell me what the {ordinal} picture shows.""",
    ),
    "nth_color": _wordings(
        """What color is the object in the {ordinal} image?
        What is the color in picture {number}?
        Which color is the shape in image {number}?
        What color is the shape in the {ordinal} picture?
        What is the color of the object in image {number}?
        Tell me the color in the {ordinal} image.
        Name the color of the object in picture {number}.
        Say which color the object in the {ordinal} image has.
        The {ordinal} picture: which color is the object?""",
        """Which color is the object in the {ordinal} picture?
        What color do you see in image {number}?
        What is the color of the shape in the {ordinal} image?
        Tell me the color of the object in picture {number}.""",
    ),
    "nth_shape": _wordings(
        """What shape is in the {ordinal} image?
        Which shape is in picture {number}?
        What shape is shown in image {number}?
        What is the shape in the {ordinal} picture?
        What shape do you see in image {number}?
        Tell me the shape in the {ordinal} picture.
        Name the shape of the object in image {number}.
        Say which shape is in the {ordinal} image.
        The {ordinal} picture: which shape does it show?""",
        """Which shape is in the {ordinal} picture?
        What shape does picture {number} show?
        What is the shape in image {number}?
        Tell me the shape in the {ordinal} image.""",
    ),
    "nth_read": _wordings(
        """What text is in the {ordinal} image?
        Read the text in picture {number}.
        What is written in the {ordinal} image?
        What does the text in image {number} say?
        Read the {ordinal} image.
        Read image {number}.
        Read what is written in picture {number}.
        Tell me the text in the {ordinal} image.
        Which text does image {number} show?
        Transcribe the text of the {ordinal} picture.""",
        """Which text is in the {ordinal} picture?
        What is written in picture {number}?
        What does the text in the {ordinal} image say?
        Read the text in image {number}.""",
    ),
    "same": _wordings(
        """Do both images show the same {aspect}?
        Is the {aspect} the same in both images?
        Do the two pictures have the same {aspect}?
        Same {aspect} or not?
        Are the {aspect}s the same?
        Is the {aspect} in the pictures the same?
        Do the pictures show the same {aspect}?
        Have the two images the same {aspect}?
        Is the {aspect} of the first picture also that of the second one?
        Do they have the same {aspect}?
        Both pictures: is the {aspect} the same?""",
        """Do the two images show the same {aspect}?
        Is it the same {aspect} in both pictures?
        Have both images the same {aspect}?
        Is the {aspect} of both pictures the same?""",
    ),
    "same_or_different": _wordings(
        """Are the {aspect}s the same or different?
        Is the {aspect} the same or different?
        Same or different {aspect}?
        Is the {aspect} in the two images the same or different?
        Do the pictures show the same or a different {aspect}?
        The {aspect} in both pictures: the same or different?
        Tell me if the {aspect}s are the same or different.
        Have the two images the same or a different {aspect}?
        Compare the {aspect}s: same or different?""",
        """Same or different: the {aspect} in both images?
        Are the two {aspect}s the same or different?
        Is the {aspect} of the two pictures the same or different?
        Do the images show the same or a different {aspect}?""",
    ),
    "which": _wordings(
        """Which image has a {object}?
        Which picture shows a {object}?
        In which image is the {object}?
        Which one has a {object}?
        Which of the images shows a {object}?
        Where is the {object}, in which picture?
        Which image contains a {object}?
        Tell me which image shows a {object}.
        In which one is there a {object}?
        Which one of the pictures has a {object}?
        Find the {object}. In which image is it?
        The {object} is in which picture?""",
        """Which picture has a {object}?
        Which one shows the {object}?
        In which picture do you see a {object}?
        Which of the pictures contains a {object}?""",
    ),
    "how_many_images": _wordings(
        """How many images are there?
        How many pictures do you see?
        How many images did I send?
        Count the images.""",
        """How many pictures are there?
        How many images do you see?
        Count the pictures.
        How many pictures did I send?""",
    ),
    "motion": _wordings(
        """In which direction does the {shape} move?
        Where does the object move?
        Which way does the {shape} go?
        What is the direction of motion?
        In which direction does it move?
        Where is the {shape} going?
        What direction is the {shape} moving in?
        How does the object move?
        Direction of the motion?""",
        """Which direction does the {shape} move in?
        Which way is the object moving?
        In what direction does the {shape} go?
        Tell me the direction of the motion.""",
    ),
}

# What is said without a picture.
CHAT: dict[str, Wordings] = {
    "hello": _wordings(
        """Hello
        Hi
        Hello!
        Hi there!
        Hey
        Good morning
        Hello, who are you?
        Who are you?
        What are you?
        What is your name?
        Hi, how are you?
        How are you?
        Good evening
        Introduce yourself.
        hello
        hi
        Greetings!
        What model are you?
        Which model is this?
        Say hello.
        Nice to meet you.""",
        """Hello there!
        Hi!
        Hello, what is your name?
        Good morning!
        Hey, who are you?""",
    ),
    "abilities": _wordings(
        """What can you do?
        What can you not do?
        How can you help me?
        Help
        What are you able to do?
        What do you know?
        What are your limits?
        Tell me what you can do.
        What can I ask you?
        What questions can you answer?
        Can you help me?
        What is this demo?
        What are you good at?
        Which tasks can you do?
        Explain what you can do.
        help""",
        """What can you do for me?
        What are you able to answer?
        Tell me what you know.
        Which questions can I ask you?""",
    ),
    "other": _wordings(
        """Tell me a joke.
        What is the capital of France?
        Write a poem.
        Who is the king?
        Write a poem about the sea.
        What is 2 plus 2?
        Write Python code.
        Why?
        What time is it?
        Translate this to German.
        How is the weather?
        Count.
        What is the meaning of life?
        Summarize this text.
        Tell me a story.
        Continue.
        Who won the game?
        Write an email.
        Explain gravity.
        Sing a song.
        What is the news?
        What do you think?
        Give me advice.
        Say something.
        Where is Paris?
        Is it raining?
        Recommend a book.
        Solve this equation.""",
        """What is the capital of Spain?
        Tell me a story about the sea.
        What is 3 plus 5?
        Write a song.""",
    ),
}

BEFORE = ("Please look at the image. ", "Question: ", "Look closely. ", "Hi! ", "Please answer. ")
AFTER = (
    " Answer briefly.",
    " Answer with one word.",
    " Be concise.",
    " Answer in a few words.",
    " Only give the answer.",
    " Please.",
    " Thanks!",
)
SYSTEM = (
    "You are a helpful assistant.",
    "You are a helpful assistant. Answer briefly.",
    "Answer the question about the image.",
    "Be concise.",
    "You answer questions about pictures in a few words.",
)


_SIDE = "above|below|left|right|higher|lower"
_ALTERNATIVES = re.compile(rf"\b({_SIDE}) or ({_SIDE})\b", re.IGNORECASE)


def _swapped(found: re.Match[str]) -> str:
    """ "Below or above" for "Above or below"."""
    one, other = found.groups()
    return f"{other.capitalize() if one[0].isupper() else other} or {one.lower()}"


def wording(rng: random.Random, question: str, *, held_out: bool, **slots: str) -> str:
    """One wording of a question. In training, its case and the text around it vary too."""
    wordings = WORDINGS[question]
    text = rng.choice(wordings.held_out if held_out else wordings.training).format(**slots)
    text = text.replace(" a orange", " an orange")
    if held_out:
        return text
    if rng.random() < 0.4:  # the order of two alternatives means nothing
        text = _ALTERNATIVES.sub(_swapped, text)
    if rng.random() < 0.1:
        text = text[0].lower() + text[1:]
    if rng.random() < 0.1:
        text = text.rstrip("?.")
    if rng.random() < 0.08:
        text = rng.choice(BEFORE) + text
    if rng.random() < 0.12:
        text += rng.choice(AFTER)
    return text
