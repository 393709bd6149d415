"""Draw a city from above: streets, blocks, houses, roofs, trees, cars, shadows, and the true footprints of its roofs.

Nothing is copied from a picture. Read from `draw_city` upwards through the plan of the streets, the houses on them, what is
painted on the ground and what stands on it. Roofs, streets and soil take their colours from one palette, so that a roof is
known by its shape, its shading and its shadow. Heights are drawn too, and all shadows are cast from them under one sun.

Axis names: H rows downwards, W columns to the right, 3 = red, green, blue. Points are (x, y) = (column, row) in pixels,
with pixel (row, col) covering [col, col + 1) x [row, row + 1). Lengths ending in _m are metres; a pixel is PX_M wide.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import shapely
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy import ndimage
from shapely.geometry import LineString, Point, Polygon, box
from shapely.geometry.base import BaseGeometry
from shapely.ops import substring

PX_M = 0.3
Float = NDArray[np.float32]
Rect = tuple[float, float, float, float]  # u0, v0, u1, v1 in metres, in a Frame
BlockKind = Literal["detached", "row", "dense", "large", "park", "field", "bare", "parking"]
BLOCK_KINDS: tuple[BlockKind, ...] = ("detached", "row", "dense", "large", "park", "field", "bare", "parking")
# How often each kind of block comes in a suburb, a terraced town, a dense quarter, a village.
TOWNS = ((9, 1, 0, 2, 1, 1, 1, 1), (3, 6, 1, 3, 1, 0, 1, 1), (1, 2, 8, 2, 1, 0, 2, 1), (5, 0, 4, 0.5, 1, 3, 2, 0))
# bitumen, asphalt, weathered grey, slate, concrete, pale, sand, brown soil, terracotta, red brown, rust, moss
PALETTE = np.array(
    [
        [74, 74, 76], [98, 98, 99], [127, 125, 121], [100, 106, 115], [160, 156, 147], [192, 189, 181],
        [172, 154, 124], [138, 114, 88], [150, 103, 80], [118, 78, 66], [132, 96, 72], [104, 110, 82],
    ],
    np.float32,
)  # fmt: skip
BRIGHT = np.array([[62, 108, 158], [150, 62, 58], [70, 118, 100], [222, 222, 217], [205, 208, 210]], np.float32)


@dataclass(frozen=True)
class DrawnCity:
    """A drawn picture and its truth.

    Attributes:
        image_HW3: uint8, 0.3 m pixels, never 0.
        footprints: outlines of the roofs that meet the picture, in pixels; they touch but never overlap.
        mask_HW: True where the centre of a pixel lies on a roof.
    """

    image_HW3: NDArray[np.uint8]
    footprints: tuple[Polygon, ...]
    mask_HW: NDArray[np.bool_]


@dataclass(frozen=True)
class Style:
    """What all of one city has in common: colours 0 to 255, the sun (unit vector to it in the picture, and its height)."""

    town: int
    road_rgb: Float
    kerb_rgb: Float
    soil_rgb: Float
    grass_rgb: Float
    tree_rgb: Float
    sun_x: float
    sun_y: float
    sun_tan: float
    dryness: float
    greenness: float
    bright_share: float
    contrast: float


@dataclass(frozen=True)
class Frame:
    """A place and a direction: (u, v) in metres from (x, y), with u turned by angle from the picture's x axis."""

    x: float
    y: float
    angle: float

    def to_px(self, u_m: float, v_m: float) -> tuple[float, float]:
        """Picture coordinates of (u, v)."""
        cos, sin = math.cos(self.angle), math.sin(self.angle)
        return self.x + (u_m * cos - v_m * sin) / PX_M, self.y + (u_m * sin + v_m * cos) / PX_M

    def to_uv(self, x: Float, y: Float) -> tuple[Float, Float]:
        """Metres (u, v) of picture coordinates."""
        cos, sin = math.cos(self.angle), math.sin(self.angle)
        dx, dy = (x - self.x) * PX_M, (y - self.y) * PX_M
        return dx * cos + dy * sin, dy * cos - dx * sin

    def moved(self, u_m: float, v_m: float, turn: float = 0.0) -> Frame:
        """A frame at (u, v) of this one, turned further."""
        return Frame(*self.to_px(u_m, v_m), self.angle + turn)

    def polygon(self, rect: Rect) -> Polygon:
        """A rectangle of this frame in picture coordinates."""
        u0, v0, u1, v1 = rect
        return Polygon([self.to_px(u0, v0), self.to_px(u1, v0), self.to_px(u1, v1), self.to_px(u0, v1)])


@dataclass(frozen=True)
class Block:
    """What lies between streets: half_u_m >= half_v_m around its frame, and what of it lies in its quarter of the city."""

    frame: Frame
    half_u_m: float
    half_v_m: float
    kind: BlockKind
    quarter: Polygon

    def polygon(self, inset_m: float) -> BaseGeometry:
        """The block in picture coordinates, smaller by a margin."""
        u, v = self.half_u_m - inset_m, self.half_v_m - inset_m
        return self.frame.polygon((-u, -v, u, v)).intersection(self.quarter)


@dataclass(frozen=True)
class Street:
    """A straight street along u of its frame, as far as it lies in its quarter."""

    frame: Frame
    half_u_m: float
    width_m: float
    quarter: Polygon


@dataclass(frozen=True)
class House:
    """A roof on rectangles of a frame (their union is the footprint) that stands eave_m above the ground."""

    frame: Frame
    parts: tuple[Rect, ...]
    form: Literal["gable", "hip", "flat"]
    eave_m: float
    slope: float
    rgb: Float
    sheets: float
    footprint: Polygon


@dataclass
class Canvas:
    """The picture while it is painted: colours, heights in metres above the ground, and where roofs are."""

    rgb: Float
    height_m: Float
    roof: NDArray[np.bool_] = field(init=False)

    def __post_init__(self) -> None:
        self.roof = np.zeros(self.height_m.shape, bool)


def draw_city(seed: int, height: int, width: int) -> DrawnCity:
    """Draw height x width pixels of a city; the same seed and size give the same city, another seed quite another one."""
    rng = np.random.default_rng(seed)
    style = _choose_style(rng)
    avenue = _avenue(rng, height, width)
    blocks, streets = _plan_streets(rng, style, avenue, height, width)
    houses = _build_houses(rng, style, blocks, avenue, height, width)
    canvas = _paint_ground(rng, style, blocks, streets, avenue, houses, height, width)
    _park_cars(rng, canvas, blocks, streets)
    _plant_trees(rng, style, canvas, blocks, houses)
    for house in houses:
        _raise_roof(rng, style, canvas, house)
    _cast_shadows(style, canvas)
    return DrawnCity(_expose(rng, style, canvas.rgb), tuple(house.footprint for house in houses), canvas.roof)


def _choose_style(rng: np.random.Generator) -> Style:
    sun = rng.uniform(0, 2 * math.pi)
    grass = np.array([rng.uniform(84, 122), rng.uniform(100, 124), rng.uniform(58, 80)], np.float32)
    return Style(
        town=int(rng.integers(len(TOWNS))),
        road_rgb=_shade_of(rng, PALETTE[rng.choice([0, 1, 1, 2, 4, 6, 7])]),
        kerb_rgb=_shade_of(rng, PALETTE[rng.choice([2, 4, 5, 6])]),
        soil_rgb=_shade_of(rng, PALETTE[rng.choice([6, 7, 8, 10])]),
        grass_rgb=grass,
        tree_rgb=np.array([rng.uniform(52, 82), rng.uniform(72, 98), rng.uniform(40, 58)], np.float32),
        sun_x=math.cos(sun),
        sun_y=math.sin(sun),
        sun_tan=math.tan(math.radians(rng.uniform(38, 60))),
        dryness=rng.uniform(-0.5, 0.7),
        greenness=rng.uniform(0.3, 1.4),
        bright_share=rng.uniform(0.0, 0.22),
        contrast=rng.uniform(0.85, 1.2),
    )


def _shade_of(rng: np.random.Generator, rgb: Float) -> Float:
    shade: Float = (rgb * rng.uniform(0.88, 1.12) + rng.normal(0, 4, 3)).astype(np.float32)
    return shade


def _avenue(rng: np.random.Generator, height: int, width: int) -> LineString:
    """The bent main street that parts two quarters with streets of different directions."""
    angle, reach = rng.uniform(0, math.pi), (height + width) * PX_M
    bend, phase, shift = rng.uniform(10, 35), rng.uniform(0, 6), rng.uniform(-0.25, 0.25) * min(height, width) * PX_M
    frame = Frame(width / 2, height / 2, angle).moved(0, shift)
    return LineString([frame.to_px(u, bend * math.sin(u / 90 + phase)) for u in np.arange(-reach, reach, 6.0)])


def _plan_streets(
    rng: np.random.Generator, style: Style, avenue: LineString, height: int, width: int
) -> tuple[list[Block], list[Street]]:
    """Cut the quarters on both sides of the avenue into blocks with streets between them."""
    share = np.array(TOWNS[style.town]) * rng.uniform(0.6, 1.5, len(BLOCK_KINDS))
    long_m, deep_m = rng.uniform(85, 125), rng.uniform(48, 66)
    reach = 0.75 * math.hypot(height, width) * PX_M
    picture = box(0, 0, width, height)
    ends = np.array(avenue.coords)
    normal = np.array([ends[0, 1] - ends[-1, 1], ends[-1, 0] - ends[0, 0]])
    blocks, streets = [], []
    for side in (-1, 1):
        far = ends[[-1, 0]] + side * 2 * normal
        quarter = Polygon(np.vstack([ends, far])).buffer(0).intersection(picture.buffer(60))
        shapely.prepare(quarter)
        frame = Frame(width / 2, height / 2, rng.uniform(0, math.pi / 2))
        todo: list[Rect] = [(-reach, -reach, reach, reach)]
        while todo:
            u0, v0, u1, v1 = rect = todo.pop()
            if not frame.polygon(rect).intersects(quarter):
                continue
            across_u = (u1 - u0) / long_m > (v1 - v0) / deep_m
            span, limit = (u1 - u0, long_m) if across_u else (v1 - v0, deep_m)
            if span < 1.3 * limit:
                middle, turn = frame.moved((u0 + u1) / 2, (v0 + v1) / 2), 0.0 if u1 - u0 >= v1 - v0 else math.pi / 2
                halves = sorted([(u1 - u0) / 2, (v1 - v0) / 2])
                kind = BLOCK_KINDS[rng.choice(len(BLOCK_KINDS), p=share / share.sum())]
                blocks.append(Block(middle.moved(0, 0, turn), halves[1], halves[0], kind, quarter))
                continue
            cut = span * rng.uniform(0.42, 0.58)
            street_m = rng.uniform(9, 12) if span > 3.5 * limit else rng.uniform(5, 8)
            if across_u:
                todo += [(u0, v0, u0 + cut - street_m / 2, v1), (u0 + cut + street_m / 2, v0, u1, v1)]
                streets.append(
                    Street(frame.moved(u0 + cut, (v0 + v1) / 2, math.pi / 2), (v1 - v0) / 2, street_m, quarter)
                )
            else:
                todo += [(u0, v0, u1, v0 + cut - street_m / 2), (u0, v0 + cut + street_m / 2, u1, v1)]
                streets.append(Street(frame.moved((u0 + u1) / 2, v0 + cut), (u1 - u0) / 2, street_m, quarter))
    return blocks, streets


def _build_houses(
    rng: np.random.Generator, style: Style, blocks: list[Block], avenue: LineString, height: int, width: int
) -> list[House]:
    """Houses on the lots of all blocks: those that meet the picture and keep off the avenue, no two of them overlapping."""
    keep_off = avenue.buffer(11 / PX_M)
    picture = box(0, 0, width, height)
    houses: list[House] = []
    for block in blocks:
        built = [_house(rng, style, block, frame, parts) for frame, parts in _lots(rng, block)]
        houses += [house for house in built if block.quarter.contains(house.footprint.centroid)]
    outlines = [house.footprint for house in houses]
    tree = shapely.STRtree([outline.buffer(-0.02) for outline in outlines])
    first, second = tree.query(tree.geometries, predicate="intersects")
    taken: set[int] = {int(b) for a, b in zip(first, second, strict=True) if a < b}
    return [
        house
        for number, house in enumerate(houses)
        if number not in taken
        and 30 <= house.footprint.area * PX_M**2 <= 1500
        and house.footprint.intersects(picture)
        and not house.footprint.intersects(keep_off)
    ]


def _lots(rng: np.random.Generator, block: Block) -> list[tuple[Frame, tuple[Rect, ...]]]:
    """The houses of one block as (frame, parts): rows of lots along the block's long side, fronts towards the street."""
    if block.kind not in ("detached", "row", "dense", "large"):
        return []
    rows = {"detached": 2, "row": 2, "dense": max(2, round(block.half_v_m / 7.5)), "large": 1 + (block.half_v_m > 30)}
    low, high = {"detached": (14, 23), "row": (6.5, 9), "dense": (10, 15), "large": (28, 55)}[block.kind]
    turn = {"detached": 0.03, "row": 0.0, "dense": 0.12, "large": 0.02}[block.kind]
    depth = 2 * (block.half_v_m - 3) / rows[block.kind]
    found = []
    for row in range(rows[block.kind]):
        v_m = -block.half_v_m + 3 + (row + 0.5) * depth
        facing = -1 if row < rows[block.kind] / 2 else 1
        u_m, row_front, row_deep = 3 - block.half_u_m, rng.uniform(0.5, 4), rng.uniform(9, 13)
        while u_m + low < block.half_u_m - 3:
            wide = rng.uniform(low, high)
            frame = block.frame.moved(u_m + wide / 2, v_m, rng.normal(0, turn) + (math.pi if facing < 0 else 0))
            u_m += wide
            if block.kind == "row":
                deep = min(depth - 1, row_deep + rng.choice([0, 0, 1.2]))
                back = depth / 2 - row_front
                found.append((frame, ((-wide / 2, back - deep, wide / 2, back),)))
                u_m += rng.choice([0, 0, 0, 0, 0, 5])
            elif rng.random() < 0.94 and u_m < block.half_u_m - 2:
                found += [(frame, parts) for parts in _lot_parts(rng, block.kind, wide, depth)]
    return found


def _lot_parts(rng: np.random.Generator, kind: BlockKind, wide: float, depth: float) -> list[tuple[Rect, ...]]:
    """The rectangles of the main house of a lot, and of a shed or a back house where there is room."""
    gap = {"detached": 1.6, "dense": 0.9, "large": 4.0}[kind]
    most = {"detached": (17, 15), "dense": (12, 13), "large": (46, 36)}[kind]
    bw = min(wide - 2 * gap, most[0]) * rng.uniform(0.78, 1.0)
    bd = min(depth - 2 * gap, most[1]) * rng.uniform(0.7, 1.0)
    front = depth / 2 - gap - rng.uniform(0, 1) * min(5.0, depth - 2 * gap - bd)
    u0 = -bw / 2 + rng.uniform(-0.5, 0.5) * max(0.0, wide - 2 * gap - bw)
    main: Rect = (u0, front - bd, u0 + bw, front)
    shape = rng.random()
    parts: tuple[Rect, ...] = (main,)
    if shape < 0.3 and min(bw, bd) > 8:  # L: one wing to the back
        wing = u0 + (0 if rng.random() < 0.5 else 0.55 * bw)
        parts = ((u0, front - 0.55 * bd, u0 + bw, front), (wing, front - bd, wing + 0.45 * bw, front))
    elif shape < 0.45 and min(bw, bd) > 8:  # T: a wing from the middle
        parts = ((u0, front - 0.55 * bd, u0 + bw, front), (u0 + 0.3 * bw, front - bd, u0 + 0.7 * bw, front))
    lots = [parts]
    room = front - bd - gap - (-depth / 2 + 0.8)
    if kind != "large" and room > 5.2 and rng.random() < 0.35:
        half, back = rng.uniform(3, min(5.0, wide / 2 - 1)), -depth / 2 + 0.8
        lots.append(((-half, back, half, back + min(room, rng.uniform(5.2, 7))),))
    return lots


def _house(rng: np.random.Generator, style: Style, block: Block, frame: Frame, parts: tuple[Rect, ...]) -> House:
    outline = shapely.union_all([frame.polygon(part) for part in parts])
    area = outline.area * PX_M**2
    flat = {"detached": 0.12, "row": 0.25, "dense": 0.35, "large": 0.75}[block.kind]
    form: Literal["gable", "hip", "flat"] = (
        "flat" if rng.random() < flat else "gable" if block.kind == "row" or rng.random() < 0.6 else "hip"
    )
    ground = np.array([style.road_rgb, style.kerb_rgb, style.soil_rgb, 0.5 * (style.grass_rgb + style.soil_rgb)])
    pick = rng.random()
    if pick < style.bright_share:
        rgb = BRIGHT[rng.integers(len(BRIGHT))]
    else:
        rgb = ground[rng.integers(4)] if pick < 0.6 else PALETTE[rng.integers(len(PALETTE))]
    storeys = 1 if area < 70 else int(rng.integers(1, 3 if area < 300 else 5))
    slope = 0.0 if form == "flat" else rng.uniform(0.3, 0.75) if area < 500 else rng.uniform(0.12, 0.3)
    sheets = rng.uniform(0.0, 0.1) * (2.0 if block.kind == "dense" else 0.6)
    return House(frame, parts, form, 2.6 * storeys + 0.6, slope, _shade_of(rng, rgb), sheets, outline)


def _noise(rng: np.random.Generator, height: int, width: int, sizes_px: tuple[int, ...]) -> Float:
    """Smooth random hills of several sizes, each size with the same weight; mean 0, standard deviation about 1."""
    total = np.zeros((height, width), np.float32)
    for size in sizes_px:
        small = rng.standard_normal((height // size + 3, width // size + 3), np.float32)
        shown = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
        total += np.asarray(shown, np.float32)
    return total / np.float32(max(float(total.std()), 1e-6))


def _fill(draw: ImageDraw.ImageDraw, shape: BaseGeometry, value: float) -> None:
    for part in shapely.get_parts(shape):
        if isinstance(part, Polygon) and not part.is_empty:
            draw.polygon([(x - 0.5, y - 0.5) for x, y in part.exterior.coords], fill=value)


def _paint_ground(
    rng: np.random.Generator,
    style: Style,
    blocks: list[Block],
    streets: list[Street],
    avenue: LineString,
    houses: list[House],
    height: int,
    width: int,
) -> Canvas:
    """Grass that turns to soil where it is dry or trodden; over it, with sharp edges, whatever is paved or ploughed."""
    hills = _noise(rng, height, width, (6, 14, 40, 110))
    dry = Image.new("F", (width, height), style.dryness)
    paved = Image.new("I", (width, height), 0)
    dry_draw, paved_draw = ImageDraw.Draw(dry), ImageDraw.Draw(paved)
    colours: list[Float] = [style.soil_rgb, style.road_rgb, style.kerb_rgb, _shade_of(rng, PALETTE[5])]
    _fill(paved_draw, box(0, 0, width, height), 1)
    walk_m = rng.choice([0.0, 1.5, 2.2])
    for block in blocks:
        _pave_block(rng, style, block, walk_m, dry_draw, paved_draw, colours)
    for house in houses:  # trodden ground around houses, and a paved way or yard at some of them
        _fill(dry_draw, house.footprint.buffer(rng.uniform(3, 9)), style.dryness + rng.normal(0.5, 0.7))
        if rng.random() < 0.35:
            u0, v0, u1, v1 = house.parts[0]
            colours.append(_shade_of(rng, colours[rng.integers(3)]))
            side = rng.uniform(u0, u1 - 3)
            yard = (side, v1, side + rng.uniform(2.6, min(8.0, u1 - u0)), v1 + rng.uniform(2, 6))
            _fill(paved_draw, house.frame.polygon(yard), len(colours) - 1)
    _mark_streets(paved_draw, streets, avenue, walk_m)
    drift = _noise(rng, height, width, (5, 12)) * 2.5
    rows, cols = np.mgrid[0:height, 0:width].astype(np.float32)
    dryness = ndimage.map_coordinates(np.asarray(dry), [rows + drift, cols - drift], order=1, mode="nearest")
    mix = (1 / (1 + np.exp(-2.2 * (dryness + hills))))[..., None]
    grain = _noise(rng, height, width, (1, 2, 4))
    wear = _noise(rng, height, width, (3, 9, 30, 120))
    nature = style.grass_rgb * (1 - mix) + style.soil_rgb * mix
    nature *= (1 + 0.06 * grain + 0.07 * wear)[..., None]
    index = np.asarray(paved)
    hard = np.array(colours, np.float32)[index] * (1 + 0.03 * grain + 0.05 * wear)[..., None]
    return Canvas(
        np.where((index > 0)[..., None], hard, nature).astype(np.float32), np.zeros((height, width), np.float32)
    )


def _pave_block(
    rng: np.random.Generator,
    style: Style,
    block: Block,
    walk_m: float,
    dry_draw: ImageDraw.ImageDraw,
    paved_draw: ImageDraw.ImageDraw,
    colours: list[Float],
) -> None:
    """One block: pavement around it, then garden, field, bare yard or car park inside."""
    u, v = block.half_u_m - walk_m, block.half_v_m - walk_m
    _fill(paved_draw, block.polygon(0), 2)
    _fill(paved_draw, block.polygon(walk_m), 0)
    wet = {"park": -1.2, "bare": 1.8, "dense": 1.2, "field": 0.0}.get(block.kind, 0.0) * style.greenness
    _fill(dry_draw, block.polygon(walk_m), style.dryness + wet + rng.normal(0, 0.5))
    if block.kind == "field":
        period, dryness = rng.uniform(1.5, 4), rng.normal(0, 1.2)
        for left in np.arange(-u, u, period):
            strip = (left, -v, min(u, left + period / 2), v)
            _fill(dry_draw, block.frame.polygon(strip).intersection(block.quarter), dryness + rng.normal(1.2, 0.3))
    if block.kind in ("parking", "large"):
        colours.append(_shade_of(rng, PALETTE[rng.choice([0, 1, 2, 4])]))
        _fill(paved_draw, block.polygon(walk_m + 2), len(colours) - 1)
    if block.kind == "parking":
        for left in np.arange(4 - u, u - 4, 2.6):
            for row in np.arange(6 - v, v - 6, 16.0):
                line = block.frame.polygon((left, row - 5, left + 0.25, row + 5))
                _fill(paved_draw, line.intersection(block.quarter), 3)


def _mark_streets(draw: ImageDraw.ImageDraw, streets: list[Street], avenue: LineString, walk_m: float) -> None:
    """Broken middle lines on the wider streets, and the avenue with its kerbs on top."""
    for street in streets:
        if street.width_m >= 7:
            for u in np.arange(-street.half_u_m, street.half_u_m, 7.0):
                dash = street.frame.polygon((u, -0.12, u + 3, 0.18))
                if street.quarter.contains(dash):
                    _fill(draw, dash, 3)
    _fill(draw, avenue.buffer((7 + walk_m) / PX_M), 2)
    _fill(draw, avenue.buffer(6.5 / PX_M), 1)
    for offset in (-2.9, 2.9):
        lane = avenue.offset_curve(offset / PX_M)
        for start in np.arange(0, lane.length, 7 / PX_M):
            _fill(draw, substring(lane, start, start + 3 / PX_M).buffer(0.6, cap_style="flat"), 3)


def _window(canvas: Canvas, shape: BaseGeometry) -> tuple[slice, slice, Float, Float] | None:
    """Rows, columns and the coordinates of the pixel centres around a shape; None outside the picture."""
    height, width = canvas.height_m.shape
    x0, y0, x1, y1 = shape.bounds
    left, top, right, bottom = max(0, int(x0)), max(0, int(y0)), min(width, int(x1) + 2), min(height, int(y1) + 2)
    if left >= right or top >= bottom:
        return None
    y, x = np.mgrid[top:bottom, left:right].astype(np.float32) + np.float32(0.5)
    return slice(top, bottom), slice(left, right), x, y


def _park_cars(rng: np.random.Generator, canvas: Canvas, blocks: list[Block], streets: list[Street]) -> None:
    """Cars along the streets and in rows on car parks: a body of one colour with a dark pane, 1.4 m high."""
    places = []
    for street in streets:
        for _ in range(rng.poisson(street.half_u_m / 14)):
            side = rng.choice([-1, 1]) * (street.width_m / 2 - 1.3)
            places.append((street.frame.moved(rng.uniform(-1, 1) * street.half_u_m, side), street.quarter))
    for block in blocks:
        if block.kind == "parking":
            for u in np.arange(5.3 - block.half_u_m, block.half_u_m - 5, 2.6):
                for v in np.arange(8 - block.half_v_m, block.half_v_m - 7, 16.0):
                    spots = [block.frame.moved(u, v + side, math.pi / 2) for side in (-2.6, 2.6) if rng.random() < 0.5]
                    places += [(spot, block.quarter) for spot in spots]
    bodies = np.array([[225, 225, 225], [190, 192, 195], [60, 60, 64], [110, 112, 115], [150, 50, 45], [55, 85, 135]])
    for frame, quarter in places:
        outline = frame.polygon((-2.2, -0.95, 2.2, 0.95))
        window = _window(canvas, outline)
        if window is None or not quarter.contains(outline):
            continue
        rows, cols, x, y = window
        u, v = frame.to_uv(x, y)
        body = (abs(u) < 2.2) & (abs(v) < 0.95)
        canvas.rgb[rows, cols][body] = bodies[rng.integers(len(bodies))]
        canvas.rgb[rows, cols][body & (abs(abs(u) - 1.0) < 0.4)] = (48, 52, 58)
        canvas.height_m[rows, cols][body] = 1.4


def _plant_trees(
    rng: np.random.Generator, style: Style, canvas: Canvas, blocks: list[Block], houses: list[House]
) -> None:
    """Trees of every size in gardens, parks and along streets, none of them over a roof: bumpy domes, lit from the sun."""
    height, width = canvas.height_m.shape
    per_100m2 = {"park": 1.0, "detached": 0.5, "row": 0.35, "dense": 0.3, "field": 0.06, "bare": 0.1}
    spots: list[tuple[float, float, float]] = []
    for block in blocks:
        area = 4 * block.half_u_m * block.half_v_m
        count = rng.poisson(per_100m2.get(block.kind, 0.12) * style.greenness * area / 100)
        for u, v in rng.uniform(-1, 1, (count, 2)):
            x, y = block.frame.to_px(u * block.half_u_m, v * block.half_v_m)
            if block.quarter.contains(Point(x, y)):
                spots.append((x, y, rng.gamma(5.0, 0.5) + 0.5))
    roofs = shapely.STRtree([house.footprint for house in houses])
    lumps = _noise(rng, height, width, (3, 7))
    for x, y, radius_m in spots:
        crown = Point(x, y).buffer(radius_m / PX_M)
        window = _window(canvas, crown)
        if window is None or len(roofs.query(Point(x, y), "dwithin", 0.6 * radius_m / PX_M)):
            continue
        rows, cols, px, py = window
        dx, dy = (px - x) * PX_M / radius_m, (py - y) * PX_M / radius_m
        dome = 1 - dx**2 - dy**2 + 0.18 * lumps[rows, cols]
        inside = dome > 0
        light = 0.95 + 0.4 * (dx * style.sun_x + dy * style.sun_y) + 0.2 * lumps[rows, cols]
        rgb = style.tree_rgb * rng.uniform(0.8, 1.25) + rng.normal(0, 5, 3)
        canvas.rgb[rows, cols][inside] = (rgb * light[..., None])[inside]
        canvas.height_m[rows, cols][inside] = (1.5 * radius_m * np.sqrt(np.clip(dome, 0, 1)) + 1)[inside]


def _raise_roof(rng: np.random.Generator, style: Style, canvas: Canvas, house: House) -> None:
    """One roof: its faces lit by their slope, rows of tiles or sheets, and what stands on it."""
    window = _window(canvas, house.footprint)
    if window is None:
        return
    rows, cols, x, y = window
    u, v = house.frame.to_uv(x, y)
    top = np.full(u.shape, -1, np.float32)
    edge, grad_u, grad_v = top.copy(), np.zeros_like(top), np.zeros_like(top)
    for u0, v0, u1, v1 in house.parts:
        du, dv = (u1 - u0) / 2 - abs(u - (u0 + u1) / 2), (v1 - v0) / 2 - abs(v - (v0 + v1) / 2)
        inside = (du >= 0) & (dv >= 0)
        edge = np.where(inside, np.maximum(edge, np.minimum(du, dv)), edge)
        along_u = u1 - u0 >= v1 - v0 if house.form == "gable" else dv <= du
        rise = house.eave_m + house.slope * np.where(along_u, dv, du)
        higher = inside & (rise > top)
        top = np.where(higher, rise, top)
        grad_u = np.where(higher, np.where(along_u, 0, -np.sign(u - (u0 + u1) / 2)) * house.slope, grad_u)
        grad_v = np.where(higher, np.where(along_u, -np.sign(v - (v0 + v1) / 2), 0) * house.slope, grad_v)
    roof = top > 0
    cos, sin = math.cos(house.frame.angle), math.sin(house.frame.angle)
    toward = -grad_u * (style.sun_x * cos + style.sun_y * sin) - grad_v * (style.sun_y * cos - style.sun_x * sin)
    lit = np.clip((1 + toward / style.sun_tan) / np.sqrt(1 + house.slope**2), 0.15, 2)
    sheets = rng.normal(0, house.sheets, (64, 64))[(u / 0.95).astype(int) % 64, (v / 2.7).astype(int) % 64]
    rib = 0.035 * np.sin(2 * math.pi * (u if rng.random() < 0.5 else v) / rng.uniform(0.9, 1.3))
    stains = _noise(rng, *u.shape, (2, 5, 11)) * rng.uniform(0.02, 0.05)
    rgb = house.rgb * (0.35 + 0.65 * lit)[..., None] * (1 + sheets + rib * (house.slope > 0) + stains)[..., None]
    if house.form == "flat":
        parapet = edge < 0.45
        rgb[parapet] = house.rgb * rng.uniform(1.05, 1.35)
        top = np.where(roof & parapet, top + 0.7, top)
    top, rgb = _furnish_roof(rng, house, u, v, edge, top, rgb)
    canvas.rgb[rows, cols][roof] = rgb[roof]
    canvas.height_m[rows, cols][roof] = top[roof]
    canvas.roof[rows, cols] |= roof


def _furnish_roof(
    rng: np.random.Generator, house: House, u: Float, v: Float, edge: Float, top: Float, rgb: Float
) -> tuple[Float, Float]:
    """Stair heads, machines and tanks on flat roofs; chimneys and dark windows on pitched ones."""
    u0, v0, u1, v1 = house.parts[0]
    flat = house.form == "flat"
    for _ in range(rng.integers(0, 3 + int((u1 - u0) * (v1 - v0) / 120) if flat else 3)):
        cu, cv = rng.uniform(u0 + 1, u1 - 1), rng.uniform(v0 + 1, v1 - 1)
        half_u, half_v = rng.uniform(0.6, 1.8, 2) if flat else rng.uniform(0.3, 0.6, 2)
        thing = (abs(u - cu) < half_u) & (abs(v - cv) < half_v) & (edge > 0.5)
        grey = rng.uniform(60, 210) if flat else rng.uniform(50, 130)
        rgb[thing] = house.rgb * 0.4 + grey * 0.6
        top = np.where(thing, top + (rng.uniform(0.8, 2.4) if flat else rng.choice([0.1, 1.0])), top)
    return top, rgb


def _cast_shadows(style: Style, canvas: Canvas) -> None:
    """Darken every pixel from which something stands before the sun, walking towards it one pixel at a time."""
    height_m = canvas.height_m
    steps = math.ceil(float(height_m.max()) / (PX_M * style.sun_tan))
    padded = np.pad(height_m, steps + 1)
    rows, cols = height_m.shape
    shaded = np.zeros(height_m.shape, bool)
    for step in range(1, steps + 1):
        top, left = steps + 1 + round(step * style.sun_y), steps + 1 + round(step * style.sun_x)
        shaded |= padded[top : top + rows, left : left + cols] > height_m + (step * PX_M * style.sun_tan + 0.15)
    soft = ndimage.gaussian_filter(shaded.astype(np.float32), 0.6)[..., None]
    canvas.rgb *= 1 - soft * np.array([0.6, 0.57, 0.5], np.float32)


def _expose(rng: np.random.Generator, style: Style, rgb: Float) -> NDArray[np.uint8]:
    """What a camera makes of it: blur, colour coarser than brightness as after JPEG, contrast, haze, cast and noise."""
    grey = rgb.mean(2)
    colour = rgb - grey[..., None]
    sharp = ndimage.gaussian_filter(grey, rng.uniform(0.5, 0.8))
    soft = ndimage.gaussian_filter(colour, (1.2, 1.2, 0))
    haze, cast = rng.uniform(0, 18), 1 + rng.normal(0, 0.035, 3)
    noise = ndimage.gaussian_filter(rng.standard_normal(grey.shape, np.float32), 0.5) * rng.uniform(3, 8)
    seen = (sharp[..., None] + soft - 115) * style.contrast * cast + 112 + haze + noise[..., None]
    return np.clip(seen + 0.5, 2, 255).astype(np.uint8)
