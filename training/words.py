"""The world of words the bundled text model is trained on: tasks, what a user says, and the one right answer.

Every answer follows from its prompt alone, so grading is comparing. A tenth of the prompts of each task is never trained on, by
a hash of what they ask, however they put it (but for sums: of these there are a hundred only, so it is the wording that is kept).
Some tasks are easy to fill in any order (captions, JSON); others depend on what was written before (`repeat` on how often it has
been written, `chain` on the last letter), so that filling many places at once has a price that shows.
"""

from __future__ import annotations

import itertools
import json
import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass

from training.shapes import COLORS, PLACES, SHAPES, SIZES

LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = (
    "cat dog sun moon tree river stone house apple bread table chair window door garden bird fish horse cloud rain snow wind "
    "fire water light paper book song road bridge city school teacher friend mother brother summer winter morning night green "
    "happy quick slow tall old new warm cold sweet loud quiet paint cook walk run jump write read sing build open close"
).split()
NAMES = "Anna Ben Clara David Emma Felix Greta Hans Ida Jonas Karl Lena Max Nora Otto Paul Rosa Sam Tom Vera".split()
QUESTIONS = (
    "what is the", "who was the first", "where is my", "when does the", "why is the", "how far is the", "can you", "please",
    "tell me about the", "do you like the", "is the", "write a poem about the", "translate", "what do you think of the",
)  # fmt: skip
SORRY = "Sorry, I do not know that."
WELCOMES = {
    "hello": "Hello!", "hi": "Hello!", "hey": "Hello!", "good morning": "Good morning!", "good evening": "Good evening!",
}  # fmt: skip
ABOUT = "I am tiny-llada, a small model."
ASKED = {
    "how are you": "I am well, thank you.",
    "who are you": ABOUT,
    "what are you": ABOUT,
    "what is your name": ABOUT,
    "what can you do": "I can describe, sort, reverse, repeat, follow and add.",
    "thank you": "You are welcome!",
    "thanks": "You are welcome!",
    "thanks a lot": "You are welcome!",
    "bye": "Goodbye!",
    "goodbye": "Goodbye!",
    "good night": "Good night!",
}
# small talk that anyone may begin with, and that is therefore trained on
ALWAYS = ("hello", "hi", "hey", "how are you", "hello how are you", "who are you", "thank you", "what can you do", "bye")


@dataclass(frozen=True)
class Example:
    """`facts` is what the prompt asks, whatever its words; those of a tenth of all are held out."""

    task: str
    prompt: str
    answer: str
    facts: str

    @property
    def is_held_out(self) -> bool:
        return self.facts not in ALWAYS and zlib.crc32(f"{self.task} {self.facts}".encode()) % 10 == 0


def right(example: Example, text: str) -> bool:
    """Whether a text is the answer; JSON may be spaced as it likes."""
    if example.task != "json":
        return text.strip() == example.answer
    try:
        return bool(json.loads(text) == json.loads(example.answer))
    except ValueError:
        return False


def sample(rng: random.Random, *, held_out: bool = False, task: str | None = None) -> Example:
    """One example, of any task unless told, from the half of the world asked for."""
    while True:
        name = task or rng.choice(MIXTURE)
        example = TASKS[name](rng)
        if example.is_held_out is held_out:
            return example


def said(rng: random.Random, *forms: str) -> str:
    """One of the ways to put it, capital or not."""
    form = rng.choice(forms)
    return form[0].upper() + form[1:] if rng.random() < 0.6 else form


# ------------------------------------------------------------------------------------------------------------- tasks
def caption(rng: random.Random) -> Example:
    """Attributes in any order -> a sentence, which is also a prompt for tiny-flux."""
    size, place = rng.choice(SIZES), rng.choice(PLACES)
    color, background = rng.sample(list(COLORS), 2)
    shape = rng.choice(SHAPES)
    parts = [f"{color} {shape}", size, f"{background} background", place]
    rng.shuffle(parts)
    where = f"at the {place}" if place in ("top", "bottom") else f"in the {place}" if place == "center" else f"on the {place}"
    prompt = said(rng, "describe ", "describe: ", "caption: ") + ", ".join(parts)
    article = "an" if background == "orange" else "a"
    answer = f"A {size} {color} {shape} {where}, on {article} {background} background."
    return Example("caption", prompt, answer, f"{color} {shape} {background}")


def as_json(rng: random.Random) -> Example:
    """A colour, a shape and a number in any order -> an object."""
    color, shape, count = rng.choice(list(COLORS)), rng.choice(SHAPES), rng.randrange(100)
    parts = [color, shape, str(count)]
    rng.shuffle(parts)
    answer = json.dumps({"color": color, "shape": shape, "count": count})
    return Example("json", said(rng, "json ", "JSON: ", "as JSON: ") + " ".join(parts), answer, f"{color} {shape} {count}")


def a_word(rng: random.Random, least: int, most: int) -> str:
    if rng.random() < 0.3:
        return rng.choice([word for word in WORDS if least <= len(word) <= most])
    return "".join(rng.choices(LETTERS, k=rng.randint(least, most)))


def reverse(rng: random.Random) -> Example:
    word = a_word(rng, 3, 8)
    return Example("reverse", said(rng, "reverse ", "reverse: ", "spell backwards ") + word, word[::-1], word)


def sort(rng: random.Random) -> Example:
    items = rng.sample("0123456789", rng.randint(3, 6))
    return Example("sort", said(rng, "sort ", "sort: ") + " ".join(items), " ".join(sorted(items)), " ".join(items))


def add(rng: random.Random) -> Example:
    a, b = rng.randint(0, 9), rng.randint(0, 9)
    prompt = said(rng, f"add {a} and {b}", f"{a} + {b}", f"what is {a} + {b}?", f"what is {a} plus {b}?")
    return Example("sum", prompt, f"{a} + {b} = {a + b}", prompt.lower())


def repeat(rng: random.Random) -> Example:
    word, count = a_word(rng, 2, 5), rng.randint(1, 6)
    times = "time" if count == 1 else "times"
    prompt = said(rng, f"repeat {word} {count} {times}", f"write {word} {count} {times}")
    return Example("repeat", prompt, " ".join([word] * count), f"{word} {count}")


def chain(rng: random.Random) -> Example:
    """Steps in any order -> the way from the first letter to the last: each is found by the one before."""
    path = rng.sample(LETTERS, rng.randint(3, 5))
    steps = [f"{here}>{there}" for here, there in itertools.pairwise(path)]
    rng.shuffle(steps)
    facts = f"{path[0]}: {' '.join(steps)}"
    return Example("chain", said(rng, "follow ", "path from ", "go from ") + facts, " ".join(path), facts)


def talk(rng: random.Random) -> Example:
    """A greeting, something asked or said, or both."""
    greeting = rng.choice(list(WELCOMES)) if rng.random() < 0.6 else ""
    friend = rng.choice((" there", " my friend", " tiny-llada", " again")) if greeting and rng.random() < 0.4 else ""
    topic, answer = "", "How can I help you?"
    if not greeting or rng.random() < 0.5:
        topic = rng.choice(list(ASKED))
        answer = ASKED[topic]
        if rng.random() < 0.25:
            name = rng.choice(NAMES) if rng.random() < 0.5 else a_word(rng, 3, 7).capitalize()
            topic, answer = f"my name is {name}", f"Nice to meet you, {name}!"
    is_question = topic.startswith(("how", "who", "what"))
    ends = {True: ("?", "?", ""), False: ("!", ".", "")}[is_question] if topic else ("!", "!", ".", "")
    between = rng.choice(("! ", "! ", ", ", ". ", " ")) if greeting and topic else ""
    if topic and (not greeting or between[0] in "!.") and rng.random() < 0.7:
        topic = topic[0].upper() + topic[1:]
    prompt = greeting + friend + between + topic
    prompt = (prompt[0].upper() + prompt[1:] if rng.random() < 0.7 else prompt) + rng.choice(ends)
    facts = f"{greeting}{friend} {topic}".strip().lower()
    return Example("talk", prompt, f"{WELCOMES[greeting]} {answer}" if greeting else answer, facts)


def other(rng: random.Random) -> Example:
    """What it can't know."""
    words = [rng.choice(WORDS) if rng.random() < 0.7 else a_word(rng, 2, 8) for _ in range(rng.randint(1, 4))]
    facts = " ".join((rng.choice(QUESTIONS), *words)) if rng.random() < 0.8 else " ".join(words)
    return Example("other", said(rng, facts) + rng.choice(("?", "?", ".", "")), SORRY, facts)


def tale(rng: random.Random) -> str:
    """A text of no conversation, to be gone on with. Nothing in it follows from its beginning, so it is not graded."""
    size, color, shape, name = rng.choice(SIZES), rng.choice(list(COLORS)), rng.choice(SHAPES), rng.choice(NAMES)
    place, friend = rng.choice(WORDS[:26]), rng.choice([other for other in COLORS if other not in (color, "orange")])
    whom = rng.choice((f"a {size} {color} {shape}", f"{'an' if color[0] in 'aeiou' else 'a'} {color} {shape}"))
    goes = rng.choice((f"went to the {place}", f"looked for the {place}", f"lived by the {place}"))
    meets = rng.choice((f"met a {friend} {shape}", f"met {name}", f"saw the {rng.choice(WORDS[:26])}"))
    end = rng.choice(("They were happy.", "Then it was night.", "And so it ends."))
    return f"{rng.choice(('Once upon a time', 'One day'))} there was {whom}. It {goes} and {meets}. {end}"


TASKS: dict[str, Callable[[random.Random], Example]] = {
    "caption": caption,
    "json": as_json,
    "reverse": reverse,
    "sort": sort,
    "sum": add,
    "repeat": repeat,
    "chain": chain,
    "talk": talk,
    "other": other,
}
# how often each is trained on: more of what is harder
MIXTURE = tuple(name for name, share in zip(TASKS, (2, 2, 2, 2, 4, 2, 14, 5, 1), strict=True) for _ in range(share))
