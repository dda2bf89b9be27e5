"""The student: a bottleneck and decoder on the frozen teacher's own features, as in reverse distillation.

The asymmetry is in what the two see and how they are built: in training the teacher gives the features of the clean
image, the student must answer them from the defect image, through a bottleneck at half the coarsest resolution with no
skip path around it, so that the defect cannot leak through. Sharing the frozen encoder (Deng & Li, CVPR 2022) learns
several times faster than a separate one, and inference runs the encoder once.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flawsmith.detector.teacher import Features


def conv_block(inputs: int, outputs: int, stride: int = 1, kernel: int = 3) -> nn.Sequential:
    """Convolution, batch norm, ReLU: what runtimes fuse into one operation."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


class Student(nn.Module):
    """Teacher features of any image → estimate of the teacher features of that image without its defect."""

    def __init__(self, channels: tuple[int, ...], bottleneck: int, decoder_channels: tuple[int, ...]) -> None:
        super().__init__()
        fine, middle, coarse = channels
        width = bottleneck // 2
        self.reduce = nn.ModuleList(
            [
                nn.Sequential(conv_block(fine, width, 2), conv_block(width, width, 2)),
                conv_block(middle, width, 2),
                conv_block(coarse, width, 1, kernel=1),
            ]
        )
        self.bottleneck = nn.Sequential(
            conv_block(3 * width, bottleneck, 2), conv_block(bottleneck, bottleneck), conv_block(bottleneck, bottleneck)
        )
        self.decode = nn.ModuleList()
        self.answer = nn.ModuleList()
        inputs = bottleneck
        for outputs, target in zip(reversed(decoder_channels), reversed(channels), strict=True):
            self.decode.append(nn.Sequential(conv_block(inputs, outputs), conv_block(outputs, outputs)))
            self.answer.append(nn.Conv2d(outputs, target, 1))
            inputs = outputs

    def forward(self, features: Features) -> Features:  # finest first, as the teacher's
        code = torch.cat([reduce(level) for reduce, level in zip(self.reduce, features, strict=True)], dim=1)
        hidden = self.bottleneck(code)
        answers: list[Tensor] = []
        for decode, answer in zip(self.decode, self.answer, strict=True):
            hidden = decode(F.interpolate(hidden, scale_factor=2.0, mode="nearest"))
            answers.append(answer(hidden))
        return tuple(reversed(answers))


class SegmentationHead(nn.Module):
    """Reads where teacher and student disagree: normalised products of their features → one logit a pixel.

    The input is DeSTSeg's (Zhang et al., CVPR 2023, sec. 3.3): channel by channel products of L2-normalised features,
    whose sum over channels is the cosine similarity. Works at the finest level's resolution.
    """

    def __init__(self, channels: tuple[int, ...], width: int) -> None:
        super().__init__()
        self.reduce = nn.ModuleList([nn.Conv2d(level, width, 1) for level in channels])
        self.context = nn.ModuleList(
            [
                nn.Sequential(
                    nn.Conv2d(width, width, 3, padding=dilation, dilation=dilation, bias=False),
                    nn.BatchNorm2d(width),
                    nn.ReLU(inplace=True),
                )
                for dilation in (1, 3, 6)
            ]
        )
        self.answer = nn.Conv2d(width, 1, 1)
        if self.answer.bias is not None:
            nn.init.constant_(self.answer.bias, -3.0)  # defects are rare: start from a probability of 5 %

    def forward(self, products: Features) -> Tensor:  # -> (B, 1, H / 4, W / 4) logits
        size = products[0].shape[-2:]
        # channels x resolution grow large before the sum, hence reduce first, then upsample
        hidden = self.reduce[0](products[0])
        for reduce, level in zip(list(self.reduce)[1:], products[1:], strict=True):
            hidden = hidden + F.interpolate(reduce(level), size=size, mode="bilinear", align_corners=False)
        hidden = F.relu(hidden)
        for context in self.context:
            hidden = hidden + context(hidden)
        return self.answer(hidden)
