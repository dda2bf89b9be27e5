"""The losses of the student and of the segmentation head."""

import torch.nn.functional as F
from torch import Tensor

from flawsmith.detector.teacher import Features


def cosine_loss(teacher: Features, student: Features, weights: tuple[float, ...]) -> Tensor:
    """Weighted mean over scales of 1 - cosine similarity, averaged over positions (arXiv 2604.19240; DeSTSeg eq. 1).

    Over those scales that the student answers, the coarsest ones of the teacher's.
    """
    losses = [
        weight * (1 - F.cosine_similarity(t, s, dim=1)).mean()
        for weight, t, s in zip(weights, teacher[-len(student) :], student, strict=True)
    ]
    return sum(losses[1:], losses[0]) / sum(weights)


def segmentation_loss(logits: Tensor, mask: Tensor, gamma: float, l1_weight: float) -> Tensor:
    """Focal loss (Lin et al. 2017, eq. 4, no alpha) plus weighted L1 of (B, 1, h, w) logits against a soft mask."""
    entropy = F.binary_cross_entropy_with_logits(logits, mask, reduction="none")
    probability = logits.sigmoid()
    wrongness = (probability - mask).abs()
    return (wrongness.pow(gamma) * entropy).mean() + l1_weight * wrongness.mean()
