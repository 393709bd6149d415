"""A network on a CPU, its finest maps in strips of rows: the same bits in a fraction of the memory.

A U-Net's maps are large where they are fine, and there no layer sees further than a few rows. So rows are asked for
from the end: those of a layer are made of the rows of its inputs that it sees, and these of theirs. Whole in memory are
only the maps that several layers read, and coarser ones that are doubled. Rows where strips meet are made twice.
Of a window's halo the last layers make only what the core sees through them: a few pixels, where the first make all.
Axes: B batch, C channels, H rows, W columns.
"""

from __future__ import annotations

import copy
import math
import operator
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch.fx
from torch import Tensor, nn
from torch.nn import functional as nnf

from .fold import Fused, FusedParts, pads_with_zeros
from .networks.upsample import Bilinear, Transposed2, Transposed3, Transposed4

LEAST_ROWS, MOST_ROWS = 32, 128
"""Of a strip. Of maps two rows high oneDNN's convolutions add up in another order than of higher ones (float32)."""
PIECE_COLS, ODD_PIECE_COLS = 240, 1024
"""Of a strip's map that is most work: in bfloat16, where there is AMX, wider ones are made in pieces. oneDNN convolves
rows of less than 256 columns faster than others where channels are whole 64s (128 to 128: 3.2 TFLOP/s, 2.1 on 1056
columns), and slower where they are not (48 to 48: 1.4, 1.7); and less memory goes by from one layer to the next.
Windows of 4416 px took `unet11` 11 % less time than without, `unet-mobilenetv2` 10 %; in float32 2 to 4 % more."""
STRIP_BYTES = 48 * 2**20
"""The largest map of a strip. Blocks of 64 MiB and more glibc takes from no thread's heap, but maps and clears anew."""
COLS = 16
"""The fewest columns of a map that is cut: on fewer oneDNN's convolutions add up in another order (float32, AVX512).
Of a whole number of these each costs less (AMX, 512 channels: by a quarter)."""
FINE = 2
"""A map of so many pixels of the image to each of its own, along a side, or fewer, is not kept whole to be doubled."""


Core = tuple[slice, slice]
"""The rows and columns of a window that are asked for, each from start to stop; the rest of it is what they see."""


def whole_of(image_BCHW: Tensor) -> Core:
    """All rows and columns."""
    height, width = image_BCHW.shape[2:]
    return slice(0, height), slice(0, width)


@dataclass(frozen=True)
class _Layer:
    """What makes a layer's rows of rows of its inputs, which are numbers of other layers.

    Rows a to b are made of a * down - above to (b - 1) * down + below + 1, with `fill` beyond the edges. A layer that
    doubles is given a // 2 - above to b / 2 + below instead, within the edges, and gives two rows for each.
    scale: pixels of the image to each of the layer's, along a side.
    """

    run: Callable[..., Tensor]
    inputs: tuple[int, ...]
    channels: int
    scale: int
    doubles: bool = False
    down: int = 1
    above: int = 0
    below: int = 0
    fill: float = 0.0

    def sees(self, first: int, stop: int) -> tuple[int, int]:
        """Of which rows of an input rows first to stop are made, those beyond its edges too."""
        if self.doubles:
            return first // 2 - self.above, (stop + 1) // 2 + self.below
        return first * self.down - self.above, (stop - 1) * self.down + self.below + 1


@dataclass(frozen=True)
class _Chain:
    """Layers that are made together, piece by piece, so that the last one's map is whole in the end.

    reads: the image and the whole maps that they are made of. reach_px: how far from its sides a piece is wrong, since
    it lacks what lies beyond. own: the last layer's scale. coarsest: of all layers here. piece_px: a piece's columns.
    """

    layers: frozenset[int]
    reads: frozenset[int]
    reach_px: int
    own: int
    coarsest: int
    piece_px: int

    def made(self, first: int, stop: int, width: int) -> tuple[int, int]:
        """Columns of an image that is so wide to make a piece of, if columns first to stop of it are to be right."""
        first = max((first - self.reach_px) // self.coarsest * self.coarsest, 0)
        step, least = math.lcm(COLS * self.own, self.coarsest), COLS * self.coarsest
        stop = first + math.ceil(max(stop + self.reach_px - first, least) / step) * step
        return (first, stop) if stop <= width else (max(min(first, width - least), 0), width)

    def pieces(self, first: int, stop: int, width: int) -> list[tuple[int, int]]:
        """Columns first to stop of such an image in pieces, which leave room for what each is wrong in at its sides."""
        made = self.made(first, stop, width)
        if made[1] - made[0] <= self.piece_px:
            return [(first, stop)]
        room = self.piece_px - 2 * self.reach_px - self.coarsest
        count = math.ceil((stop - first) / max(room, self.coarsest))
        ends = [first + (stop - first) * piece // count // self.coarsest * self.coarsest for piece in range(count)]
        return [*pairwise(sorted({*ends, stop}))]


@dataclass(frozen=True)
class _Map:
    """Part of a layer's map, map_BCHW, and the row and column of the layer where it begins."""

    map_BCHW: Tensor
    row: int = 0
    col: int = 0

    def between(self, first: int, stop: int) -> _Map:
        """Columns first to stop of the layer."""
        return _Map(self.map_BCHW[..., first - self.col : stop - self.col], self.row, first)


def in_strips(network: nn.Module, largest_px: int = 0) -> nn.Module:
    """The same function of an image, in strips; the network itself if it is no graph of layers that are known here.

    largest_px: pixels of the largest image that is to come, if that is known.
    """
    layers = _layers(network) if isinstance(network, torch.fx.GraphModule) else None
    return network if layers is None else Strips(network, layers, largest_px)


def has_fast_pieces(dtype: torch.dtype) -> bool:
    """Whether convolutions are faster on narrow maps than on wide ones here, for all that is made twice."""
    return dtype == torch.bfloat16 and bool(torch.cpu._is_amx_tile_supported())


class Strips(nn.Module):
    """Runs the layers of a graph, in which each follows its inputs. Memory of whole maps is kept for the next image."""

    def __init__(self, graph: nn.Module, layers: list[_Layer], largest_px: int) -> None:
        super().__init__()
        self.graph, self.layers, self.last = graph, layers, len(layers) - 1
        readers = Counter(it for layer in layers for it in layer.inputs)
        doubled = {layer.inputs[0] for layer in layers if layer.doubles}

        def is_whole(number: int, layer: _Layer) -> bool:
            # The first layer's map, if it is a skip, is the largest of all, and soon made again of so few bands.
            several = readers[number] > 1 and layer.inputs != (0,)
            return several or number == self.last or (number in doubled and layer.scale > FINE)

        whole = {number for number, layer in enumerate(layers) if number and is_whole(number, layer)}
        self.chains = {number: self._chain(number, {0, *whole}) for number in sorted(whole)}
        self.last_use = {it: number for number, chain in self.chains.items() for it in chain.reads}
        self.place_of, values = self._places()
        self.kept = Kept(values, largest_px)

    def _places(self) -> tuple[dict[int, int], list[float]]:
        """Where each whole map lies that others are made of, and the numbers of each place, for one pixel of the image.

        Maps of which one is no longer needed when the other is made may lie in the same place.
        """
        place_of: dict[int, int] = {}
        values: list[float] = []
        free: set[int] = set()
        for number in self.chains:
            if number in self.last_use:
                need = self.layers[number].channels / self.layers[number].scale ** 2
                if not free:
                    free.add(len(values))
                    values.append(need)
                # The smallest that is large enough, else the one that has to grow least.
                place = min(free, key=lambda it: (values[it] < need, abs(values[it] - need)))
                free.remove(place)
                values[place] = max(values[place], need)
                place_of[number] = place
            free |= {place_of[it] for it in place_of if self.last_use[it] == number}
        return place_of, values

    def _chain(self, number: int, whole: set[int]) -> _Chain:
        made = {number}
        for it in range(number, 0, -1):
            made |= {source for source in self.layers[it].inputs if it in made} - whole
        reads = {source for it in made for source in self.layers[it].inputs} - made
        reach_px = dict.fromkeys(reads, 0)
        for it in sorted(made):
            layer = self.layers[it]
            scale, before_px = self.layers[layer.inputs[0]].scale, max(reach_px[source] for source in layer.inputs)
            reach_px[it] = (math.ceil(before_px / scale) + max(layer.above, layer.below)) * scale

        def work(it: int) -> float:
            layer = self.layers[it]
            return layer.channels * sum(self.layers[source].channels for source in layer.inputs) / layer.scale**2

        most = self.layers[max(made, key=work)]
        piece_px = (ODD_PIECE_COLS if most.channels % 64 else PIECE_COLS) * most.scale
        coarsest = max(self.layers[it].scale for it in made | reads)
        return _Chain(
            frozenset(made), frozenset(reads), reach_px[number], self.layers[number].scale, coarsest, piece_px
        )

    def forward(self, image_BCHW: Tensor, core: Core | None = None) -> Tensor:
        """Logits_BKHW; H and W multiples of the network's stride. One thread at a time.

        core: the rows and columns that are asked for, from start to stop; None: all.
        """
        height, width = image_BCHW.shape[2:]
        rows, cols = core or whole_of(image_BCHW)
        if image_BCHW.shape[0] != 1:
            logits_BKHW: Tensor = self.graph(image_BCHW)
            return logits_BKHW[:, :, rows, cols]
        first = max(min(rows.start, height - LEAST_ROWS), 0)
        rows_of = self._rows_of(height, first, min(max(rows.stop, first + LEAST_ROWS), height))
        pieces_of = self._pieces_of(width, cols, has_fast_pieces(image_BCHW.dtype))
        maps = {0: _Map(image_BCHW)}
        for number in self.chains:
            maps[number] = self._whole(number, rows_of[number], pieces_of[number], maps)
            for it in [it for it in maps if it and self.last_use.get(it) == number]:
                del maps[it]
        return maps.popitem()[1].map_BCHW[:, :, rows.start - first : rows.stop - first]

    def _rows_of(self, height: int, first: int, stop: int) -> dict[int, tuple[int, int]]:
        """Of every layer the rows that these of the last one are made of."""
        found = {self.last: (first, stop)}
        for number in range(self.last, 0, -1):
            layer = self.layers[number]
            first, stop = layer.sees(*found[number])
            for it in layer.inputs:
                seen = max(first, 0), min(stop, height // self.layers[it].scale)
                found[it] = _union(found.get(it, seen), seen)
        return found

    def _pieces_of(self, width: int, cols: slice, cut: bool) -> dict[int, list[tuple[int, int]]]:
        """Of every whole map the columns that these of the last one are made of, in pixels of the image, in pieces."""
        found = {self.last: (cols.start, cols.stop)}
        pieces: dict[int, list[tuple[int, int]]] = {}
        for number, chain in reversed(self.chains.items()):
            pieces[number] = chain.pieces(*found[number], width) if cut else [found[number]]
            for piece in pieces[number]:
                made = chain.made(*piece, width)
                for it in chain.reads:
                    found[it] = _union(found.get(it, made), made)
        return pieces

    def _whole(self, number: int, rows: tuple[int, int], pieces: list[tuple[int, int]], maps: dict[int, _Map]) -> _Map:
        """Rows and columns of a map, these in pieces and in pixels of the image."""
        image_BCHW, layer, chain = maps[0].map_BCHW, self.layers[number], self.chains[number]
        full, left = image_BCHW.shape[2:], pieces[0][0]
        height, width = rows[1] - rows[0], (pieces[-1][1] - left) // layer.scale
        made_px = [chain.made(*piece, full[1]) for piece in pieces]
        given_to = [
            {it: maps[it].between(*(px // self.layers[it].scale for px in made)) for it in chain.reads}
            for made in made_px
        ]
        widest_px = max(stop - first for first, stop in made_px)
        bytes_a_px = max(self.layers[it].channels / self.layers[it].scale ** 2 for it in chain.layers) * layer.scale
        most = STRIP_BYTES // (bytes_a_px * widest_px * image_BCHW.itemsize)
        strips = max(1, min(math.ceil(height / max(LEAST_ROWS, min(MOST_ROWS, most))), height // LEAST_ROWS))
        if number in self.place_of:
            place, pixels = self.place_of[number], image_BCHW[0, 0].numel()
            whole_BCHW = self.kept.take(place, pixels, (layer.channels, height, width), image_BCHW)
        else:
            # What the caller is given does not come back.
            whole_BCHW = _channels_last(image_BCHW.new_empty(height * width * layer.channels), height, width)
        for strip in range(strips):
            above, below = height * strip // strips, height * (strip + 1) // strips
            for piece, made, given in zip(pieces, made_px, given_to, strict=True):
                made_BCHW = self._rows(number, rows[0] + above, rows[0] + below, full[0], given)
                first, stop = ((px - left) // layer.scale for px in piece)
                skip = (piece[0] - made[0]) // layer.scale
                whole_BCHW[:, :, above:below, first:stop] = made_BCHW[..., skip : skip + stop - first]
        return _Map(whole_BCHW, rows[0], left // layer.scale)

    def _rows(self, number: int, first: int, stop: int, height: int, maps: dict[int, _Map]) -> Tensor:
        """Rows of a map, made or taken from where they are. height: of the image."""
        if number in maps:
            return maps[number].map_BCHW[:, :, first - maps[number].row : stop - maps[number].row]
        layer = self.layers[number]
        above, below = layer.sees(first, stop)
        if layer.doubles:
            (source,) = layer.inputs
            above, below = max(above, 0), min(below, height // self.layers[source].scale)
            doubled_BCHW = layer.run(_dense(self._rows(source, above, below, height, maps)))
            return doubled_BCHW[:, :, first - 2 * above : stop - 2 * above]
        rows = (self._padded(it, above, below, layer.fill, height, maps) for it in layer.inputs)
        return layer.run(*(rows if layer.run is _largest_of_four else map(_dense, rows)))

    def _padded(self, number: int, first: int, stop: int, fill: float, height: int, maps: dict[int, _Map]) -> Tensor:
        """The same, with rows of fill beyond the edges."""
        above, below = max(-first, 0), max(stop - height // self.layers[number].scale, 0)
        rows_BCHW = self._rows(number, first + above, stop - below, height, maps)
        if not (above or below):
            return rows_BCHW
        batch, channels, inner, width = rows_BCHW.shape
        # torch's own padding would write all of it twice.
        padded_BCHW = rows_BCHW.new_empty(batch, above + inner + below, width, channels).permute(0, 3, 1, 2)
        padded_BCHW[:, :, :above] = fill
        padded_BCHW[:, :, above : above + inner] = rows_BCHW
        padded_BCHW[:, :, above + inner :] = fill
        return padded_BCHW


def _dense(rows_BCHW: Tensor) -> Tensor:
    """As convolutions want it: without gaps where columns are left out."""
    return rows_BCHW.contiguous(memory_format=torch.channels_last)


def _union(one: tuple[int, int], other: tuple[int, int]) -> tuple[int, int]:
    return min(one[0], other[0]), max(one[1], other[1])


class Kept:
    """Memory of maps, kept for those of the next image: a system takes as long to give it anew as a layer does.

    values: numbers that each place holds, for one pixel of the image. largest_px: of the largest image that is to come,
    if that is known: all memory is asked for as for that one, and of memory the system gives what is written to. So
    images may grow up to it, and nothing is new.
    """

    def __init__(self, values: Sequence[float], largest_px: int = 0) -> None:
        self._values, self._largest_px = values, largest_px
        self._places: dict[int, Tensor] = {}

    def take(self, place: int, pixels: int, shape_CHW: tuple[int, int, int], like: Tensor) -> Tensor:
        """A map of one image of so many pixels, channels last, of undefined numbers, in place of the last one there."""
        size = math.prod(shape_CHW)
        if place not in self._places or self._places[place].numel() < size:
            # What is too small goes first.
            self._places.pop(place, None)
            self._places[place] = like.new_empty(math.ceil(self._values[place] * max(pixels, self._largest_px)))
        return _channels_last(self._places[place][:size], *shape_CHW[1:])


def _channels_last(flat: Tensor, height: int, width: int) -> Tensor:
    return flat.view(1, height, width, -1).permute(0, 3, 1, 2)


def _layers(graph: torch.fx.GraphModule) -> list[_Layer] | None:
    """The layers of a graph in order, the image first; None if one is not known, or if maps do not fit each other."""
    layers: list[_Layer] = []
    number_of: dict[torch.fx.Node, int] = {}
    for node in graph.graph.nodes:
        if node.op == "output":
            return layers if number_of.get(node.args[0]) == len(layers) - 1 else None
        inputs = tuple(number_of[it] for it in node.all_input_nodes)
        module = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, nn.Identity):
            number_of[node] = inputs[0]
            continue
        given = [layers[it] for it in inputs]
        if len({it.scale for it in given}) > 1 or bool(given) != bool(layers):
            return None
        kind = node.target if module is None else type(module)
        if not given:
            # The image, which nothing makes.
            layer: _Layer | None = _Layer(_concatenated, (), 0, 1)
        else:
            layer = KINDS[kind](node if module is None else module, inputs, given) if kind in KINDS else None
        if layer is None:
            return None
        number_of[node] = len(layers)
        layers.append(layer)
    return None


def _convolution(module: Any, inputs: tuple[int, ...], given: list[_Layer]) -> _Layer | None:
    conv: Any = copy.copy(module.conv if isinstance(module, Fused) else module)
    sizes = (conv.kernel_size, conv.stride, conv.dilation, conv.padding)
    if not pads_with_zeros(conv) or any(rows != cols for rows, cols in sizes):
        return None
    (rows, cols), reach = conv.padding, conv.dilation[0] * (conv.kernel_size[0] - 1)
    if 2 * rows != reach:
        return None
    conv.padding = (0, cols)
    run = Fused(conv, module.activation, module.numbers) if isinstance(module, Fused) else conv
    down = conv.stride[0]
    return _Layer(run, inputs, conv.out_channels, given[0].scale * down, down=down, above=rows, below=reach - rows)


def _pool(module: Any, inputs: tuple[int, ...], given: list[_Layer]) -> _Layer | None:
    kernel, stride, padding = (_pair(it) for it in (module.kernel_size, module.stride, module.padding))
    # Halves of even sides: 2 of 2, or, of maxima, 3 of 2 with one beyond the edge.
    known = [((2, 2), (2, 2), (0, 0))] + [((3, 3), (2, 2), (1, 1))] * isinstance(module, nn.MaxPool2d)
    if (kernel, stride, padding) not in known or module.ceil_mode or getattr(module, "dilation", 1) != 1:
        return None
    pool, rows = copy.copy(module), padding[0]
    pool.padding = (0, padding[1])
    run = _largest_of_four if isinstance(module, nn.MaxPool2d) and kernel == (2, 2) else pool
    below = kernel[0] - 1 - rows
    return _Layer(run, inputs, given[0].channels, 2 * given[0].scale, down=2, above=rows, below=below, fill=-math.inf)


def _largest_of_four(x_BCHW: Tensor) -> Tensor:
    """The maxima of squares of 2 x 2, without noting where they were, which torch's own does: in half the time."""
    rows_BCHW = torch.maximum(x_BCHW[:, :, ::2], x_BCHW[:, :, 1::2])
    return torch.maximum(rows_BCHW[..., ::2], rows_BCHW[..., 1::2])


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _transposed(module: Any, inputs: tuple[int, ...], given: list[_Layer]) -> _Layer:
    layer: Any = module.layer if isinstance(module, FusedParts) else module
    above, below = REACHES[type(layer)]
    return _Layer(module, inputs, layer.out_channels, given[0].scale // 2, True, above=above, below=below)


def _doubling(module: Any, inputs: tuple[int, ...], given: list[_Layer]) -> _Layer:
    return _Layer(module, inputs, given[0].channels, given[0].scale // 2, True, above=1, below=1)


def _relu(module: Any, inputs: tuple[int, ...], given: list[_Layer]) -> _Layer:
    # Not in place: rows may be of a map that others read.
    return _Layer(nnf.relu, inputs, given[0].channels, given[0].scale)


def _batchnorm(module: Any, inputs: tuple[int, ...], given: list[_Layer]) -> _Layer:
    return _Layer(module, inputs, given[0].channels, given[0].scale)


def _concatenation(node: Any, inputs: tuple[int, ...], given: list[_Layer]) -> _Layer | None:
    tensors, *dimension = node.args
    if dimension != [1] or node.kwargs or not isinstance(tensors, list | tuple) or len(tensors) != len(inputs):
        return None
    return _Layer(_concatenated, inputs, sum(it.channels for it in given), given[0].scale)


def _sum(node: Any, inputs: tuple[int, ...], given: list[_Layer]) -> _Layer | None:
    return _Layer(torch.add, inputs, given[0].channels, given[0].scale) if len(inputs) == 2 else None


def _concatenated(*rows_BCHW: Tensor) -> Tensor:
    return torch.cat(rows_BCHW, 1)


REACHES: dict[type[nn.Module], tuple[int, int]] = {Transposed2: (0, 0), Transposed3: (0, 1), Transposed4: (1, 1)}
"""Rows above and below one that a row's pair is made of."""
KINDS: dict[Any, Callable[[Any, tuple[int, ...], list[_Layer]], _Layer | None]] = {
    Fused: _convolution,
    FusedParts: _transposed,
    nn.Conv2d: _convolution,
    nn.MaxPool2d: _pool,
    nn.AvgPool2d: _pool,
    Transposed2: _transposed,
    Transposed3: _transposed,
    Transposed4: _transposed,
    Bilinear: _doubling,
    nn.ReLU: _relu,
    nnf.relu: _relu,
    nn.BatchNorm2d: _batchnorm,
    torch.cat: _concatenation,
    operator.add: _sum,
}
"""By the type of a module, or the function: what makes a layer of it (or of the node that calls it)."""
