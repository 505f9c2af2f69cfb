"""The depth reader: a small network that tells the depth in a picture of a scene, pixel by pixel.

It learns on true scenes (`ldm.train.depth_reader`), whose depth is known, and then says whether a drawn picture has the
depth that was asked for. Its own error on true pictures is stated beside its verdicts, as the checker's is.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def block(c_in: int, c_out: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(c_in, c_out, 3, stride=stride, padding=1), nn.GroupNorm(4, c_out), nn.SiLU())


class DepthReader(nn.Module):
    """Picture (B, 3, H, W) in [-1, 1] -> depth (B, H, W): 0 the sky, 1 the nearest. H and W are multiples of 16.

    A U-Net (Ronneberger et al. 2015): down to a sixteenth, where it sees what a thing is, and up again beside what it
    saw on the way, where it finds the outlines.
    """

    def __init__(self, widths: tuple[int, ...] = (16, 32, 64, 96, 96)):
        super().__init__()
        self.into = block(3, widths[0])
        self.down = nn.ModuleList(block(a, b, stride=2) for a, b in pairwise(widths))
        self.middle = block(widths[-1], widths[-1])
        self.up = nn.ModuleList(block(b + a, a) for a, b in zip(widths[-2::-1], widths[:0:-1], strict=True))
        self.out = nn.Conv2d(widths[0], 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        seen = [self.into(x)]
        for level in self.down:
            seen.append(level(seen[-1]))
        h = self.middle(seen.pop())
        for level in self.up:
            h = F.interpolate(h, scale_factor=2, mode="nearest")
            h = level(torch.cat([h, seen.pop()], dim=1))
        return torch.sigmoid(self.out(h))[:, 0]  # (B, H, W)
