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


def enlarge(maps: Tensor, size: torch.Size | tuple[int, ...]) -> Tensor:
    """(B, C, h, w) → (B, C, *size), bilinear; left alone if it has that size."""
    if maps.shape[-2:] == torch.Size(size):
        return maps
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


class Student(nn.Module):
    """Teacher features of any image → estimate of the teacher features of that image without its defect.

    It reads all of the teacher's levels and answers the coarsest `len(decoder_channels)` of them.
    """

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
        for outputs, target in zip(reversed(decoder_channels), reversed(channels), strict=False):
            self.decode.append(nn.Sequential(conv_block(inputs, outputs), conv_block(outputs, outputs)))
            self.answer.append(nn.Conv2d(outputs, target, 1))
            inputs = outputs

    def forward(self, features: Features) -> Features:  # finest answered level first
        code = torch.cat([reduce(level) for reduce, level in zip(self.reduce, features, strict=True)], dim=1)
        hidden = self.bottleneck(code)
        answers: list[Tensor] = []
        for decode, answer in zip(self.decode, self.answer, strict=True):
            hidden = decode(F.interpolate(hidden, scale_factor=2.0, mode="nearest"))
            answers.append(answer(hidden))
        return tuple(reversed(answers))


class SegmentationHead(nn.Module):
    """Reads where teacher and student disagree, and how far from anything remembered: maps → one logit a pixel.

    From the student it reads what DeSTSeg does (Zhang et al., CVPR 2023, sec. 3.3): channel by channel products of
    L2-normalised features, whose sum over channels is the cosine similarity; from the memory one distance a place.
    """

    def __init__(self, channels: tuple[int, ...], width: int) -> None:
        super().__init__()
        self.reduce = nn.ModuleList([nn.Conv2d(level, width, 1) for level in channels])
        self.context = _contexts(width, (1, 3, 6))
        self.answer = _rare(nn.Conv2d(width, 1, 1))

    def forward(self, read: Features, size: tuple[int, ...]) -> Tensor:
        """Maps (B, C_k, h_k, w_k) → logits (B, 1, *size)."""
        # channels x resolution grow large before the sum, hence reduce first, then upsample
        first, *others = (enlarge(reduce(level), size) for reduce, level in zip(self.reduce, read, strict=True))
        hidden = first
        for other in others:
            hidden = hidden + other
        hidden = F.relu(hidden)
        for context in self.context:
            hidden = hidden + context(hidden)
        return self.answer(hidden)


class DistanceHead(nn.Module):
    """Reads how far each place is from normal, and not in which direction: distances → one logit a pixel.

    The segmentation head, which reads every channel, learns the textures of synthetic defects by heart along with what
    a defect is; one that is handed bare distances cannot, and draws real defects far more sharply (docs/experiments.md,
    round 10). Distances are read as signed logarithms of their deviations from normal places, so that a strong defect
    does not drown a faint one, and with little context, for the outlines of synthetic defects are no law either.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, maps: int, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(maps))
        self.register_buffer("deviation", torch.ones(maps))
        self.read = nn.Conv2d(maps, width, 1)
        self.context = _contexts(width, (1, 3))
        self.answer = _rare(nn.Conv2d(width, 1, 1))

    def forward(self, distances: Tensor) -> Tensor:
        """Distances (B, maps, h, w) → logits (B, 1, h, w)."""
        far = (distances - self.mean.view(1, -1, 1, 1)) / self.deviation.view(1, -1, 1, 1)
        hidden = F.relu(self.read(far.sign() * far.abs().log1p()))
        for context in self.context:
            hidden = hidden + context(hidden)
        return self.answer(hidden)

    @torch.no_grad()
    def normalise(self, distances: Tensor) -> None:
        """Take mean and deviation of each map from distances (N, maps, h, w) of normal images."""
        self.mean.copy_(distances.mean(dim=(0, 2, 3)))
        self.deviation.copy_(distances.std(dim=(0, 2, 3)).clamp_min(1e-6))


def _contexts(width: int, dilations: tuple[int, ...]) -> nn.ModuleList:
    """Convolutions that look ever further around a pixel, to be added to what they read."""
    return nn.ModuleList(
        [
            nn.Sequential(
                nn.Conv2d(width, width, 3, padding=dilation, dilation=dilation, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
            )
            for dilation in dilations
        ]
    )


def _rare(answer: nn.Conv2d) -> nn.Conv2d:
    """Defects are rare: training starts from a probability of 5 %."""
    if answer.bias is not None:
        nn.init.constant_(answer.bias, -3.0)
    return answer
