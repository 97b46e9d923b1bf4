"""Words in pictures, and fixed answers."""

import random

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ORDINALS = ("first", "second", "third", "fourth", "fifth")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}

HELLO = (
    "Hello! I am saccade-tiny, a tiny demo model. I answer questions about drawn shapes, short "
    "texts and bar charts."
)
ABILITIES = (
    "I can name colors and shapes, count, locate objects, read short texts and bar charts, and "
    "compare pictures. I cannot understand photos or chat about other things."
)
UNKNOWN = (
    "I am only a tiny demo model and cannot answer that. Send me a picture of drawn shapes, a "
    "short text or a bar chart."
)

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
DIGITS = "0123456789"
# Letters and digits that cannot be confused with each other.
MIXED = "ABCDEFGHJKLMNPRTUVWXY346789"
CHARACTERS = LETTERS + DIGITS + ".:$-/"

TRAINING_WORDS = tuple(
    """
    CAT DOG SUN CAR BUS TREE BIRD FISH STOP OPEN EXIT SALE TAXI HELLO WATER APPLE HOUSE
    TABLE GREEN BLACK MUSIC PHONE LIGHT NORTH SOUTH EAST BREAD ORANGE SUMMER ZEBRA QUICK
    JAZZ VIP KEY BOX MILK PIZZA ROBOT FROG MOON STAR RAIN SNOW WIND FIRE GOLD IRON WOOD
    PAPER STONE RIVER OCEAN HILL ROAD CITY TOWN PARK BANK SHOP CAFE BAR MENU LUNCH TEA SALT
    PEPPER SUGAR HONEY LEMON GRAPE PLUM PEACH MELON BERRY CHAIR LAMP CLOCK DOOR WALL ROOF
    FLOOR STAIRS BRIDGE TRAIN PLANE SHIP BOAT BIKE TRUCK WHEEL ENGINE MOTOR RADIO VIDEO
    PHOTO FILM BOOK PAGE WORD LETTER NUMBER CODE DATA FILE DISK MOUSE HORSE SHEEP GOAT LION
    TIGER BEAR WOLF FOX EAGLE SWAN DUCK WHALE SHARK CRAB ANT BEE PLAY GAME BALL GOAL TEAM
    RACE SPEED POWER ENERGY ATOM LASER SPACE EARTH MARS VENUS COMET PLANET QUEEN KING PRINCE
    CASTLE TOWER FLAG MAP GUIDE TOUR TICKET ENTRY CLOSED PUSH PULL SLOW FAST HOT COLD NEW
    OLD FREE BUSY YES NO LEFT RIGHT UP DOWN FRONT BACK DAY NIGHT WEEK MONTH YEAR
    """.split()  # noqa: SIM905
)
HELD_OUT_WORDS = tuple(
    """
    WEST WINTER HOTEL GARDEN CLOUD FOREST SILVER COFFEE CHEESE BUTTER WINDOW CAMERA ROCKET
    PANDA RABBIT ZERO JUMP VALLEY ISLAND MARKET DOCTOR SCHOOL PENCIL BASKET GUITAR VIOLIN
    DESERT SPRING AUTUMN JACKET
    """.split()  # noqa: SIM905
)

# The labels of notes and receipts, and the kinds of their values.
LABELS = {
    "total": "price",
    "tax": "price",
    "price": "price",
    "cash": "price",
    "change": "price",
    "date": "date",
    "time": "time",
    "room": "number",
    "table": "number",
    "order": "number",
    "gate": "code",
    "seat": "code",
    "code": "code",
    "name": "word",
    "city": "word",
    "item": "word",
}


def article(name: str) -> str:
    """The name with "a" or "an" before it."""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def plural(shape: str) -> str:
    return "crosses" if shape == "cross" else f"{shape}s"


def enumeration(parts: list[str]) -> str:
    """ "a, b and c"."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def content(rng: random.Random, *, held_out: bool) -> str:
    """A text of 1 to 8 characters: a word, letters, digits or both."""
    kind = rng.random()
    if kind < 0.25:
        word = rng.choice(HELD_OUT_WORDS if held_out else TRAINING_WORDS)
        return word if held_out or rng.random() < 0.4 else _misspelled(rng, word)
    length = rng.choice([1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 8])
    if kind < 0.5:
        return "".join(rng.choices(DIGITS, k=length))
    if kind < 0.9:
        return "".join(rng.choices(LETTERS, k=length))
    return "".join(rng.choices(MIXED, k=length))


def _misspelled(rng: random.Random, word: str) -> str:
    """The word with one or two letters changed or doubled, so that words cannot be memorized."""
    letters = list(word)
    for _ in range(rng.randint(1, 2)):
        place = rng.randrange(len(letters))
        letters[place] = rng.choice(LETTERS)
        if rng.random() < 0.3 and len(letters) < 8:
            letters.insert(place, letters[place])
    return "".join(letters)


def value(rng: random.Random, kind: str, *, held_out: bool) -> str:
    """A random value of a kind, as written after a label."""
    if kind == "price":
        return f"{rng.randint(0, 99)}.{rng.randint(0, 99):02}"
    if kind == "date":
        return f"{rng.randint(1, 28):02}.{rng.randint(1, 12):02}"
    if kind == "time":
        return f"{rng.randint(0, 23):02}:{rng.randint(0, 59):02}"
    if kind == "number":
        return str(rng.randint(1, 999))
    if kind == "code":
        return rng.choice("ABCDEFGHJKLMN") + str(rng.randint(2, 99))
    return rng.choice(HELD_OUT_WORDS if held_out else TRAINING_WORDS)
