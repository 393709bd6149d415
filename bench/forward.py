"""What the network alone costs: a worker's passes against bare ones, compiled ones, OpenVINO and the matrix product.

    python bench/forward.py --network unet11 --network unet-mobilenetv2 --side 1024 --rounds 5

All take turns in one process, on the same window, in one precision, with the same threads and the allocator as it is
set in workers, so their ratios hold even where the speeds do not. `predict` is what a worker does with a window: pixels
normalised, the network, probabilities quantised. `bare` is the network as it is in a bundle, on a tensor in memory;
`ready` the same as `predict` runs it: BatchNorm and ReLU in the convolutions, nothing concatenated, the finest maps in
strips. All in one thread: in two, each with its own pool, OpenMP would no longer wait for short layers but sleep.
OpenVINO is measured where it is installed, with the precision that it says it has used. FLOP are those of convolutions.
Prints Markdown: medians.
"""

from __future__ import annotations

import copy
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import click
import numpy as np
import torch
from city import as_worker
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from segpipe.models.fold import fold_batchnorm
from segpipe.models.networks import Network, build_network
from segpipe.models.predictor import Precision, Predictor, fast_bfloat16, input_side, resolve_device
from segpipe.models.weights import Bundle, probed_card

PRODUCT = {"cpu": 2048, "cuda": 8192}
"""Side of the matrices that are multiplied: on a GPU a product of small ones is over before all of it is at work."""
KINDS = ("predict", "bare", "ready", "compiled", "OpenVINO")

Pass = Callable[[], Any]


def flop_per_px(network: Network) -> float:
    """Floating point operations a pixel, two for each multiplication and addition."""
    side = input_side(network, network.stride, 256)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        network(torch.zeros(1, 3, side, side))
    return counter.get_total_flops() / side**2


def placed(network: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A network on a device, channels last."""
    network = network.to(device, dtype)
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack this form


def compiled(network: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A network in eval mode, its BatchNorm folded in place, compiled with its weights frozen."""
    fold_batchnorm(network)
    return torch.compile(placed(network, device, dtype), dynamic=False, options={"freezing": True})


def waited(run: Callable[[Tensor], Tensor], image_BCHW: Tensor) -> Pass:
    """A pass that is over when it returns."""

    def once() -> None:
        with torch.inference_mode():
            run(image_BCHW)
            if image_BCHW.is_cuda:
                torch.cuda.synchronize()

    return once


def passes(network: Network, name: str, side: int, precision: Precision) -> tuple[dict[str, Pass], str]:
    """What is timed, by its name in KINDS; and the precision of OpenVINO, empty where that is not timed."""
    device, dtype = resolve_device(), torch.float32 if precision == "float32" else torch.bfloat16
    card = probed_card(copy.deepcopy(network), name, {}, resolution_m=0.3, resolution_range_m=(0.15, 0.6))
    predictor = Predictor(Bundle(copy.deepcopy(network), card), device, precision, torch.get_num_threads())
    image_CHW = np.random.default_rng(0).integers(0, 256, (3, side, side), np.uint8)
    valid_HW = np.ones((side, side), np.bool_)
    image_BCHW = predictor.normalise(image_CHW, valid_HW)
    own = (copy.deepcopy(network).eval() for _ in range(3))
    found: dict[str, Pass] = {
        "predict": lambda: predictor.predict(image_CHW, valid_HW),
        "bare": waited(placed(next(own), device, dtype), image_BCHW),
        "ready": waited(predictor.forward, image_BCHW),
        "compiled": waited(compiled(next(own), device, dtype), image_BCHW),
    }
    if device.type != "cpu" or (by_openvino := openvino_pass(next(own), image_BCHW, precision)) is None:
        return found, ""
    return found | {"OpenVINO": by_openvino[0]}, by_openvino[1]


def openvino_pass(network: nn.Module, image_BCHW: Tensor, precision: Precision) -> tuple[Pass, str] | None:
    """The network in OpenVINO, and the precision that it uses; None where that is not installed."""
    try:
        import openvino
    except ImportError:
        return None
    image_BCHW = image_BCHW.float().contiguous()
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        model = openvino.convert_model(network, example_input=image_BCHW, input=[list(image_BCHW.shape)])
    hints = {
        "INFERENCE_PRECISION_HINT": "f32" if precision == "float32" else "bf16",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    loaded = openvino.Core().compile_model(model, "CPU", hints)
    request, pixels = loaded.create_infer_request(), image_BCHW.numpy()
    # Where a processor has no bfloat16 it takes float32, whatever was asked for.
    used = loaded.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    return lambda: request.infer([pixels], share_inputs=True), used


def product_pass(precision: Precision) -> Pass:
    """A product of two square matrices on the device."""
    dtype = torch.float32 if precision == "float32" else torch.bfloat16
    device = resolve_device()
    side = PRODUCT[device.type]
    one, other = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))

    def once() -> None:
        torch.mm(one, other)
        if one.is_cuda:
            torch.cuda.synchronize()

    return once


def seconds_of(what: dict[str, Pass], rounds: int) -> dict[str, list[float]]:
    """Seconds of each, turn about. What is timed follows one of its own kind, as windows follow each other in a run."""
    for once in what.values():
        once()
    found: dict[str, list[float]] = {name: [] for name in what}
    for _ in range(rounds):
        for name, once in what.items():
            once()
            start = time.perf_counter()
            once()
            found[name].append(time.perf_counter() - start)
    return found


def row_of(name: str, side: int, precision: Precision, rounds: int) -> str:
    """A row of the table."""
    torch.manual_seed(0)
    network = build_network(name).eval()
    flop = flop_per_px(network)
    what, of_openvino = passes(network, name, side, precision)
    seconds = seconds_of(what | {"product": product_pass(precision)}, rounds)
    mpx = side**2 / 1e6
    speeds = {kind: mpx / statistics.median(seconds[kind]) for kind in KINDS if kind in seconds}
    product = 2 * PRODUCT[resolve_device().type] ** 3 / statistics.median(seconds["product"]) / 1e12

    def against(other: str) -> str:
        if other not in seconds:
            return "–"
        pairs = zip(seconds[other], seconds["predict"], strict=True)
        return f"{statistics.median(theirs / ours for theirs, ours in pairs):.2f}"

    cells = [f"`{name}`", str(side), precision, f"{flop / 1e3:.0f}"]
    cells += [f"{speeds[kind]:.3f}" if kind in speeds else "–" for kind in KINDS]
    cells[-1] += f" ({of_openvino})" if of_openvino else ""
    cells += [f"{product:.2f}", *(against(kind) for kind in KINDS[1:])]
    cells.append(f"{speeds['predict'] * flop / 1e6 / product:.2f}")
    return f"| {' | '.join(cells)} |"


@click.command()
@click.option("--network", "networks", multiple=True, default=("unet11", "unet-mobilenetv2"), show_default=True)
@click.option("--side", "sides", multiple=True, type=int, default=(1024, 2048), show_default=True)
@click.option("--precision", type=click.Choice(["bfloat16", "float32"]), help="Else what a worker chooses here.")
@click.option("--rounds", default=5, show_default=True)
def main(networks: tuple[str, ...], sides: tuple[int, ...], precision: Precision | None, rounds: int) -> None:
    as_worker()
    for name in networks:
        network = build_network(name)
        for side in sides:
            if (taken := input_side(network, network.stride, side)) != side:
                message = f"{side}: of such a window predict makes one of {taken} px for {name}; expected that"
                raise click.BadParameter(message, param_hint="--side")
    precision = precision or ("bfloat16" if fast_bfloat16(resolve_device()) else "float32")
    columns = ["network", "window, px", "precision", "kFLOP a px", *(f"{kind}, Mpx/s" for kind in KINDS)]
    columns += ["matrix product, TFLOP/s", *(f"predict / {kind}" for kind in KINDS[1:]), "predict / matrix product"]
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for name in networks:
        for side in sides:
            print(row_of(name, side, precision, rounds), flush=True)


if __name__ == "__main__":
    main()
