"""Measure a network on labelled areas: as `run` would predict them, on central crops, or picture by picture.

Axes: B batch, C bands, K classes, H rows, W columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import minimum_filter1d
from torch import Tensor
from torch.nn.functional import pad

from segpipe.models.augment import Normalisation, normalise
from segpipe.models.calibrate import LogitHistogram, logit_histogram
from segpipe.models.losses import Loss
from segpipe.models.metrics import EDGE_PX, STEPS, Scores, score
from segpipe.models.networks import Network
from segpipe.models.predictor import Precision
from segpipe.tasks.grid import Window
from segpipe.tasks.predict import reach
from segpipe.tasks.sample import SCORED, Area, cores, cut

CPU = torch.device("cpu")
CORE_PX = 1024
"""Areas are predicted in cores of this size, with the exact halo: as `run` would."""
PICTURE_PX = 4_000_000
"""Pictures of more pixels are predicted in cores too, and no more are predicted at once."""
HALO_CORES, HALO_CORE_PX = 24, 256
"""Windows that the effective halo is measured on: their number, and the side of their cores."""
HALO_POSITIONS = 200
"""Cells of one stride that have to lie in them for a halo to be told."""
HALO_AREA_PX = 1024
HALO_REGION_PX = 3072
UNBOUNDED_PX = 512
"""As far as the effective halo is looked for where the network's field has no bound."""
MOST_CHANGE, USUAL_CHANGE = 2 / STEPS, 1 / STEPS
"""What the effective halo lets change: the largest change of a probability, and its 99.99th percentile."""


@dataclass(frozen=True)
class View:
    """One window to be measured. core: what is answered for; area: with a frame of what may be looked at."""

    area: Area
    core: Window
    whole: bool
    """True where the core is all that there is to look at, so that no halo is needed."""


@dataclass(frozen=True)
class Eye:
    """How a network looks at raw pixels. halo_px: exact for a core of an area; temperature: divides logits."""

    network: Network
    normalisation: Normalisation
    halo_px: int
    device: torch.device
    precision: Precision
    temperature: float = 1.0

    def window(self, view: View) -> Window:
        """What has to be read for a view. Its upper left corner lies on the stride's lattice."""
        network, frame = self.network, view.area.whole
        core = Window(view.core.row_off - frame.row_off, view.core.col_off - frame.col_off, *view.core.shape_yx)
        seen = reach(core, 0 if view.whole else self.halo_px, network.stride)
        if network.border_px:
            # From the lattice on, as `run` does, although a few pixels less would do above and to the left.
            core, before = core.snap(network.stride), -(-network.border_px // network.stride) * network.stride
            tall, wide = (side + before + network.border_px for side in core.shape_yx)
            down, right = ((network.remainder_px - side) % network.stride for side in (tall, wide))
            seen = Window(core.row_off - before, core.col_off - before, tall + down, wide + right)
        return Window(seen.row_off + frame.row_off, seen.col_off + frame.col_off, *seen.shape_yx)

    def logits(self, image_BCHW: NDArray[np.uint8], present_BHW: NDArray[np.bool_]) -> Tensor:
        """Logits_BHW in float32 of raw pixels, over the temperature; smaller by the border of the network."""
        image = torch.from_numpy(image_BCHW).to(self.device).float() / self.normalisation.scale
        present = torch.from_numpy(present_BHW).to(self.device)
        image = normalise(image, present, self.normalisation).contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            logits_BKHW: Tensor = self.network(image)
        return logits_BKHW[:, 0].float() / self.temperature


@dataclass(frozen=True)
class Seen:
    """What became of one view. Arrays of the core: image_CHW, label_HW, valid_HW (True where scored), logits_HW."""

    view: View
    image_CHW: NDArray[np.uint8]
    label_HW: NDArray[np.uint8]
    valid_HW: NDArray[np.bool_]
    edge_HW: NDArray[np.bool_]
    logits_HW: Tensor


def plan_views(areas: Sequence[Area], validate_px: int | None) -> list[View]:
    """The windows that are measured. validate_px: the side of the central crop of each tile; None: everything."""
    views: list[View] = []
    for area in areas:
        if validate_px is not None:
            crops = [_centre(tile, validate_px) for tile in area.tiles or (area.window,)]
            views += [View(replace(area, frame=crop), crop, True) for crop in crops]
        elif area.frame is not None and area.frame.pixels <= PICTURE_PX:
            views.append(View(area, area.frame, True))
        else:
            views += [View(area, core, False) for core in cores(area, CORE_PX)]
    return views


def _centre(tile: Window, side: int) -> Window:
    height, width = min(side, tile.height), min(side, tile.width)
    return Window(tile.row_off + (tile.height - height) // 2, tile.col_off + (tile.width - width) // 2, height, width)


def look(eye: Eye, views: Sequence[View], batch: int) -> Iterator[list[Seen]]:
    """Predict views, those of one size that need no halo up to `batch` at once; without those with nothing to score."""
    with _evaluating(eye.network), torch.no_grad():
        for whole, run in groupby(views, lambda view: (view.whole, view.core.shape_yx)):
            together = list(run)
            size = max(1, min(batch, PICTURE_PX // (whole[1][0] * whole[1][1]))) if whole[0] else 1
            for start in range(0, len(together), size):
                seen = _look_at(eye, together[start : start + size])
                if seen:
                    yield seen


def _look_at(eye: Eye, views: Sequence[View]) -> list[Seen]:
    read = []
    for view in views:
        window = eye.window(view)
        image_CHW, label_HW, valid_HW = cut(view.area, window)
        if (valid_HW[view.core.within(window)] == SCORED).any():
            read.append((view, window, image_CHW, label_HW, valid_HW))
    if not read:
        return []
    logits_BHW = eye.logits(np.stack([it[2] for it in read]), np.stack([it[4] != 0 for it in read]))
    border = eye.network.border_px
    found: list[Seen] = []
    for (view, window, image_CHW, label_HW, valid_HW), logits_HW in zip(read, logits_BHW, strict=True):
        inside = view.core.within(window)
        answered = view.core.within(window.pad(-border)) if border else inside
        found.append(
            Seen(
                view,
                image_CHW[:, *inside],
                label_HW[inside],
                valid_HW[inside] == SCORED,
                _edge(view),
                logits_HW[answered],
            )
        )
    return found


def _edge(view: View) -> NDArray[np.bool_]:
    """True within 64 px of where there is no imagery."""
    window = view.core.pad(EDGE_PX)
    _, _, valid_HW = cut(view.area, window)
    near = (valid_HW != 0).astype(np.uint8)
    for axis in (0, 1):
        near = minimum_filter1d(near, 2 * EDGE_PX + 1, axis=axis, mode="constant", cval=0)
    edge_HW: NDArray[np.bool_] = near[view.core.within(window)] == 0
    return edge_HW


def measure(
    eye: Eye,
    views: Sequence[View],
    batch: int,
    loss: Loss,
    listener: Callable[[Seen, Scores], None] | None = None,
) -> Scores:
    """Scores of all views, `batch` of them being a batch, as in training. listener: gets each, and its own scores."""
    total, waiting = Scores.empty(), list[Seen]()
    for seen in look(eye, views, batch):
        waiting += seen
        while len(waiting) >= batch:
            total = total + score_of(waiting[:batch], loss).to(CPU)
            del waiting[:batch]
        if listener is not None:
            for one in seen:
                listener(one, score_of([one], loss).to(CPU))
    return total + score_of(waiting, loss).to(CPU) if waiting else total


def score_of(seen: Sequence[Seen], loss: Loss) -> Scores:
    """Scores of views as one batch; smaller ones are padded with what is not scored."""
    height, width = (max(one.valid_HW.shape[axis] for one in seen) for axis in (0, 1))

    def stacked(planes: Iterable[Tensor]) -> Tensor:
        sides = [(plane, width - plane.shape[1], height - plane.shape[0]) for plane in planes]
        return torch.stack([pad(plane, (0, right, 0, below)) for plane, right, below in sides])

    device = seen[0].logits_HW.device
    logits_BKHW = stacked(one.logits_HW for one in seen)[:, None]
    target_BKHW = stacked(torch.from_numpy(one.label_HW) for one in seen).to(device)[:, None].float()
    valid_BHW = stacked(torch.from_numpy(one.valid_HW) for one in seen).to(device)
    edge_BHW = stacked(torch.from_numpy(one.edge_HW) for one in seen).to(device)
    found = loss(logits_BKHW, target_BKHW, valid_BHW)
    return score(torch.sigmoid(logits_BKHW), target_BKHW, valid_BHW, found, edge_BHW)


def count_logits(eye: Eye, views: Sequence[View], batch: int) -> LogitHistogram:
    """Logits of all views, for calibration."""
    total = LogitHistogram.empty()
    for seen in look(eye, views, batch):
        for one in seen:
            total = total + logit_histogram(
                one.logits_HW.cpu(), torch.from_numpy(one.label_HW), torch.from_numpy(one.valid_HW)
            )
    return total


@contextmanager
def _evaluating(network: Network) -> Iterator[None]:
    """Eval mode for a while."""
    training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(training)


# The effective halo


@dataclass(frozen=True)
class EffectiveHalo:
    """How far a network sees in effect: beyond halo_px nothing changes a probability by more than is told here."""

    halo_px: int
    positions: int
    largest: float
    percentile: float


def effective_halo(eye: Eye, area: Area, exact_px: int | None, seed: int = 0) -> EffectiveHalo | None:
    """The smallest halo in steps of the stride that changes next to nothing; None where the area is too small to tell.

    At random places of the stride's lattice the network is given a core with the exact halo around it, and what it says
    there, everything beyond being cut off, is put beside what it says with its surroundings in sight. A pixel that lies
    d from the cut tells of a halo of d: the halo is the smallest from which on the largest change of a probability is
    at most 2 steps of 250, and its 99.99th percentile at most one. exact_px None: the field has no bound, 512 px are
    looked at. In float32, since it is small changes that are asked for.
    """
    stride, most = eye.network.stride, UNBOUNDED_PX if exact_px is None else exact_px
    most, side = -(-most // stride) * stride, -(-HALO_CORE_PX // stride) * stride
    region = _region(area, stride)
    if min(region.shape_yx) < HALO_AREA_PX or eye.network.border_px:
        return None
    places = [
        (row, col)
        for row in range(0, region.height - side + 1, stride)
        for col in range(0, region.width - side + 1, stride)
    ]
    positions = HALO_CORES * (side // stride) ** 2
    if len(places) < HALO_CORES or positions < HALO_POSITIONS:
        return None
    eye = replace(eye, precision="float32", halo_px=most)
    framed = replace(area, frame=region)
    picks = np.random.default_rng(seed).choice(len(places), HALO_CORES, replace=False)
    with _evaluating(eye.network), torch.no_grad():
        whole_HW, valid_HW = _probabilities(eye, framed, region)
        counts = np.zeros((most // stride + 1, STEPS * 4 + 1), np.int64)
        largest = np.zeros(most // stride + 1)
        for pick in picks:
            row, col = places[pick]
            _compare(eye, framed, Window(row, col, side, side), whole_HW, valid_HW, counts, largest)
    # What is true of a distance is true of all halos up to it.
    largest = np.maximum.accumulate(largest[::-1])[::-1]
    counts = np.cumsum(counts[::-1], axis=0)[::-1]
    for step in range(most // stride + 1):
        percentile = _percentile(counts[step])
        if largest[step] <= MOST_CHANGE and percentile <= USUAL_CHANGE:
            return EffectiveHalo(step * stride, positions, float(largest[step]), percentile)
    return None


def _region(area: Area, stride: int) -> Window:
    """The middle of an area's labelled pixels, on the stride's lattice, and not too large to be predicted whole."""
    window, whole = area.window, area.whole
    height, width = (min(side, HALO_REGION_PX) // stride * stride for side in window.shape_yx)
    row = window.row_off + (window.height - height) // 2 - whole.row_off
    col = window.col_off + (window.width - width) // 2 - whole.col_off
    return Window(whole.row_off + row // stride * stride, whole.col_off + col // stride * stride, height, width)


def _probabilities(eye: Eye, area: Area, region: Window) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Probabilities of a region that is all there is, in cores with the exact halo, and where there is imagery."""
    prob_HW = np.zeros(region.shape_yx, np.float32)
    _, _, valid_HW = cut(area, region)
    for row, col in Window(0, 0, *region.shape_yx).cells(CORE_PX):
        core = Window.cell(row, col, CORE_PX).intersect(Window(0, 0, *region.shape_yx))
        placed = Window(core.row_off + region.row_off, core.col_off + region.col_off, *core.shape_yx)
        view = View(area, placed, False)
        outer = eye.window(view)
        image_CHW, _, seen_HW = cut(area, outer)
        logits_HW = eye.logits(image_CHW[None], seen_HW[None] != 0)[0][placed.within(outer)]
        prob_HW[core.within(Window(0, 0, *region.shape_yx))] = torch.sigmoid(logits_HW).cpu().numpy()
    return prob_HW, valid_HW != 0


def _compare(
    eye: Eye,
    area: Area,
    core: Window,
    whole_HW: NDArray[np.float32],
    valid_HW: NDArray[np.bool_],
    counts: NDArray[np.int64],
    largest: NDArray[np.float64],
) -> None:
    """Take note of what changes around a core if all beyond its halo is cut off, by the distance from the cut."""
    stride, region = eye.network.stride, area.whole
    box = core.pad(eye.halo_px)
    placed = Window(box.row_off + region.row_off, box.col_off + region.col_off, *box.shape_yx)
    image_CHW, _, seen_HW = cut(area, placed)
    prob_HW = torch.sigmoid(eye.logits(image_CHW[None], seen_HW[None] != 0)[0]).cpu().numpy()
    inside = box.intersect(Window(0, 0, *region.shape_yx))
    mine, theirs = inside.within(box), inside.within(Window(0, 0, *region.shape_yx))
    change = np.abs(prob_HW[mine] - whole_HW[theirs])
    # An edge beyond the region cuts too: the network's own padding is not fill.
    rows, cols = (np.minimum(np.arange(side), side - 1 - np.arange(side)) for side in box.shape_yx)
    away = np.minimum(rows[:, None], cols[None])[mine]
    keep = valid_HW[theirs]
    step, change = np.minimum(away[keep] // stride, len(largest) - 1), change[keep]
    np.maximum.at(largest, step, change)
    bins = counts.shape[1]
    quarter = np.minimum(np.ceil(change * (bins - 1)), bins - 1).astype(np.int64)
    counts += np.bincount(step * bins + quarter, minlength=counts.size).reshape(counts.shape)


def _percentile(counts: NDArray[np.int64]) -> float:
    """The 99.99th percentile of changes that were counted in quarters of a step, rounded up."""
    total = int(counts.sum())
    if not total:
        return 0.0
    return float(np.searchsorted(np.cumsum(counts), 0.9999 * total) / (STEPS * 4))
