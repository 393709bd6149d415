"""The loss of training. Axes: B batch, K classes, H rows, W columns."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

EPSILON = 1e-15


def bce_jaccard(logits_BKHW: Tensor, target_BKHW: Tensor, valid_BHW: Tensor) -> Tensor:
    """H - log J of TernausNet (Iglovikov and Shvets 2018, equation 4), over valid pixels only.

    H is the mean binary cross entropy. J is the soft Jaccard index of the whole batch, (I + e) / (U - I + e), where I
    is the sum of target * probability, U the sum of both, and e = 1e-15 (below float32's resolution next to any real
    sum: it only decides that a batch without buildings and without predictions has J = 1).
    target is 0 or 1; valid is 0 or 1 (or bool), shape BHW or B1HW. What lies under invalid pixels has no effect, not
    even if it is not finite. Computed in float32 whatever the precision of the logits. A batch without any valid
    pixel has loss 0 and gradient 0.
    """
    valid_B1HW = valid_BHW.unsqueeze(1) if valid_BHW.dim() == 3 else valid_BHW
    keep_BKHW = valid_B1HW.bool().expand_as(logits_BKHW)
    logits = logits_BKHW.float().masked_fill(~keep_BKHW, 0.0)
    target = target_BKHW.float().masked_fill(~keep_BKHW, 0.0)
    count = keep_BKHW.sum()
    cross_entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    entropy = (cross_entropy * keep_BKHW).sum() / count.clamp(min=1)
    probability = torch.sigmoid(logits) * keep_BKHW
    intersection = (target * probability).sum()
    total = target.sum() + probability.sum()
    jaccard = (intersection + EPSILON) / (total - intersection + EPSILON)
    return entropy - torch.log(jaccard)
