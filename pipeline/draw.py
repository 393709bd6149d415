"""Draw a city from above: streets, blocks, houses, roofs, trees, cars, shadows, and the true footprints of its roofs.

Nothing is copied from a picture. `draw_city` tells the order; the functions follow in it. Roofs, pavings and soil take
their colours from one palette, so that a roof is known by its shape, its shading and its shadow. Heights are painted
beside the colours, and all shadows are cast from them under one sun.

Axis names: H rows downwards, W columns to the right, 3 = red, green, blue (0 to 255). Points are (x, y) = (column, row)
in pixels; pixel (row, col) covers [col, col + 1) x [row, row + 1). Names ending in _m are metres, a pixel is PX_M wide.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import shapely
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy import ndimage
from shapely.geometry import LineString, Point, Polygon, box
from shapely.geometry.base import BaseGeometry
from shapely.ops import substring

PX_M = 0.3
Float = NDArray[np.float32]
Rect = tuple[float, float, float, float]  # u0, v0, u1, v1 in metres of a Frame
Form = Literal["gable", "hip", "flat"]


@dataclass(frozen=True)
class Use:
    """What a block is used for. Lots of lot_m wide in rows of about row_m; no lots where houses is 0."""

    name: str
    houses: float  # share of the lots that are built on
    lot_m: tuple[float, float] = (0, 0)
    row_m: float = 30
    gap_m: float = 0  # least distance between a house and the sides of its lot
    most_m: tuple[float, float] = (0, 0)
    turn: float = 0  # how far houses are out of line, radians
    flat: float = 0  # share of flat roofs
    trees: float = 0.1  # on 100 m²
    dryness: float = 0  # above 0 soil, below 0 grass
    paved: float = 0  # share of such blocks that are paved


USES = (
    Use("detached", 0.94, (13, 21), 27, 1.5, (17, 15), 0.03, 0.12, trees=0.5),
    Use("terrace", 0.9, (6.5, 9), 25, 0.0, (9, 13), 0.0, 0.25, trees=0.35, dryness=0.2),
    Use("dense", 0.94, (9.5, 15), 15, 0.8, (12, 13), 0.12, 0.35, trees=0.3, dryness=1.2),
    Use("halls", 0.94, (26, 50), 42, 3.5, (46, 36), 0.02, 0.75, paved=0.9),
    Use("park", 0, trees=1.0, dryness=-1.2),
    Use("field", 0, trees=0.06),
    Use("bare", 0, dryness=1.8, paved=0.6),
    Use("cars", 0, paved=1),
)
# How common each use is in a suburb, a terraced town, a dense quarter, a village.
TOWNS = (
    (9, 1, 0, 2, 1, 0.5, 0.7, 0.7),
    (3, 7, 1, 3, 1, 0, 0.7, 0.7),
    (1, 2, 8, 2, 1, 0, 1, 0.7),
    (6, 0, 5, 0.5, 1, 2, 1, 0),
)
GREYS = ((74, 74, 76), (98, 98, 99), (127, 125, 121), (100, 106, 115), (160, 156, 147), (192, 189, 181))
EARTHS = ((172, 154, 124), (140, 117, 90), (148, 110, 86), (132, 102, 78), (158, 136, 108))
TILES = ((150, 103, 80), (118, 80, 68), (132, 96, 72), (104, 108, 84), (96, 90, 86))
BRIGHTS = ((62, 108, 158), (150, 62, 58), (70, 118, 100), (222, 222, 217))
BODIES = ((225, 225, 225), (190, 192, 195), (60, 60, 64), (110, 112, 115), (150, 50, 45), (55, 85, 135))


@dataclass(frozen=True)
class DrawnCity:
    """A drawn picture and its truth.

    Attributes:
        image_HW3: uint8, 0.3 m pixels, never 0.
        footprints: outlines of the roofs that meet the picture, in pixels; they may touch but never overlap.
        mask_HW: True where the centre of a pixel lies on a roof.
    """

    image_HW3: NDArray[np.uint8]
    footprints: tuple[Polygon, ...]
    mask_HW: NDArray[np.bool_]


@dataclass(frozen=True)
class Style:
    """What a city has in common. The sun stands towards (sun_x, sun_y), a unit vector; sun_tan: of its elevation."""

    use_share: NDArray[np.float64]
    palette: Float  # road, kerb, soil, dry grass, two tiles, one bright colour: of pavings and of roofs
    share: NDArray[np.float64]  # of each of them
    grass: Float
    tree: Float
    sun_x: float
    sun_y: float
    sun_tan: float
    dryness: float
    trees: float
    walk_m: float


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
class Place:
    """A block or a street: half_u_m to both sides along u of its frame, half_v_m across, as far as in its quarter."""

    frame: Frame
    half_u_m: float
    half_v_m: float
    quarter: Polygon
    use: Use | None = None  # None: a street

    def polygon(self, inset_m: float = 0.0) -> BaseGeometry:
        """Its outline in picture coordinates, smaller by a margin."""
        u, v = self.half_u_m - inset_m, self.half_v_m - inset_m
        return self.frame.polygon((-u, -v, u, v)).intersection(self.quarter)


@dataclass(frozen=True)
class House:
    """A roof over rectangles of a frame, their union the footprint, eave_m above the ground of its lot."""

    frame: Frame
    parts: tuple[Rect, ...]
    lot: Rect
    footprint: Polygon
    form: Form
    eave_m: float
    slope: float
    rgb: Float
    sheets: float  # how much its sheets differ in brightness


@dataclass(frozen=True)
class Plan:
    """The city as a map, before anything is painted."""

    height: int
    width: int
    style: Style
    avenue: LineString
    blocks: tuple[Place, ...] = ()
    streets: tuple[Place, ...] = ()
    houses: tuple[House, ...] = ()


@dataclass(frozen=True)
class Canvas:
    """The picture while it is painted, in place: colours, heights in metres above the ground, where roofs are."""

    rgb_HW3: Float
    height_HW: Float
    roof_HW: NDArray[np.bool_]

    def window(self, shape: BaseGeometry) -> tuple[tuple[slice, slice], Float, Float]:
        """Slices of the bounding box of a shape, empty outside the picture, and x and y of its pixel centres."""
        height, width = self.height_HW.shape
        x0, y0, x1, y1 = shape.bounds
        rows = slice(min(max(0, int(y0)), height), max(0, min(height, int(y1) + 2)))
        cols = slice(min(max(0, int(x0)), width), max(0, min(width, int(x1) + 2)))
        y, x = np.mgrid[rows, cols].astype(np.float32) + np.float32(0.5)
        return (rows, cols), x, y


def draw_city(seed: int, height: int, width: int) -> DrawnCity:
    """Draw height x width pixels of a city. The same seed and size give the same city, another seed quite another."""
    rng = np.random.default_rng(seed)
    style = choose_style(rng)
    plan = plan_streets(rng, Plan(height, width, style, bend_avenue(rng, height, width)))
    plan = replace(plan, houses=build_houses(rng, plan))
    canvas = paint_ground(rng, plan)
    park_cars(rng, plan, canvas)
    plant_trees(rng, plan, canvas)
    for house in plan.houses:
        raise_roof(rng, style, canvas, house)
    cast_shadows(style, canvas)
    image_HW3 = take_picture(rng, canvas)
    return DrawnCity(image_HW3, tuple(house.footprint for house in plan.houses), canvas.roof_HW)


def choose_style(rng: Generator) -> Style:
    """The town, its colours, its sun and its climate."""
    sun, bright = rng.uniform(0, 2 * math.pi), rng.uniform(0.0, 0.1)
    use_share = np.array(TOWNS[rng.integers(len(TOWNS))]) * rng.uniform(0.6, 1.5, len(USES))
    grass = np.array([rng.uniform(84, 122), rng.uniform(98, 120), rng.uniform(58, 80)], np.float32)
    road, kerb = rng.choice([*GREYS, *GREYS[:3], *EARTHS[:2]]), rng.choice([*GREYS[2:], EARTHS[0]])
    soil, tiles = rng.choice(EARTHS), rng.choice(TILES, 2, replace=False)
    palette = np.array([road, kerb, soil, 0.4 * grass + 0.6 * soil, *tiles, rng.choice(BRIGHTS)], np.float32)
    return Style(
        use_share=use_share / use_share.sum(),
        palette=palette * rng.uniform(0.9, 1.1, (7, 1)).astype(np.float32),
        share=np.array([*(rng.dirichlet([9, 7, 8, 7, 3, 3]) * (1 - bright)), bright]),
        grass=grass,
        tree=np.array([rng.uniform(52, 82), rng.uniform(72, 98), rng.uniform(40, 58)], np.float32),
        sun_x=math.cos(sun),
        sun_y=math.sin(sun),
        sun_tan=math.tan(math.radians(rng.uniform(38, 60))),
        dryness=rng.uniform(-0.5, 0.7),
        trees=rng.uniform(0.3, 1.5),
        walk_m=rng.choice([0.0, 1.5, 2.2]),
    )


def bend_avenue(rng: Generator, height: int, width: int) -> LineString:
    """The main street, gently bent, that parts two quarters with streets of different directions."""
    reach, bend, phase = (height + width) * PX_M, rng.uniform(10, 35), rng.uniform(0, 6)
    shift = rng.uniform(-0.3, 0.3) * min(height, width) * PX_M
    frame = Frame(width / 2, height / 2, rng.uniform(0, math.pi)).moved(0, shift)
    return LineString([frame.to_px(u, bend * math.sin(u / 90 + phase)) for u in np.arange(-reach, reach, 6.0)])


def plan_streets(rng: Generator, plan: Plan) -> Plan:
    """Cut the quarters on both sides of the avenue into blocks, with streets between them."""
    block_m, reach = (rng.uniform(80, 120), rng.uniform(44, 62)), 0.75 * math.hypot(plan.height, plan.width) * PX_M
    ends = np.array(plan.avenue.coords)
    across = np.array([ends[0, 1] - ends[-1, 1], ends[-1, 0] - ends[0, 0]])
    blocks, streets, counts = [], [], np.zeros(len(USES))
    for side in (-2, 2):
        half = Polygon(np.vstack([ends, ends[[-1, 0]] + side * across])).buffer(0)
        quarter = half.intersection(box(0, 0, plan.width, plan.height).buffer(60))
        shapely.prepare(quarter)
        middle = Frame(plan.width / 2, plan.height / 2, rng.uniform(0, math.pi / 2))
        todo = [Place(middle, reach, reach, quarter)]
        while todo:
            area = todo.pop()
            if not area.frame.polygon((-area.half_u_m, -area.half_v_m, area.half_u_m, area.half_v_m)).intersects(
                quarter
            ):
                continue
            longer, shorter = max(area.half_u_m, area.half_v_m), min(area.half_u_m, area.half_v_m)
            frame = area.frame if area.half_u_m == longer else area.frame.moved(0, 0, math.pi / 2)
            length, v, most = 2 * longer, shorter, block_m[0]
            if length < 1.35 * most:  # long enough: cut it along, if it is deep
                if 2 * shorter < 1.35 * block_m[1]:
                    wanted = plan.style.use_share * (counts.sum() + 1) - counts + rng.uniform(0, 0.9, len(USES))
                    use = USES[wanted.argmax()]  # whatever is scarcest, so that small pictures have houses too
                    counts[wanted.argmax()] += 1
                    blocks.append(Place(frame, longer, shorter, quarter, use))
                    continue
                frame, length, v, most = frame.moved(0, 0, math.pi / 2), 2 * shorter, longer, block_m[1]
            wide = rng.uniform(9, 12) if length > 3.5 * most else rng.uniform(5, 8)
            cut = length * rng.uniform(0.42, 0.58) - length / 2
            streets.append(Place(frame.moved(cut, 0, math.pi / 2), v, wide / 2, quarter))
            for u0, u1 in ((-length / 2, cut - wide / 2), (cut + wide / 2, length / 2)):
                todo.append(Place(frame.moved((u0 + u1) / 2, 0), (u1 - u0) / 2, v, quarter))
    return replace(plan, blocks=tuple(blocks), streets=tuple(streets))


def build_houses(rng: Generator, plan: Plan) -> tuple[House, ...]:
    """The houses of all blocks that meet the picture and keep off the avenue: 30 to 1500 m², no two overlapping."""
    keep_off, picture = plan.avenue.buffer(11 / PX_M), box(0, 0, plan.width, plan.height)
    houses = []
    for block in plan.blocks:
        for frame, lot, parts in lots(rng, block):
            house = house_on(rng, plan.style, block.use or USES[0], frame, lot, parts)
            outline = house.footprint
            in_place = block.quarter.contains(outline.centroid) and not outline.intersects(keep_off)
            if in_place and outline.intersects(picture) and 30 <= outline.area * PX_M**2 <= 1500:
                houses.append(house)
    shrunk = [house.footprint.buffer(-0.02) for house in houses]
    first, second = shapely.STRtree(shrunk).query(shrunk, predicate="intersects")
    overlapping = {int(b) for a, b in zip(first, second, strict=True) if a < b}
    return tuple(house for number, house in enumerate(houses) if number not in overlapping)


def lots(rng: Generator, block: Place) -> Iterator[tuple[Frame, Rect, tuple[Rect, ...]]]:
    """Rows of lots along the block's long side as (frame, lot, parts of one roof), fronts at the larger v."""
    use = block.use
    if use is None or not use.houses:
        return
    rows = max(1 if use.row_m > 40 else 2, round(2 * (block.half_v_m - 3) / use.row_m))
    deep = 2 * (block.half_v_m - 3) / rows
    for row in range(rows):
        u_m, v_m, facing = (
            3 - block.half_u_m,
            (row + 0.5) * deep + 3 - block.half_v_m,
            0.0 if row >= rows / 2 else math.pi,
        )
        yard, house_deep = rng.uniform(0.5, 4), rng.uniform(9, use.most_m[1])
        while u_m + use.lot_m[0] < block.half_u_m - 3:
            wide = min(rng.uniform(*use.lot_m), block.half_u_m - 3 - u_m)
            frame = block.frame.moved(u_m + wide / 2, v_m, facing + rng.normal(0, use.turn))
            u_m += wide
            if rng.random() > use.houses:
                continue
            lot: Rect = (-wide / 2, -deep / 2, wide / 2, deep / 2)
            if use.gap_m == 0:  # party walls: as wide as the lot, all in a row
                back = deep / 2 - yard - min(deep - yard, house_deep + rng.choice([0, 0, 1.2]))
                yield frame, lot, ((lot[0], back, lot[2], deep / 2 - yard),)
            else:
                yield from ((frame, lot, parts) for parts in lot_parts(rng, use, wide, deep))


def lot_parts(rng: Generator, use: Use, wide: float, deep: float) -> Iterator[tuple[Rect, ...]]:
    """The rectangles of a house that stands free on its lot, plain, L or T, and of a back house where there is room."""
    hw = min(wide - 2 * use.gap_m, use.most_m[0]) * rng.uniform(0.8, 1.0)
    hd = min(deep - 2 * use.gap_m, use.most_m[1]) * rng.uniform(0.7, 1.0)
    u0 = rng.uniform(-0.5, 0.5) * (wide - 2 * use.gap_m - hw) - hw / 2
    v1 = deep / 2 - use.gap_m - rng.uniform(0, min(5.0, deep - 2 * use.gap_m - hd))
    left, right = {0: (0, 0.45), 1: (0.55, 1), 2: (0.3, 0.7)}.get(int(rng.integers(6)), (0, 0))
    if right and min(hw, hd) > 8:
        yield (u0, v1 - 0.55 * hd, u0 + hw, v1), (u0 + left * hw, v1 - hd, u0 + right * hw, v1)
    else:
        yield ((u0, v1 - hd, u0 + hw, v1),)
    room, back = v1 - hd - use.gap_m - (0.8 - deep / 2), 0.8 - deep / 2
    if use.gap_m < 3 and room > 5.2 and rng.random() < 0.4:
        half = rng.uniform(3, min(5.0, wide / 2 - 1))
        yield ((-half, back, half, back + min(room, rng.uniform(5.2, 7))),)


def house_on(rng: Generator, style: Style, use: Use, frame: Frame, lot: Rect, parts: tuple[Rect, ...]) -> House:
    """A house of the given parts: its form, height and colour."""
    outline = shapely.union_all([frame.polygon(part) for part in parts])
    area = outline.area * PX_M**2
    pitched: Form = "gable" if use.gap_m == 0 or rng.random() < 0.6 else "hip"
    form: Form = "flat" if rng.random() < use.flat else pitched
    storeys = 1 if area < 70 else int(rng.integers(1, 3 if area < 300 else 5))
    slope = 0.0 if form == "flat" else rng.uniform(0.3, 0.75) if area < 500 else rng.uniform(0.12, 0.3)
    sheets = rng.uniform(0.0, 0.2 if use.name == "dense" else 0.06)
    return House(frame, parts, lot, outline, form, 2.6 * storeys + 0.6, slope, material(rng, style), sheets)


def material(rng: Generator, style: Style) -> Float:
    """A colour of the city's palette, for a roof or a paving alike."""
    rgb: Float = style.palette[rng.choice(len(style.palette), p=style.share)] * np.float32(rng.uniform(0.82, 1.18))
    return rgb + rng.normal(0, 1.5, 3).astype(np.float32)


def noise(rng: Generator, height: int, width: int, sizes_px: tuple[int, ...]) -> Float:
    """Smooth random hills of several sizes with equal weights; about mean 0 and standard deviation 1."""
    total = np.zeros((height, width), np.float32)
    for size in sizes_px:
        small = Image.fromarray(rng.standard_normal((height // size + 3, width // size + 3), np.float32))
        total += np.asarray(small.resize((width, height), Image.Resampling.BICUBIC), np.float32)
    return total / np.float32(0.75 * math.sqrt(len(sizes_px)))


def fill(layer: Image.Image, shape: BaseGeometry, value: float) -> None:
    """Paint a shape into a layer of one band."""
    draw = ImageDraw.Draw(layer)
    for part in shapely.get_parts(shape):
        if isinstance(part, Polygon) and not part.is_empty:
            draw.polygon([(x - 0.5, y - 0.5) for x, y in part.exterior.coords], fill=value)


def paint_ground(rng: Generator, plan: Plan) -> Canvas:
    """Grass that turns to soil where it is dry or trodden; over it, with sharp edges, whatever is paved."""
    style, size = plan.style, (plan.width, plan.height)
    dry, paved = Image.new("F", size, style.dryness), Image.new("I", size, 1)
    colours: list[Float] = [style.grass, style.palette[0], style.palette[1], style.palette[0] * 0.5 + 100]  # 3: lines
    for street in plan.streets:
        colours.append(style.palette[0] * np.float32(rng.uniform(0.88, 1.12)))
        fill(paved, street.polygon(), len(colours) - 1)
    for block in plan.blocks:
        lay_block(rng, style, block, dry, paved, colours)
    for house in plan.houses:
        u0, v0, u1, v1 = house.lot
        fill(dry, house.frame.polygon(house.lot), style.dryness + rng.normal(0.2, 0.6))
        fill(dry, house.footprint.buffer(rng.uniform(3, 9)), style.dryness + rng.normal(0.7, 0.7))
        for _ in range(rng.integers(1, 4)):  # yards, drives and terraces, partly under the house
            u, v = rng.uniform(u0, u1 - 3), rng.uniform(v0, v1 - 3)
            yard = (u, v, min(u1, u + rng.uniform(2.5, 9)), min(v1, v + rng.uniform(2.5, 12)))
            colours.append(material(rng, style))
            fill(paved, house.frame.polygon(yard), len(colours) - 1)
    mark_streets(plan, paved)
    hills, drift = (
        noise(rng, plan.height, plan.width, (6, 14, 40, 110)),
        2.5 * noise(rng, plan.height, plan.width, (5, 12)),
    )
    grain, wear = noise(rng, plan.height, plan.width, (1, 2, 4)), noise(rng, plan.height, plan.width, (3, 9, 30, 120))
    rows, cols = np.mgrid[0 : plan.height, 0 : plan.width].astype(np.float32)
    dryness = ndimage.map_coordinates(np.asarray(dry), [rows + drift, cols - drift], order=1, mode="nearest") + hills
    soil = (1 / (1 + np.exp(-2.2 * dryness)))[..., None]
    nature = (style.grass * (1 - soil) + style.palette[2] * soil) * (1 + 0.06 * grain + 0.08 * wear)[..., None]
    index = np.asarray(paved)
    hard = np.array(colours, np.float32)[index] * (1 + 0.03 * grain + 0.07 * wear)[..., None]
    rgb = np.where((index > 0)[..., None], hard, nature).astype(np.float32)
    return Canvas(rgb, np.zeros(index.shape, np.float32), np.zeros(index.shape, bool))


def lay_block(
    rng: Generator, style: Style, block: Place, dry: Image.Image, paved: Image.Image, colours: list[Float]
) -> None:
    """One block: pavement around it, then garden, field, bare yard or car park inside."""
    use, u, v = block.use or USES[0], block.half_u_m - style.walk_m, block.half_v_m - style.walk_m
    fill(paved, block.polygon(), 2)
    fill(paved, block.polygon(style.walk_m), 0)
    fill(dry, block.polygon(style.walk_m), style.dryness + use.dryness + rng.normal(0, 0.5))
    if use.name == "field":
        furrow_m, dryness = rng.uniform(1.5, 4), rng.normal(0, 1.2)
        for left in np.arange(-u, u, furrow_m):
            strip = block.frame.polygon((left, -v, left + furrow_m / 2, v))
            fill(dry, strip.intersection(block.quarter), dryness + rng.normal(1.2, 0.3))
    if use.name == "park":
        path = LineString([block.frame.to_px(a, 0.5 * v * math.sin(a / 15)) for a in np.arange(-u, u, 3.0)])
        fill(paved, path.buffer(1.2 / PX_M).intersection(block.quarter), 2)
    if rng.random() < use.paved:
        colours.append(material(rng, style))
        fill(paved, block.polygon(style.walk_m + 2), len(colours) - 1)
    if use.name == "cars":
        for left in np.arange(4 - u, u - 4, 2.6):
            for row in np.arange(6 - v, v - 6, 16.0):
                line = block.frame.polygon((left, row - 5, left + 0.25, row + 5))
                fill(paved, line.intersection(block.quarter), 3)


def mark_streets(plan: Plan, paved: Image.Image) -> None:
    """Broken lines along the middle of the wider streets, and the avenue with kerbs and lanes on top."""
    for street in plan.streets:
        for u in np.arange(-street.half_u_m, street.half_u_m, 7.0 if street.half_v_m > 3.5 else math.inf):
            dash = street.frame.polygon((u, -0.15, u + 3, 0.15))
            if street.quarter.contains(dash):
                fill(paved, dash, 3)
    fill(paved, plan.avenue.buffer((7.5 + plan.style.walk_m) / PX_M), 2)
    fill(paved, plan.avenue.buffer(7 / PX_M), 1)
    for offset in (-3, 3):
        lane = plan.avenue.offset_curve(offset / PX_M)
        for start in np.arange(0, lane.length, 7 / PX_M):
            fill(paved, substring(lane, start, start + 3 / PX_M).buffer(0.6, cap_style="flat"), 3)


def park_cars(rng: Generator, plan: Plan, canvas: Canvas) -> None:
    """Cars along the streets and in rows on car parks: a body of one colour with dark panes, 1.4 m high."""
    spots = []
    for street in plan.streets:
        for u in rng.uniform(-1, 1, rng.poisson(street.half_u_m / 14)) * street.half_u_m:
            spots.append((street.frame.moved(u, rng.choice([-1, 1]) * (street.half_v_m - 1.3)), street.quarter))
    for block in plan.blocks:
        if block.use is not None and block.use.name == "cars":
            for u in np.arange(5.3 - block.half_u_m, block.half_u_m - 5, 2.6):
                for v in np.arange(5.4 - block.half_v_m, block.half_v_m - 7, 16.0):
                    for side in rng.choice([0, 5.2], rng.integers(0, 3), replace=False):
                        spots.append((block.frame.moved(u, v + side, math.pi / 2), block.quarter))
    for frame, quarter in spots:
        outline = frame.polygon((-2.2, -0.95, 2.2, 0.95))
        if quarter.contains(outline):
            at, x, y = canvas.window(outline)
            u, v = frame.to_uv(x, y)
            body = (abs(u) < 2.2) & (abs(v) < 0.95)
            canvas.rgb_HW3[at][body] = BODIES[rng.integers(len(BODIES))]
            canvas.rgb_HW3[at][body & (abs(abs(u) - 1.0) < 0.4)] = (48, 52, 58)
            canvas.height_HW[at][body] = 1.4


def plant_trees(rng: Generator, plan: Plan, canvas: Canvas) -> None:
    """Trees of every size in gardens and parks and in rows along some streets: bumpy domes, lit from the sun."""
    style, spots = plan.style, []
    for block in plan.blocks:
        area = 4 * block.half_u_m * block.half_v_m
        count = rng.poisson((block.use or USES[0]).trees * style.trees * area / 100)
        for u, v in rng.uniform(-1, 1, (count, 2)):
            spots.append((Point(block.frame.to_px(u * block.half_u_m, v * block.half_v_m)), block.quarter))
    for street in plan.streets:
        if rng.random() < 0.3 * style.trees:
            for u in np.arange(-street.half_u_m, street.half_u_m, 9.0):
                v = rng.choice([-1, 1]) * (street.half_v_m + 1)
                spots.append((Point(street.frame.to_px(u, v)), street.quarter))
    roofs, lumps = shapely.STRtree([h.footprint for h in plan.houses]), noise(rng, plan.height, plan.width, (3, 7))
    for spot, quarter in spots:
        radius_m = rng.gamma(5.0, 0.5) + 0.5
        clear = radius_m * 0.6 / PX_M
        if (
            len(roofs.query(spot, "dwithin", clear))
            or plan.avenue.distance(spot) < 24 + clear
            or not quarter.contains(spot)
        ):
            continue
        at, x, y = canvas.window(spot.buffer(1.2 * radius_m / PX_M))
        dx, dy = (x - spot.x) * PX_M / radius_m, (y - spot.y) * PX_M / radius_m
        dome = 1 - dx**2 - dy**2 + 0.22 * lumps[at]
        inside, light = dome > 0, 0.95 + 0.4 * (dx * style.sun_x + dy * style.sun_y) + 0.2 * lumps[at]
        rgb = (style.tree * rng.uniform(0.75, 1.25) + rng.normal(0, 6, 3)) * light[..., None]
        canvas.rgb_HW3[at][inside] = rgb[inside]
        canvas.height_HW[at][inside] = (1.5 * radius_m * np.sqrt(np.clip(dome, 0, 1)) + 1)[inside]


def raise_roof(rng: Generator, style: Style, canvas: Canvas, house: House) -> None:
    """One roof: its faces lit by their slope, rows of tiles or sheets, and what stands on it."""
    at, x, y = canvas.window(house.footprint)
    u, v = house.frame.to_uv(x, y)
    top, edge, grad_u, grad_v = (np.zeros_like(u) for _ in range(4))  # height, distance to the outline, slope
    for u0, v0, u1, v1 in house.parts:
        cu, cv = u - (u0 + u1) / 2, v - (v0 + v1) / 2
        du, dv = (u1 - u0) / 2 - abs(cu), (v1 - v0) / 2 - abs(cv)
        across_v = u1 - u0 >= v1 - v0 if house.form == "gable" else dv <= du
        rise = house.eave_m + house.slope * np.where(across_v, dv, du)
        inside = (du >= 0) & (dv >= 0)
        higher = inside & (rise > top)
        edge = np.where(inside, np.maximum(edge, np.minimum(du, dv)), edge)
        grad_u = np.where(higher, np.where(across_v, 0, -np.sign(cu)) * house.slope, grad_u)
        grad_v = np.where(higher, np.where(across_v, -np.sign(cv), 0) * house.slope, grad_v)
        top = np.where(higher, rise, top)
    roof, (cos, sin) = top > 0, (math.cos(house.frame.angle), math.sin(house.frame.angle))
    uphill = grad_u * (style.sun_x * cos + style.sun_y * sin) + grad_v * (style.sun_y * cos - style.sun_x * sin)
    lit = np.clip((1 - uphill / style.sun_tan) / math.hypot(1, house.slope), 0.15, 2)  # Lambert, 1 on the level
    sheet = rng.normal(0, house.sheets, (64, 64))[(u / 0.95).astype(int) % 64, (v / 2.7).astype(int) % 64]
    ribs = 0.035 * np.sin(2 * math.pi * (u, v)[rng.integers(2)] / rng.uniform(0.9, 1.3)) * (house.slope > 0)
    stains = noise(rng, u.shape[0], u.shape[1], (2, 5, 11)) * rng.uniform(0.02, 0.06)
    rgb = house.rgb * ((0.35 + 0.65 * lit) * (1 + sheet + ribs + stains))[..., None]
    rim = edge < 0.45
    rgb[rim] *= rng.uniform(1.05, 1.3) if house.form == "flat" else 0.9
    top = np.where(rim & (house.form == "flat"), top + 0.7, top)
    furnish_roof(rng, house, (u, v), edge, (top, rgb))
    canvas.rgb_HW3[at][roof] = rgb[roof]
    canvas.height_HW[at][roof] = top[roof]
    canvas.roof_HW[at] |= roof


def furnish_roof(
    rng: Generator, house: House, uv: tuple[Float, Float], edge: Float, top_rgb: tuple[Float, Float]
) -> None:
    """Stair heads, machines and tanks on flat roofs; chimneys and roof windows on pitched ones. Changes top and rgb."""
    (u, v), (top, rgb), (u0, v0, u1, v1), flat = uv, top_rgb, house.parts[0], house.form == "flat"
    for _ in range(rng.integers(0, 3 + int((u1 - u0) * (v1 - v0) / 120) if flat else 3)):
        half_u, half_v = rng.uniform(0.6, 1.8, 2) if flat else rng.uniform(0.3, 0.6, 2)
        near_u, near_v = abs(u - rng.uniform(u0 + 1, u1 - 1)) < half_u, abs(v - rng.uniform(v0 + 1, v1 - 1)) < half_v
        thing = near_u & near_v & (edge > 0.5)
        rgb[thing] = house.rgb * 0.4 + 0.6 * (rng.uniform(60, 210) if flat else rng.uniform(50, 130))
        top[thing] += rng.uniform(0.8, 2.4) if flat else rng.choice([0.1, 1.0])


def cast_shadows(style: Style, canvas: Canvas) -> None:
    """Darken every pixel from which something stands before the sun, looking towards it one pixel further at a time."""
    height_HW = canvas.height_HW
    steps, (rows, cols) = math.ceil(float(height_HW.max()) / (PX_M * style.sun_tan)), height_HW.shape
    padded, shaded = np.pad(height_HW, steps + 1), np.zeros(height_HW.shape, bool)
    for step in range(1, steps + 1):
        top, left = steps + 1 + round(step * style.sun_y), steps + 1 + round(step * style.sun_x)
        ray_HW = height_HW + np.float32(step * PX_M * style.sun_tan + 0.15)
        shaded |= padded[top : top + rows, left : left + cols] > ray_HW
    soft = ndimage.gaussian_filter(shaded.astype(np.float32), 0.6)[..., None]
    canvas.rgb_HW3[...] *= 1 - soft * np.array([0.6, 0.57, 0.5], np.float32)


def take_picture(rng: Generator, canvas: Canvas) -> NDArray[np.uint8]:
    """What a camera makes of it: blur, colour coarser than brightness as after JPEG, contrast, haze, cast and noise."""
    grey = canvas.rgb_HW3.mean(2)
    colour = ndimage.gaussian_filter(canvas.rgb_HW3 - grey[..., None], (1.2, 1.2, 0))
    colour += np.stack([rng.uniform(1, 3) * noise(rng, grey.shape[0], grey.shape[1], (3, 8, 60)) for _ in range(3)], 2)
    grain = ndimage.gaussian_filter(rng.standard_normal(grey.shape, np.float32), 0.5) * rng.uniform(3, 8)
    sharp = ndimage.gaussian_filter(grey, rng.uniform(0.5, 0.8)) + grain
    cast, level = rng.uniform(0.85, 1.2) * (1 + rng.normal(0, 0.03, 3)), 112 + rng.uniform(0, 16)
    seen = (sharp[..., None] + colour - 115) * cast + level
    image_HW3: NDArray[np.uint8] = np.clip(seen + 0.5, 2, 255).astype(np.uint8)
    return image_HW3
