"""Choose rows that stand for many others: greedy k-center, farthest first.

Sener & Savarese, ICLR 2018, algorithm 1; PatchCore (Roth et al., CVPR 2022), eq. 5. Each choice is the row farthest
from all chosen so far, so that rare rows are kept and alike ones are not. The covering radius is at most twice the
least possible (Gonzalez 1985).
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

PROJECTED = 48  # dimensions in which rows are compared
BLOCK = 512  # rows among which choices are made between two looks at all others
CHUNK = 4096  # rows compared at once with a block's choices: 8 MB stay in a cache


@torch.no_grad()
def k_center(
    rows: Tensor,
    count: int,
    generator: torch.Generator,
    on_step: Callable[[int], object] = lambda chosen: None,
    candidates: int = 60_000,
) -> Tensor:
    """Choose `count` of rows (N, C), or all, by greedy k-center.

    More rows than `candidates` (or `count`, if larger) are first thinned out at random. Rows of more than PROJECTED
    dimensions are compared in a random Gaussian projection, which keeps distances roughly (Johnson & Lindenstrauss
    1984). The first choice is random.

    Args:
        generator: draws on the CPU, whatever the rows' device.
        on_step: gets the number of rows chosen since the last call.

    Returns:
        indices in order of choice, without repeats, on the rows' device. Fewer of them are the first of more.
    """
    kept = torch.randperm(len(rows), generator=generator)[: max(candidates, count)].to(rows.device)
    with torch.autocast(rows.device.type, enabled=False):
        compared = _projected(rows, generator)[kept]
        # about the mean, since a difference of large squares would lose small distances
        return kept[_farthest_first(compared - compared.mean(dim=0), count, on_step).to(rows.device)]


def _projected(rows: Tensor, generator: torch.Generator) -> Tensor:
    channels = rows.shape[1]
    if channels <= PROJECTED:
        return rows.float()
    directions = (torch.randn(channels, PROJECTED, generator=generator) / PROJECTED**0.5).to(rows.device)
    return torch.cat([part.float() @ directions for part in rows.split(CHUNK)])


def _farthest_first(rows: Tensor, count: int, on_step: Callable[[int], object]) -> Tensor:
    """Begin with row 0. A pass over all rows serves many choices, which are those of one pass each.

    A block takes the BLOCK farthest rows. As distances only shrink, a choice among them is the farthest of all as long
    as it is farther than the last of the block was at first.
    """
    count = min(count, len(rows))
    squares = rows.square().sum(dim=1)
    distance = torch.full_like(squares, torch.inf)  # squared, to the nearest choice
    chosen: list[Tensor] = []
    picks, found = torch.zeros(min(count, 1), dtype=torch.long), 0
    while len(picks):
        chosen.append(picks)
        found += len(picks)
        on_step(len(picks))
        picks = picks.to(rows.device)
        for first in range(0, len(rows), CHUNK):
            part = slice(first, first + CHUNK)
            nearest = torch.addmm(squares[picks], rows[part], rows[picks].T, alpha=-2).amin(dim=1)
            torch.minimum(distance[part], (nearest + squares[part]).clamp_min_(0), out=distance[part])
        distance[picks] = -1.0  # never again, even where all that is left are duplicates
        farthest, block = distance.topk(min(BLOCK, len(rows)))
        among = rows[block]
        between = (squares[block, None] + squares[block] - 2 * among @ among.T).clamp_min_(0)
        picks = block.cpu()[_choices(farthest.cpu(), between.cpu(), count - found)]
    return torch.cat(chosen) if chosen else picks


def _choices(distance: Tensor, between: Tensor, most: int) -> Tensor:
    """Choose at most `most` places of a block from its distances (n,), in descending order, and `between` (n, n)."""
    left, pairs = distance.numpy().copy(), between.numpy()
    floor = max(left[-1], 0.0)
    chosen: list[int] = []
    while len(chosen) < most:
        place = int(left.argmax())
        if left[place] < floor:
            break
        chosen.append(place)
        left = np.minimum(left, pairs[place])
        left[place] = -1.0
    return torch.tensor(chosen, dtype=torch.long)
