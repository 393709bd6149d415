"""A network on a device: uint8 pixels in, uint8 probabilities out, by a recipe.

Axes: B batch, C band, K class, H row, W column.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .weights import Bundle

Precision = Literal["float32", "bfloat16"]

FULL_U8 = 250
"""The stored value of probability 1."""
INVALID_U8 = 255
LEAST_STRIDES = 16
"""Smallest side of what the network is given, in strides: smaller windows are padded with fill.

On a map less than 16 columns wide oneDNN's convolutions add up in another order than on wider ones (tried on AVX512,
float32, 1 and 2 threads), so the last bit of a pixel would depend on the size of its window.
"""


def resolve_device() -> torch.device:
    """The GPU that this process sees first, else the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def device_recipe(device: torch.device) -> dict[str, str]:
    """What numbers depend on besides precision and threads: the kind of device, and the version of torch."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        kind = f"cuda sm_{major}{minor}"
    else:
        extra = "+amx" if torch.cpu._is_amx_tile_supported() else "+bf16" if _has_avx512_bf16() else ""
        kind = f"cpu {torch.backends.cpu.get_cpu_capability()}{extra}"
    return {"device": kind, "torch": torch.__version__}


def fast_bfloat16(device: torch.device) -> bool:
    """True where a device multiplies in bfloat16: compute capability 8 and later; AMX or AVX512-BF16."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return bool(torch.cpu._is_amx_tile_supported()) or _has_avx512_bf16()


def _has_avx512_bf16() -> bool:
    return bool(torch.cpu._is_avx512_bf16_supported())


class Predictor:
    """Holds a bundle's network on a device, in one precision, with a number of threads on a CPU."""

    def __init__(self, bundle: Bundle, device: torch.device, precision: Precision, threads: int) -> None:
        torch.set_num_threads(threads)
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_tf32 = False
        self.card = bundle.card
        self.device = device
        self.dtype = torch.float32 if precision == "float32" else torch.bfloat16
        self.network = bundle.network.eval().to(device, self.dtype)
        for parameter in self.network.parameters():
            if parameter.ndim == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)

    def predict(self, image_CHW: NDArray[np.uint8], valid_HW: NDArray[np.bool_]) -> NDArray[np.uint8]:
        """Probabilities of one window, prob_HW: 0 to 250 for 0 to 1, 255 where the pixel is invalid."""
        height, width = valid_HW.shape
        with torch.inference_mode():
            image_BCHW = self.normalise(image_CHW, valid_HW)
            least = LEAST_STRIDES * self.card.stride
            margin = (0, max(0, least - width), 0, max(0, least - height))
            if any(margin):
                image_BCHW = torch.nn.functional.pad(image_BCHW, margin, value=self.card.fill)
                image_BCHW = image_BCHW.contiguous(memory_format=torch.channels_last)
            logits_BKHW = self.network(image_BCHW)[..., :height, :width]
            prob_HW = torch.sigmoid(logits_BKHW[0, 0].float())
            stored_HW: NDArray[np.uint8] = torch.round(prob_HW * FULL_U8).to(torch.uint8).cpu().numpy()
        return np.where(valid_HW, stored_HW, np.uint8(INVALID_U8))

    def normalise(self, image_CHW: NDArray[np.uint8], valid_HW: NDArray[np.bool_]) -> Tensor:
        """What the network sees, image_BCHW: (x * scale - mean) / std in float32, the card's fill where invalid."""
        card = self.card
        image_BCHW = torch.from_numpy(np.ascontiguousarray(image_CHW)).to(self.device)[None].float()
        mean_C11 = torch.tensor(card.mean, device=self.device)[:, None, None]
        std_C11 = torch.tensor(card.std, device=self.device)[:, None, None]
        image_BCHW = (image_BCHW * card.scale - mean_C11) / std_C11
        invalid_HW = torch.from_numpy(~valid_HW).to(self.device)
        image_BCHW = image_BCHW.masked_fill(invalid_HW, card.fill)
        return image_BCHW.to(self.dtype).contiguous(memory_format=torch.channels_last)
