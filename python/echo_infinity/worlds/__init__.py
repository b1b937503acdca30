"""Procedural videos with known truth, for training and for judging."""

from .colours import COLOUR_NAMES, LOOKS, OBJECT_COLOURS, nearest_colour, object_colour
from .curtain import BlockSchedule, RandomSchedule, block_start
from .grammar import SHAPES, VOCABULARY, Description, NamedObject, compose, parse, split_words
from .world import FPS, ObjectTruth, World

__all__ = [
    "COLOUR_NAMES",
    "FPS",
    "LOOKS",
    "OBJECT_COLOURS",
    "SHAPES",
    "VOCABULARY",
    "BlockSchedule",
    "Description",
    "NamedObject",
    "ObjectTruth",
    "RandomSchedule",
    "World",
    "block_start",
    "compose",
    "nearest_colour",
    "object_colour",
    "parse",
    "split_words",
]
