"""Networks of a user's own, as `package.module:name` finds them."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Blur(nn.Module):
    """Sees `radius` px to every side."""

    stride = 1
    encoder_prefix = "body."

    def __init__(self, bands: int, radius: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(bands, 1, 2 * radius + 1, padding=radius), nn.BatchNorm2d(1), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        """Same H and W."""
        y: Tensor = self.body(x)
        return y


class Steps(nn.Module):
    """Pools by 8 and comes back: what it sees repeats itself every 8 px, whatever it says its stride is."""

    def __init__(self, stride: int = 8) -> None:
        super().__init__()
        self.stride = stride
        self.down = nn.Conv2d(3, 4, 8, stride=8)
        self.up = nn.ConvTranspose2d(4, 1, 8, stride=8)

    def forward(self, x: Tensor) -> Tensor:
        """Same H and W."""
        y: Tensor = self.up(torch.relu(self.down(x)))
        return y


class Gated(nn.Module):
    """Each pixel is weighed by what the whole image looks like: its field has no bound."""

    stride = 8

    def __init__(self, bands: int = 3, classes: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(bands, 4, 3, padding=1)
        self.gate = nn.Linear(4, 4)
        self.head = nn.Conv2d(4, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Same H and W."""
        y = torch.relu(self.conv(x))
        gate = torch.sigmoid(self.gate(y.mean(dim=(2, 3))))
        z: Tensor = self.head(y * gate[:, :, None, None])
        return z


def everywhere() -> nn.Module:
    """A function may be named too; this module says nothing of itself."""
    return nn.Conv2d(3, 1, 1)
