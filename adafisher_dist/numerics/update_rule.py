"""The update of stacked blocks from preconditioned momentum. Shape suffixes: see `fisher`."""

from __future__ import annotations

import torch
from torch import Tensor

from adafisher_dist.numerics.newton_schulz import polar_factor


def scale_rows(vectors_NRB: Tensor, weight_NR: Tensor | None, exponent: float) -> Tensor:
    """Rows times ŵ^(−p), given 1/√ŵ: the left factor's part.

    The scale of each block is lost; only its direction counts.
    """
    if weight_NR is not None:
        for _ in range(round(2 * exponent)):
            vectors_NRB = _without_scale(vectors_NRB) * weight_NR.unsqueeze(2)
    return _without_scale(vectors_NRB)


def orthogonal_update(vectors_NRB: Tensor, by_diagonal_NRB: Tensor, share_NR: Tensor | None) -> Tensor:
    """The polar factor of each block, as long as `by_diagonal_NRB`; of zeros, zeros.

    The polar factor of X = U Σ Vᵀ is U Vᵀ: of all matrices of this spectral norm that with the most
    progress along X. It makes rows about equally long: `share_NR` is what each row is to have of it
    (`row_shares`), and None where blocks have one row.
    """
    x_NRB = polar_factor(vectors_NRB)
    if share_NR is not None:
        x_NRB.mul_(share_NR.unsqueeze(2))
    norm_N11, length_N11 = (torch.linalg.vector_norm(v, dim=(1, 2), keepdim=True) for v in (x_NRB, by_diagonal_NRB))
    return x_NRB.mul_(torch.where(norm_N11 > 0, length_N11 / norm_N11, 0.0))


def row_shares(square_NR: Tensor, eps: float) -> Tensor:
    """√ŵ / (√ŵ + ε) of each row: 1 but where its gradients are no larger than ε.

    As by Adam, such rows, whose gradients are often rounding alone, hardly move.
    """
    root_NR = square_NR.sqrt()
    return root_NR / (root_NR + eps)


def natural_update(vectors_NRB: Tensor, d_N: Tensor, exponent: float) -> Tensor:
    """The update of grafting="none", F̂^(−p) m̂, given A^(−p) m̂: times d^(−p); zeros where d = 0."""
    unit_N11 = torch.where(d_N > 0, d_N.rsqrt(), 0.0)[:, None, None]
    result: Tensor = (vectors_NRB * unit_N11) * unit_N11 ** (2 * exponent - 1)  # in two steps, within the dtype's range
    return result


def diagonal_update(momentum: Tensor, moment: Tensor, eps: float) -> Tensor:
    """Adam's update, m̂ / (√v + ε) with the second moment v; 0 where v is 0.

    F has not seen a gradient of such an element yet.
    """
    return torch.where(moment > 0, momentum / moment.sqrt().add_(eps), 0.0)


def _without_scale(vectors_NRB: Tensor) -> Tensor:
    """Each block over its largest element, so that products stay in range; zeros stay zeros."""
    largest_N11 = vectors_NRB.abs().amax(dim=(1, 2), keepdim=True)
    return vectors_NRB / torch.where(largest_N11 > 0, largest_N11, 1.0)
