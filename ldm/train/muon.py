"""Muon: momentum whose every matrix is made orthogonal before it is applied (Jordan et al. 2024).

A gradient's matrix has a few large singular values and many small ones; making them equal lets the rare directions
learn as fast as the common ones. Convolution kernels count as matrices (C_out, C_in*k*k). Gains, biases and
embeddings have no such structure and are left to AdamW.
"""

import torch
from torch import Tensor, nn


def orthogonalise(g: Tensor, steps: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrix to `g` (M, N), roughly: singular values between about 0.7 and 1.2.

    Newton-Schulz iteration with the quintic a*s + b*s^3 + c*s^5 that Jordan et al. tuned for speed, not for precision.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g / (g.norm() + 1e-7)
    if tall := x.shape[0] > x.shape[1]:
        x = x.T
    # Each step multiplies x by a polynomial of x x^T from the left. These are M by M and commute, so they are
    # multiplied together first: for a wide matrix that is far less work than five products with x itself.
    gram = x @ x.T
    whole = None
    for _ in range(steps):
        factor = b * gram + c * gram @ gram
        factor.diagonal().add_(a)
        whole = factor if whole is None else factor @ whole
        gram = factor @ gram @ factor
    x = whole @ x
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum. `lr` is comparable to AdamW's: updates are scaled to a root mean square of 0.2.

    (That scaling, 0.2 * sqrt(max(M, N)), is from Liu et al. 2025, "Muon is scalable", equation 4.)
    """

    def __init__(self, params, lr: float = 1e-3, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                if "momentum" not in self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p.grad)
                buffer = self.state[p]["momentum"]
                buffer.lerp_(p.grad, 1 - momentum)
                g = p.grad.lerp(buffer, momentum).flatten(1)  # (C_out, C_in*k*k)
                update = orthogonalise(g) * 0.2 * max(g.shape) ** 0.5
                p.add_(update.view_as(p), alpha=-lr)


def split_parameters(model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """(matrices for Muon, everything else for AdamW): embeddings are tables of vectors, not maps, and go to AdamW."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.ndim >= 2 and id(p) not in tables]
    chosen = {id(p) for p in matrices}
    return matrices, [p for p in trained if id(p) not in chosen]
