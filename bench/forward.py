"""What the network alone costs: a worker's passes against bare ones, compiled ones, OpenVINO and the matrix product.

    python bench/forward.py --network unet11 --network unet-mobilenetv2 --side 1024 --rounds 5

All take turns in one process, on the same window, in one precision, with the same threads and the allocator as it is
set in workers, so their ratios hold even where the speeds do not. `predict` is what a worker does with a window: pixels
normalised, the network, probabilities quantised. `bare` is the network as it is in a bundle, on a tensor in memory;
`ready` the same as `predict` runs it: BatchNorm and ReLU in the convolutions, nothing concatenated, the finest maps in
strips. All in one thread: in two, each with its own pool, OpenMP would no longer wait for short layers but sleep.
OpenVINO is measured where it is installed. FLOP are those of convolutions. Prints Markdown: medians.
"""

from __future__ import annotations

import copy
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from segpipe.models.fold import fold_batchnorm
from segpipe.models.networks import Network, build_network
from segpipe.models.predictor import Precision, Predictor, fast_bfloat16, resolve_device
from segpipe.models.weights import Bundle, probed_card
from segpipe.pipeline.allocator import WORKER_ENVIRONMENT

PRODUCT = 2048
"""Side of the matrices that are multiplied."""
KINDS = ("predict", "bare", "ready", "compiled", "OpenVINO")

Pass = Callable[[], Any]


def flop_per_px(network: nn.Module) -> float:
    """Floating point operations a pixel, two for each multiplication and addition."""
    image_BCHW = torch.zeros(1, 3, 256, 256)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        network(image_BCHW)
    return counter.get_total_flops() / 256**2


def passes(network: Network, name: str, side: int, precision: Precision) -> dict[str, Pass]:
    """What is timed, by its name in KINDS."""
    device, dtype = resolve_device(), torch.float32 if precision == "float32" else torch.bfloat16
    card = probed_card(copy.deepcopy(network), name, {}, resolution_m=0.3, resolution_range_m=(0.15, 0.6))
    predictor = Predictor(Bundle(copy.deepcopy(network), card), device, precision, torch.get_num_threads())
    image_CHW = np.random.default_rng(0).integers(0, 256, (3, side, side), np.uint8)
    valid_HW = np.ones((side, side), np.bool_)
    image_BCHW = predictor.normalise(image_CHW, valid_HW)

    def ready(folded: bool) -> nn.Module:
        own = copy.deepcopy(network).eval()
        if folded:
            fold_batchnorm(own)
        own = own.to(device, dtype)
        return own.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack this form

    def waited(run: Callable[[Tensor], Tensor]) -> Pass:
        def once() -> None:
            with torch.inference_mode():
                run(image_BCHW)
                if device.type == "cuda":
                    torch.cuda.synchronize()

        return once

    found: dict[str, Pass] = {
        "predict": lambda: predictor.predict(image_CHW, valid_HW),
        "bare": waited(ready(folded=False)),
        "ready": waited(predictor.forward),
        "compiled": waited(torch.compile(ready(folded=True), dynamic=False, options={"freezing": True})),
    }
    if device.type == "cpu" and (by_openvino := openvino_pass(ready(folded=False).float(), image_BCHW, precision)):
        found["OpenVINO"] = by_openvino
    return found


def openvino_pass(network: nn.Module, image_BCHW: Tensor, precision: Precision) -> Pass | None:
    """The network in OpenVINO, None where that is not installed."""
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
    compiled = openvino.Core().compile_model(model, "CPU", hints)
    request, pixels = compiled.create_infer_request(), image_BCHW.numpy()
    return lambda: request.infer([pixels], share_inputs=True)


def product_pass(precision: Precision) -> Pass:
    """A product of two square matrices on the device."""
    dtype = torch.float32 if precision == "float32" else torch.bfloat16
    one, other = (torch.randn(PRODUCT, PRODUCT, device=resolve_device(), dtype=dtype) for _ in range(2))

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
    seconds = seconds_of(passes(network, name, side, precision) | {"product": product_pass(precision)}, rounds)
    mpx = side**2 / 1e6
    speeds = {kind: mpx / statistics.median(seconds[kind]) for kind in KINDS if kind in seconds}
    product = 2 * PRODUCT**3 / statistics.median(seconds["product"]) / 1e12

    def against(other: str) -> str:
        if other not in seconds:
            return "–"
        pairs = zip(seconds[other], seconds["predict"], strict=True)
        return f"{statistics.median(theirs / ours for theirs, ours in pairs):.2f}"

    cells = [f"`{name}`", str(side), precision, f"{flop / 1e3:.0f}"]
    cells += [f"{speeds[kind]:.3f}" if kind in speeds else "–" for kind in KINDS]
    cells += [f"{product:.2f}", *(against(kind) for kind in KINDS[1:])]
    cells.append(f"{speeds['predict'] * flop / 1e6 / product:.2f}")
    return f"| {' | '.join(cells)} |"


@click.command()
@click.option("--network", "networks", multiple=True, default=("unet11", "unet-mobilenetv2"), show_default=True)
@click.option("--side", "sides", multiple=True, type=int, default=(1024, 2048), show_default=True)
@click.option("--precision", type=click.Choice(["bfloat16", "float32"]), help="Else what a worker chooses here.")
@click.option("--rounds", default=5, show_default=True)
def main(networks: tuple[str, ...], sides: tuple[int, ...], precision: Precision | None, rounds: int) -> None:
    if WORKER_ENVIRONMENT.items() - os.environ.items():
        # The allocator reads its settings when a process starts: this one is to have those of the workers.
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | WORKER_ENVIRONMENT)
    precision = precision or ("bfloat16" if fast_bfloat16(resolve_device()) else "float32")
    columns = ["network", "window, px", "precision", "kFLOP a px", *(f"{kind}, Mpx/s" for kind in KINDS)]
    columns += ["matrix product, TFLOP/s", *(f"predict / {kind}" for kind in KINDS[1:]), "predict / matrix product"]
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for name in networks:
        for side in sides:
            print(row_of(name, side, precision, rounds), flush=True)


if __name__ == "__main__":
    main()
