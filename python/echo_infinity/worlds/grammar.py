"""The closed language of the worlds: prompts from scene descriptions and back."""

from __future__ import annotations

from dataclasses import dataclass

from .colours import COLOUR_NAMES, LOOKS

SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "diamond", "cross")
SIZES: tuple[str, ...] = ("small", "medium", "large")
SPEEDS: tuple[str, ...] = ("slowly", "quickly")
KINDS: tuple[str, ...] = ("open", "path", "curtain")
COUNTS: dict[str, int] = {"two": 2, "three": 3}
MAX_OBJECTS = 3

VOCABULARY: tuple[str, ...] = tuple(
    sorted(
        {"a", "an", "and", "shape", "shapes", "drift", "drifts", "in", "out", "over", "behind", "curtain"}
        | set(COLOUR_NAMES)
        | set(SHAPES)
        | set(SIZES)
        | set(SPEEDS)
        | set(COUNTS)
        | {word for look in LOOKS for word in look.split()}
    )
)


@dataclass(frozen=True)
class NamedObject:
    """What a prompt says about one object; ``None`` where it says nothing."""

    colour: str | None = None
    shape: str | None = None
    size: str | None = None


@dataclass(frozen=True)
class Description:
    """What a prompt says about a world; ``None`` where it says nothing.

    ``objects`` is ``None`` for the bare word "shapes", which leaves even their number open.
    """

    look: str
    kind: str = "open"
    objects: tuple[NamedObject, ...] | None = None
    speed: str | None = None


def compose(description: Description) -> str:
    """Return the prompt that says exactly what ``description`` says.

    Args:
        description: names must come from the closed vocabulary; at most ``MAX_OBJECTS`` objects.

    Returns:
        The prompt; ``parse`` gives the description back.

    Raises:
        ValueError: an attribute is not in the vocabulary, or there are no or too many objects.
    """
    _check(description)
    objects = description.objects
    if objects is None:
        words, plural = ["shapes"], True
    else:
        words, plural = [], len(objects) > 1
        for i, named in enumerate(objects):
            phrase = [word for word in (named.size, named.colour, named.shape or "shape") if word]
            words += (["and"] if i else []) + ["an" if phrase[0][0] in "aeiou" else "a"] + phrase
    words.append("drift" if plural else "drifts")
    if description.speed:
        words.append(description.speed)
    if description.kind == "path":
        words += ["in", "and", "out"]
    words += ["over", "a", *description.look.split()]
    if description.kind == "curtain":
        words += ["behind", "a", "curtain"]
    return " ".join(words)


def parse(prompt: str) -> Description:
    """Return what ``prompt`` says about a world.

    Args:
        prompt: words of ``VOCABULARY`` in the form "a [size] [colour] shape [and ...] drifts [speed]
            [in and out] over a <look> [behind a curtain]"; case, commas and full stops don't matter.

    Returns:
        The description.

    Raises:
        ValueError: unknown words (all of them listed), or known words out of order.
    """
    words = split_words(prompt)
    position = 0

    def peek() -> str:
        return words[position] if position < len(words) else ""

    def expect(*wanted: str) -> None:
        nonlocal position
        for word in wanted:
            if peek() != word:
                found = repr(peek()) if peek() else "the end"
                raise ValueError(
                    f"prompt {prompt!r}: expected {word!r} but found {found}; "
                    'the form is "a red circle drifts over a dark field"'
                )
            position += 1

    objects: tuple[NamedObject, ...] | None
    if peek() == "shapes":
        position, objects = position + 1, None
    elif peek() in COUNTS:
        objects = (NamedObject(),) * COUNTS[peek()]
        position += 1
        expect("shapes")
    else:
        found: list[NamedObject] = []
        while not found or peek() == "and" or peek() in ("a", "an"):
            if found and peek() == "and":
                position += 1
            expect("an" if peek() == "an" else "a")
            slots: dict[str, str | None] = {"size": None, "colour": None, "shape": None}
            for name, choices in (("size", SIZES), ("colour", COLOUR_NAMES), ("shape", SHAPES)):
                if peek() in choices:
                    slots[name] = peek()
                    position += 1
            if slots["shape"] is None:
                expect("shape")
            found.append(NamedObject(slots["colour"], slots["shape"], slots["size"]))
        objects = tuple(found)
    expect("drifts" if objects is not None and len(objects) == 1 else "drift")
    speed = peek() if peek() in SPEEDS else None
    position += speed is not None
    kind = "open"
    if peek() == "in":
        expect("in", "and", "out")
        kind = "path"
    expect("over", "a")
    look = " ".join(words[position : position + 2])
    if look not in LOOKS:
        raise ValueError(f"prompt {prompt!r}: {look!r} is no scene; choose one of {', '.join(LOOKS)}")
    position += 2
    if position < len(words):
        expect("behind", "a", "curtain")
        if kind == "path":
            raise ValueError(f"prompt {prompt!r}: 'in and out' and 'behind a curtain' exclude each other; drop one")
        kind = "curtain"
    if position < len(words):
        raise ValueError(f"prompt {prompt!r}: words after the end: {' '.join(words[position:])!r}; remove them")
    description = Description(look, kind, objects, speed)
    _check(description)
    return description


def split_words(prompt: str) -> list[str]:
    """Return the prompt's words in lower case without commas and full stops.

    Raises:
        ValueError: the prompt is empty or has words outside ``VOCABULARY``; all of them are listed.
    """
    words = prompt.lower().replace(",", " ").replace(".", " ").split()
    unknown = sorted({word for word in words if word not in VOCABULARY})
    if unknown:
        raise ValueError(
            f"prompt {prompt!r} has unknown words: {', '.join(unknown)}; known words: {', '.join(VOCABULARY)}"
        )
    if not words:
        raise ValueError('the prompt is empty; try "a red circle drifts over a dark field"')
    return words


def _check(description: Description) -> None:
    def check(name: str, value: str | None, choices: tuple[str, ...]) -> None:
        if value is not None and value not in choices:
            raise ValueError(f"{name} {value!r} is not one of {', '.join(choices)}")

    check("look", description.look, tuple(LOOKS))
    check("kind", description.kind, KINDS)
    check("speed", description.speed, SPEEDS)
    if description.objects is not None and not 1 <= len(description.objects) <= MAX_OBJECTS:
        raise ValueError(f"a world has 1 to {MAX_OBJECTS} objects, got {len(description.objects)}; name fewer")
    for named in description.objects or ():
        check("colour", named.colour, COLOUR_NAMES)
        check("shape", named.shape, SHAPES)
        check("size", named.size, SIZES)
