"""`shapes`: pictures of one to three coloured shapes, drawn when prepared, with captions that can be judged exactly.

It needs no download, it is the same every time, and a small captioner learns it on a laptop. What a picture shows is
written in its image_id ("test-00013-red_ring+blue_square"), so `names_exactly` can tell whether a caption is right
without the captions that were drawn with it. Its `domain` is the number of shapes: "1 shape", "2 shapes", "3 shapes".

Val and test ask for combinations that were never seen. Every two different coloured shapes belong to train, val or test
(`split_of`), and no train scene holds two that belong to val or test: a held-out combination is not in train, not even
as part of a larger scene. Scenes of a single shape are in every split; in train they show every shape in every colour.
"""

import dataclasses
import functools
import io
import itertools
import math
import random
import re
from collections.abc import Collection, Iterable, Mapping, Sequence

from PIL import Image, ImageDraw

from clipcap_jax.datasets import prepare
from clipcap_jax.datasets.schema import Example
from clipcap_jax.datasets.source import PICTURES_PER_SHARD, Part, Source, by_hash
from clipcap_jax.datasets.summary import Summary

# The colours and shapes that stay furthest apart at the 32 to 48 pixels that small vision towers read.
COLOURS = {
    "red": (220, 20, 40),
    "yellow": (245, 220, 0),
    "green": (15, 145, 45),
    "cyan": (0, 205, 215),
    "blue": (20, 50, 230),
    "purple": (150, 35, 200),
    "pink": (255, 110, 185),
    "black": (20, 20, 20),
}
SHAPES = ("triangle", "square", "cross", "star", "ring", "crescent")
PAIRS = tuple(itertools.product(COLOURS, SHAPES))  # every coloured shape: (colour, shape)

SCENES = {"train": 20_000, "val": 500, "test": 1_000}  # a third each with one, two and three shapes
# Pixels. A picture has 3 x 3 cells, and a shape stays in one of them. Shapes just anywhere would take a small vision
# tower far longer to learn; these it knows in minutes, best where its patches are the cells (48 pixels, patches of 16).
CELL = 32
SIDE = 3 * CELL
SMALL, LARGE = (20, 21), (27, 28)  # a shape's side, from and to
SHIFT = 2  # how far off a cell's middle a shape may lie, to each side

Pair = tuple[str, str]


@dataclasses.dataclass(frozen=True)
class Figure:
    """One shape of a scene; pixels, from the top left corner of the picture."""

    colour: str
    shape: str
    large: bool
    size: int  # of its square box
    left: int
    top: int


def split_of(pairs: Collection[Pair]) -> str:
    """The split that a scene of these two or more coloured shapes belongs to."""
    # A rule, not a draw: of each coloured shape's 47 companions it holds out 4 or 5 for test, 2 or 3 for val.
    sums = [a + b for a, b in itertools.combinations([PAIRS.index(pair) for pair in pairs], 2)]
    if any(total % 10 == 0 for total in sums):
        return "test"
    return "val" if any(total % 20 == 5 for total in sums) else "train"


def draw_scene(split: str, index: int) -> tuple[Figure, ...]:
    """The scene with this number, its figures from left to right; a pure function of its arguments."""
    rng = random.Random(f"{split} {index}")
    count = 1 + index % 3
    if count == 1:
        pairs = [PAIRS[index // 3 % len(PAIRS)]]  # in turn, so that none is left out
    else:
        pairs = rng.sample(PAIRS, count)
        while split_of(pairs) != split:
            pairs = rng.sample(PAIRS, count)
    columns = sorted(rng.sample(range(3), count))  # each its own, so that there is an order from left to right
    return tuple(_place(pair, column, rng) for pair, column in zip(pairs, columns, strict=True))


def _place(pair: Pair, column: int, rng: random.Random) -> Figure:
    large = rng.random() < 0.5
    size = rng.randint(*(LARGE if large else SMALL))
    left, top = (CELL * cell + (CELL - size) // 2 + rng.randint(-SHIFT, SHIFT) for cell in (column, rng.randrange(3)))
    return Figure(*pair, large, size, left, top)


def render(figures: Iterable[Figure], rng: random.Random) -> bytes:
    """The picture as PNG: plain light background and flat colours, both varied a little by `rng`."""
    background = tuple(rng.randint(235, 255) for _ in "rgb")
    image = Image.new("RGB", (SIDE, SIDE), background)
    for figure in figures:
        colour = tuple(min(255, max(0, channel + rng.randint(-8, 8))) for channel in COLOURS[figure.colour])
        image.paste(colour, (figure.left, figure.top), _mask(figure.shape, figure.size))
    png = io.BytesIO()
    image.save(png, "PNG", compress_level=3)  # half the time of the default, 5% more bytes
    return png.getvalue()


@functools.cache
def _mask(shape: str, size: int) -> Image.Image:
    """The shape in white on black, `size` pixels wide; drawn 8 times larger for smooth edges."""
    scale = 8 * size
    mask = Image.new("L", (scale, scale))
    draw = ImageDraw.Draw(mask)

    def fill(corners: Iterable[tuple[float, float]]) -> None:
        draw.polygon([(x * scale, y * scale) for x, y in corners], fill=255)

    def disc(left: float, top: float, right: float, bottom: float, fill: int) -> None:
        draw.ellipse([edge * scale for edge in (left, top, right, bottom)], fill=fill)

    if shape == "triangle":
        fill([(0.5, 0.03), (1, 0.95), (0, 0.95)])
    elif shape == "square":
        fill([(0.06, 0.06), (0.94, 0.06), (0.94, 0.94), (0.06, 0.94)])
    elif shape == "cross":
        fill([(0.34, 0), (0.66, 0), (0.66, 1), (0.34, 1)])
        fill([(0, 0.34), (1, 0.34), (1, 0.66), (0, 0.66)])
    elif shape == "star":
        radii = [0.5, 0.21] * 5
        turns = [math.pi * corner / 5 for corner in range(10)]
        fill([(0.5 + r * math.sin(turn), 0.5 - r * math.cos(turn)) for r, turn in zip(radii, turns, strict=True)])
    elif shape == "ring":
        disc(0, 0, 1, 1, fill=255)
        disc(0.27, 0.27, 0.73, 0.73, fill=0)
    elif shape == "crescent":
        disc(0, 0, 1, 1, fill=255)
        disc(0.35, 0, 1.25, 0.9, fill=0)
    return mask.resize((size, size), Image.Resampling.BOX)


def write_captions(figures: Sequence[Figure]) -> tuple[str, ...]:
    """Five wordings for one to three figures given from left to right; each names every coloured shape once."""
    plain = [f"{figure.colour} {figure.shape}" for figure in figures]
    sized = [f"{'large' if figure.large else 'small'} {name}" for figure, name in zip(figures, plain, strict=True)]
    if len(figures) == 1:
        return (
            f"A {sized[0]}.",
            f"There is a {plain[0]}.",
            f"A picture of a {sized[0]}.",
            f"A {plain[0]} on a light background.",
            f"One {sized[0]} and nothing else.",
        )
    if len(figures) == 2:
        return (
            f"A {sized[0]} and a {sized[1]}.",
            f"A {plain[0]} {_relation(*figures)} a {plain[1]}.",
            f"A picture of a {plain[0]} and a {plain[1]}.",
            f"From left to right, a {sized[0]} and a {sized[1]}.",
            f"The {sized[1]} is {_relation(*reversed(figures))} the {sized[0]}.",
        )
    return (
        f"A {sized[0]}, a {sized[1]} and a {sized[2]}.",
        f"A {plain[0]}, a {plain[1]} and a {plain[2]} on a light background.",
        f"From left to right, a {sized[0]}, a {sized[1]} and a {sized[2]}.",
        f"A {plain[0]} is {_relation(*figures[:2])} a {plain[1]}, which is {_relation(*figures[1:])} a {plain[2]}.",
        f"A {plain[2]} on the right, a {plain[1]} in the middle and a {plain[0]} on the left.",
    )


def _relation(a: Figure, b: Figure) -> str:
    """Where `a` lies as seen from `b`."""
    right, down = a.left // CELL - b.left // CELL, a.top // CELL - b.top // CELL  # in cells
    if abs(right) > abs(down):
        return "to the right of" if right > 0 else "to the left of"
    return "below" if down > 0 else "above"


_OTHER_WORDS = re.compile(
    r",|a|above|and|background|below|else|from|in|is|large|left|light|middle|nothing|of|on|one|picture|right|small|the"
    r"|there|to|which"
)


def parse_caption(caption: str) -> tuple[Pair, ...]:
    """The coloured shapes that a caption names, sorted; what it names twice is there twice.

    Strict, so that nothing but a sound caption can pass as right: it is made of the words of these captions only, each
    colour stands right before a shape and each shape right after a colour, and a full stop ends it all. How the words
    are put together otherwise is not judged.

    Raises:
      ValueError: the caption breaks one of these rules; the message says which.
    """
    if not caption.endswith("."):
        raise ValueError("it does not end with a full stop")
    pairs = []
    before = ""
    for word in [*re.findall(r"\w+|[^\w\s]", caption[:-1].lower()), ""]:
        if word in SHAPES and before in COLOURS:
            pairs.append((before, word))
        elif word in SHAPES:
            raise ValueError(f"{word!r} has no colour")
        elif before in COLOURS:
            raise ValueError(f"{before!r} has no shape")
        elif word and word not in COLOURS and not _OTHER_WORDS.fullmatch(word):
            raise ValueError(f"{word!r} is in no caption of this data set")
        before = word
    return tuple(sorted(pairs))


def names_exactly(caption: str, scene: Iterable[Pair]) -> bool:
    """Whether the caption names each coloured shape of the scene once, and nothing else (see `parse_caption`)."""
    try:
        return parse_caption(caption) == tuple(sorted(scene))
    except ValueError:
        return False


def scene_of(image_id: str) -> tuple[Pair, ...]:
    """What the picture with this id shows, from left to right; "test-00013-red_ring+blue_square" has two."""
    _, _, names = image_id.split("-")
    return tuple((colour, shape) for colour, shape in (name.split("_") for name in names.split("+")))


def draw(image_id: str, figures: Sequence[Figure]) -> Example:
    """A scene with its picture."""
    return Example(
        image=render(figures, random.Random(image_id)),
        embedding=None,
        image_path="",
        image_id=image_id,
        captions=write_captions(figures),
        domain="1 shape" if len(figures) == 1 else f"{len(figures)} shapes",
    )


def _parts(split: str, count: int) -> list[Part]:
    scenes = []
    for index in range(count):
        figures = draw_scene(split, index)
        named = "+".join(f"{figure.colour}_{figure.shape}" for figure in figures)
        scenes.append((f"{split}-{index:05}-{named}", figures))
    shuffled = by_hash(scenes, split, lambda scene: scene[0])
    return [
        Part(split, functools.partial(itertools.starmap, draw, shuffled[start : start + PICTURES_PER_SHARD]))
        for start in range(0, count, PICTURES_PER_SHARD)
    ]


def prepare_shapes(
    data_dir: str, scenes: Mapping[str, int] = SCENES, *, processes: int = 1, beam: Sequence[str] | None = None
) -> Summary:
    """Draw the data set into `data_dir`, unless it is there already.

    Args:
      data_dir: the folder of prepared data sets.
      scenes: how many scenes to draw for train, val and test.
      processes, beam: see `prepare.prepare`.

    Raises:
      UserError: it is there with other numbers of scenes.
    """
    origin = {"scenes": dict(scenes)}
    if done := prepare.find_prepared("shapes", data_dir, origin):
        return done
    source = Source(
        name="shapes",
        origin=origin,
        found=origin,
        parts=[part for split, count in scenes.items() for part in _parts(split, count)],
        has_images=True,
        description="Scenes of one to three coloured shapes, drawn on the spot, with five captions each.",
    )
    return prepare.prepare(source, data_dir, processes=processes, beam=beam)
