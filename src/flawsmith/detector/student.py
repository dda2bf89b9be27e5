"""The student, a bottleneck and decoder on the frozen teacher's features, and the head that reads where it fails.

In training the teacher sees the normal image and the student the defect image. The student must answer the normal
features through a bottleneck at half the coarsest resolution, with no skip path around it, so that the defect cannot
pass. It shares the frozen teacher's features (Deng & Li, CVPR 2022), so that inference runs the encoder once.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flawsmith.detector.teacher import Features

RARE = -3.0  # a bias for a probability of 5 %: defects are rare


def conv_block(inputs: int, outputs: int, stride: int = 1, kernel: int = 3) -> nn.Sequential:
    """Convolution, batch norm, ReLU: what runtimes fuse into one operation."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


def halved(inputs: int, outputs: int, factor: int) -> nn.Sequential:
    """Blocks that make a level coarser by a `factor` of 1, 2, 4, ..."""
    if factor <= 2:
        return conv_block(inputs, outputs, factor, kernel=2 * factor - 1)
    return nn.Sequential(conv_block(inputs, outputs, 2), halved(outputs, outputs, factor // 2))


def enlarge(maps: Tensor, size: torch.Size | tuple[int, ...]) -> Tensor:
    """(B, C, h, w) → (B, C, *size), bilinear; left alone if it has that size."""
    if maps.shape[-2:] == torch.Size(size):
        return maps
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


class Student(nn.Module):
    """Teacher features of an image → an estimate of the teacher features of that image without its defect.

    It reads all levels of the teacher and answers the coarsest `len(decoder_channels)` of them, finest first. Without
    any it holds and answers nothing.
    """

    def __init__(
        self, channels: Sequence[int], strides: Sequence[int], bottleneck: int, decoder_channels: Sequence[int]
    ) -> None:
        super().__init__()
        self.decode, self.answer = nn.ModuleList(), nn.ModuleList()
        if not decoder_channels:
            return
        width = bottleneck // 2
        self.reduce = nn.ModuleList(
            [halved(inputs, width, strides[-1] // stride) for inputs, stride in zip(channels, strides, strict=True)]
        )
        self.bottleneck = nn.Sequential(
            conv_block(3 * width, bottleneck, 2), conv_block(bottleneck, bottleneck), conv_block(bottleneck, bottleneck)
        )
        inputs = bottleneck
        for outputs, target in zip(reversed(decoder_channels), reversed(channels), strict=False):
            self.decode.append(nn.Sequential(conv_block(inputs, outputs), conv_block(outputs, outputs)))
            self.answer.append(nn.Conv2d(outputs, target, 1))
            inputs = outputs

    def forward(self, features: Features) -> Features:  # finest answered level first
        if not self.answer:
            return ()
        code = torch.cat([reduce(level) for reduce, level in zip(self.reduce, features, strict=True)], dim=1)
        hidden = self.bottleneck(code)
        answers: list[Tensor] = []
        for decode, answer, level in zip(self.decode, self.answer, reversed(features), strict=False):
            hidden = decode(F.interpolate(hidden, size=level.shape[-2:], mode="nearest"))
            answers.append(answer(hidden))
        return tuple(reversed(answers))


class SegmentationHead(nn.Module):
    """Reads how far each cell is from normal, and not in which direction: standardised maps → one logit a cell.

    Bare distances hold no texture, so the head cannot learn the texture of synthetic defects by heart. It reads signed
    logarithms, so that a strong defect does not drown a faint one, and little context, since the outlines of synthetic
    defects are no law either. A head of width 0 holds nothing and answers 0.
    """

    def __init__(self, maps: int, width: int) -> None:
        super().__init__()
        self.width = width
        if not width:
            return
        self.read = nn.Conv2d(maps, width, 3, padding=1, padding_mode="replicate")
        self.context = nn.Conv2d(width, width, 3, padding=1, padding_mode="replicate")
        self.answer = nn.Conv2d(width, 1, 1)
        nn.init.constant_(self.answer.bias, RARE)  # type: ignore[arg-type]

    def forward(self, maps: Tensor) -> Tensor:
        """Standardised maps (B, K, h, w) → logits (B, 1, h, w)."""
        if not self.width:
            return torch.zeros_like(maps[:, :1])
        hidden = F.relu(self.read(maps.sign() * maps.abs().log1p()))
        return self.answer(F.relu(self.context(hidden)))
