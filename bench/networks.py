"""Every network once: parameters, stride, exact halo, one training step and one prediction, on the CPU.

    python bench/networks.py

A training step is forward, H - log J, backward and Adam on two random crops of 128 px (the next larger ones that the
network takes); a prediction is one window of 512 px with its least surroundings, in float32. Prints Markdown.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from segpipe.models.field import peak_bytes_per_px
from segpipe.models.losses import bce_jaccard
from segpipe.models.networks import NETWORKS, Network, build_network
from segpipe.models.predictor import FULL_U8, INVALID_U8, Predictor
from segpipe.models.weights import Bundle, probed_card

VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in NETWORKS),
    ("unet16", {"upsampling": "transposed"}),
    ("unet-mobilenetv2", {"decoder": "plain", "top": True}),
]
CROP_PX, WINDOW_PX = 128, 512


def training_step(network: Network) -> tuple[float, float]:
    """Loss before and after one step, on the same crops."""
    generator = torch.Generator().manual_seed(0)
    whole = -(-(CROP_PX + 2 * network.border_px) // network.stride) * network.stride + network.remainder_px
    image_BCHW = torch.randn(2, 3, whole, whole, generator=generator).contiguous(memory_format=torch.channels_last)
    side = whole - 2 * network.border_px
    target_BKHW = (torch.rand(2, 1, side, side, generator=generator) < 0.2).float()
    valid_BHW = torch.ones(2, side, side, dtype=torch.bool)
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-4)
    network.train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack this form
    before = bce_jaccard(network(image_BCHW), target_BKHW, valid_BHW)
    before.backward()
    optimiser.step()
    with torch.no_grad():
        after = bce_jaccard(network(image_BCHW), target_BKHW, valid_BHW)
    return float(before.detach()), float(after)


def main() -> None:
    """Print the table."""
    columns = ("network", "arguments", "parameters", "stride", "exact halo", "KiB a pixel", "loss, after a step")
    columns += ("probabilities of a window",)
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for name, arguments in VARIANTS:
        torch.manual_seed(0)
        network = build_network(name, **arguments)
        card = probed_card(network, name, arguments, resolution_m=0.3, resolution_range_m=(0.15, 0.6))
        before, after = training_step(network)
        # Before the network is made ready to predict, which folds its BatchNorm away.
        parameters = sum(parameter.numel() for parameter in network.parameters())
        memory = peak_bytes_per_px(network, torch.float32) / 1024
        predictor = Predictor(Bundle(network, card), torch.device("cpu"), "float32", torch.get_num_threads())
        image_CHW = np.random.default_rng(0).integers(0, 256, (3, WINDOW_PX, WINDOW_PX), np.uint8)
        prob_HW = predictor.predict(image_CHW, np.ones((WINDOW_PX, WINDOW_PX), np.bool_))
        found = prob_HW[prob_HW != INVALID_U8] / FULL_U8
        said = ", ".join(f"{key}: {str(value).lower()}" for key, value in arguments.items())
        print(
            f"| `{name}` | {said} | {parameters:,} | {network.stride} | {card.halo_px} | {memory:.2f} |"
            f" {before:.3f}, {after:.3f} | {found.min():.2f} to {found.max():.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
