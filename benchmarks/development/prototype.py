"""Candidates for AdaFisher's update, for one process, to try out; the best goes into the package.

W = polar(n R(a)) R(b), n being the momentum of a matrix and R(p) = A^(−p) of its blocks, then
scaled. The averages w and F start from zero and are not corrected for it, but where Adam's length
is taken from them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise

import torch
from optimizers import QUINTIC, polar
from torch import Tensor, nn

RMS = 0.2  # Adam's, by Liu et al. 2502.16982
Unit = tuple[int, slice, slice]  # a parameter's number, rows, columns


@dataclass(frozen=True)
class Choice:
    """What a trial is of.

    Attributes:
        a, b: exponents before and after the polar factor.
        polar: of which part: "piece" (a slab's block), "slab" (its rows whole), "whole" (the
            matrix), "none".
        rows, columns: the most of a piece.
        momentum, nesterov, rho, delta: of the momentum and of F.
        weigh: whether F is of g gᵀ / w, w being the rows' own mean square.
        left: the exponent of w by which the momentum's rows are divided before the polar factor;
            0.5 whitens them.
        normalize: of rows after the polar factor: 0 for none, else the decay of their mean square
            (NorMuon).
        steps: of Newton and Schulz.
        length: 1 for the root mean square of a factored Adam's update in place of 0.2, 2 for as
            much progress along the momentum as that update makes (at most `most` times its length).
        every: steps between roots.
        coupled: steps of the coupled iteration by which A^(−1/2) is found, a = 0.5; 0 for its
            eigenvectors.
    """

    a: float = 0.5
    b: float = 0.0
    polar: str = "piece"
    rows: int = 64
    columns: int = 128
    momentum: float = 0.9
    nesterov: int = 0
    rho: float = 0.97
    delta: float = 0.01
    weigh: int = 0
    left: float = 0.0
    normalize: float = 0.0
    steps: int = 5
    length: int = 0
    most: float = 4.0
    every: int = 4
    coupled: int = 0


class Prototype(torch.optim.Optimizer):
    """For matrices only."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float, weight_decay: float, choice: Choice) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        if choice.coupled and (choice.a, choice.b) != (0.5, 0.0):
            raise ValueError(f"The coupled iteration finds A^(−1/2): a = 0.5 and b = 0, not {choice.a} and {choice.b}.")
        if choice.length and choice.polar not in ("piece", "none"):
            raise ValueError(f"Adam's length is taken block by block: polar = piece or none, not {choice.polar}.")
        self.choice = choice
        self.tensors = [p for group in self.param_groups for p in group["params"]]
        self.matrices = [p.detach().flatten(1) for p in self.tensors]
        self.momenta = [torch.zeros_like(m) for m in self.matrices]
        self.updates = [torch.zeros_like(m) for m in self.matrices]
        self.squares = [torch.zeros(len(m), 1) for m in self.matrices]
        self.lengths = [torch.zeros(len(m), 1) for m in self.matrices]
        self.blocks = self._stacks("piece")
        self.units = self._stacks(choice.polar if choice.polar != "none" else "piece")
        self.fishers = [torch.zeros(len(units), c, c) for (_, c), units in self.blocks]
        self.roots: list[tuple[Tensor | None, Tensor | None]] = [(None, None) for _ in self.blocks]
        self.count = 0

    def memory_usage(self) -> dict[str, dict[str, int]]:
        """Bytes of state, as AdaFisher tells them."""
        kept = [*self.momenta, *self.squares, *self.lengths, *self.fishers]
        return {"rank": {"total": sum(tensor.numel() * tensor.element_size() for tensor in kept)}}

    def _stacks(self, part: str) -> list[tuple[tuple[int, int], list[Unit]]]:
        stacks: dict[tuple[int, int], list[Unit]] = defaultdict(list)
        for number, matrix in enumerate(self.matrices):
            rows = cuts(matrix.shape[0], self.choice.rows if part != "whole" else matrix.shape[0])
            columns = cuts(matrix.shape[1], self.choice.columns if part == "piece" else matrix.shape[1])
            for r in rows:
                for c in columns:
                    stacks[r.stop - r.start, c.stop - c.start].append((number, r, c))
        return list(stacks.items())

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        own = self.choice
        gradients = []
        for p, m in zip(self.tensors, self.momenta, strict=True):
            assert p.grad is not None
            g = p.grad.flatten(1)
            m.lerp_(g, 1 - own.momentum)
            gradients.append(g)
        sources = [g.lerp(m, own.momentum) if own.nesterov else m for g, m in zip(gradients, self.momenta, strict=True)]
        if own.a or own.b or own.left or own.length:
            for w, g in zip(self.squares, gradients, strict=True):
                w.lerp_(g.square().mean(dim=1, keepdim=True), 1 - own.rho)
            self._update_fishers(gradients)
        whitened = sources
        if own.left:
            whitened = [n / w.add(1e-30) ** own.left for n, w in zip(sources, self.squares, strict=True)]
        self._move(self.blocks, whitened, lambda x, index: _times(x, self.roots[index][0]))
        if own.polar != "none":
            self._move(self.units, self.updates, lambda x, _: polar(x, own.steps))
        if own.b:
            self._move(self.blocks, self.updates, lambda x, index: _times(x, self.roots[index][1]))
        if own.normalize:
            for u, v in zip(self.updates, self.lengths, strict=True):
                v.lerp_(u.square().mean(dim=1, keepdim=True), 1 - own.normalize)
                u.div_((v / (1 - own.normalize ** (self.count + 1))).sqrt().add_(1e-8))
        if own.length:
            self._scale_as_adam(sources)
        else:
            self._move(self.units, self.updates, lambda x, _: x * (RMS / _rms(x)))
        index = 0
        for group in self.param_groups:
            for _ in group["params"]:
                weight = self.matrices[index]
                weight.mul_(1 - group["lr"] * group["weight_decay"]).sub_(self.updates[index], alpha=group["lr"])
                index += 1
        self.count += 1

    def _scale_as_adam(self, sources: list[Tensor]) -> None:
        """Scale updates of blocks to the root mean square that Adafactor's second moment gives."""
        own, t = self.choice, self.count + 1
        unbias = (1 - own.rho**t) ** 0.5 / (1 - own.momentum**t)
        for index, (_, units) in enumerate(self.blocks):
            n_NRC = torch.stack([sources[number][r, c] for number, r, c in units])
            w_NR1 = torch.stack([self.squares[number][r] for number, r, _ in units])
            f_N1C = self.fishers[index].diagonal(dim1=1, dim2=2).unsqueeze(1)
            v_NRC = w_NR1 * (f_N1C / f_N1C.mean(dim=2, keepdim=True).clamp_min(1e-30))
            adam_NRC = n_NRC / v_NRC.sqrt().clamp_min(1e-30) * unbias
            u_NRC = torch.stack([self.updates[number][r, c] for number, r, c in units])
            u_NRC *= _rms(adam_NRC) / _rms(u_NRC)
            if own.length == 2:
                has_N11, wanted_N11 = ((x * n_NRC).sum(dim=(1, 2), keepdim=True) for x in (u_NRC, adam_NRC))
                u_NRC *= torch.where(has_N11 > 0, wanted_N11 / has_N11, 1.0).clamp(1.0, own.most)
            for (number, r, c), u in zip(units, u_NRC, strict=True):
                self.updates[number][r, c] = u

    def _update_fishers(self, gradients: list[Tensor]) -> None:
        own = self.choice
        if own.weigh:
            gradients = [g / w.add(1e-30).sqrt() for g, w in zip(gradients, self.squares, strict=True)]
        for index, ((rows, _), units) in enumerate(self.blocks):
            x = torch.stack([gradients[number][r, c] for number, r, c in units])
            self.fishers[index].baddbmm_(x.mT, x, beta=own.rho, alpha=(1 - own.rho) / rows)
            if self.count % own.every == 0 or self.count < 8:
                mean = self.fishers[index].diagonal(dim1=1, dim2=2).mean(dim=1).clamp_min(1e-30)
                a_NCC = self.fishers[index] / mean[:, None, None]
                if own.coupled:
                    a_NCC.diagonal(dim1=1, dim2=2).add_(own.delta)
                    self.roots[index] = inverse_root(a_NCC, own.coupled), None
                    continue
                values, vectors = torch.linalg.eigh(a_NCC)
                values = values.clamp_min(0).add_(own.delta).unsqueeze(1)
                self.roots[index] = tuple(  # type: ignore[assignment]
                    (vectors * values**-p) @ vectors.mT if p else None for p in (own.a, own.b)
                )

    def _move(
        self, stacks: list[tuple[tuple[int, int], list[Unit]]], sources: list[Tensor],
        change: Callable[[Tensor, int], Tensor],
    ) -> None:  # fmt: skip
        """Parts of `sources`, changed, to their places in `updates`."""
        for index, (_, units) in enumerate(stacks):
            results = change(torch.stack([sources[number][r, c] for number, r, c in units]), index)
            for (number, r, c), result in zip(units, results, strict=True):
                self.updates[number][r, c] = result


def cuts(length: int, most: int) -> list[slice]:
    """As few parts as can be, as alike as can be."""
    parts = -(-length // most)
    return [slice(a, b) for a, b in pairwise(length * i // parts for i in range(parts + 1))]


def inverse_root(a_NCC: Tensor, steps: int) -> Tensor:
    """A^(−1/2), as roughly as `polar` is: the same polynomial, of the coupled iteration."""
    a, b, c = QUINTIC
    norm = torch.linalg.matrix_norm(a_NCC, keepdim=True)
    y, z = a_NCC / norm, None
    for step in range(steps):
        m = y if z is None else z @ y
        polynomial = torch.baddbmm(m, m, m, beta=b, alpha=c)
        polynomial.diagonal(dim1=1, dim2=2).add_(a)
        z = polynomial if z is None else polynomial @ z
        y = y @ polynomial if step + 1 < steps else y
    assert z is not None
    return z / norm.sqrt()


def _times(x: Tensor, root: Tensor | None) -> Tensor:
    return x if root is None else x @ root


def _rms(x: Tensor) -> Tensor:
    return x.square().mean(dim=(1, 2), keepdim=True).sqrt().clamp_min(1e-30)
