"""The student, a bottleneck and decoder on the frozen teacher's features, and the two heads that read where it fails.

In training the teacher sees the normal image and the student the defect image. The student must answer the normal
features through a bottleneck at half the coarsest resolution, with no skip path around it, so that the defect cannot
pass. It shares the frozen teacher's features (Deng & Li, CVPR 2022), so that inference runs the encoder once.
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
    """Teacher features of an image → an estimate of the teacher features of that image without its defect.

    It reads all levels of the teacher and answers the coarsest `len(decoder_channels)` of them, finest first.
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
    """Reads where teacher and student disagree, and the distance to the memory bank: maps → one logit a cell.

    Of teacher and student it reads the products of L2-normalised features channel by channel, as DeSTSeg does (Zhang et
    al., CVPR 2023, sec. 3.3); their sum over channels is the cosine similarity.
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


class LocalisationHead(nn.Module):
    """Reads how far each cell is from normal, and not in which direction: distances → one logit a cell.

    The segmentation head reads every channel and also learns the textures of synthetic defects by heart; bare distances
    hold no texture, so this head draws real defects more sharply. It reads signed logarithms of distances in units of
    their deviation over normal images, so that a strong defect does not drown a faint one, and little context, since
    the outlines of synthetic defects are no law either.
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
    """Convolutions of growing dilation, each to be added to what it reads."""
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
    """Set the bias for a probability of 5 %: defects are rare."""
    if answer.bias is not None:
        nn.init.constant_(answer.bias, -3.0)
    return answer
