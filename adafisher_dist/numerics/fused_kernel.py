"""The Triton kernel of `fused_step`: one program takes the whole step of one dense block.

A block's Fisher is read once and written once; what is made of it, A and the iterates of Newton and
Schulz, never leaves the chip. Products for the inverse root and the polar factor are of float16
numbers, summed in float32; F's own update is in float32 (three products in TF32 each).

Shape suffixes: R rows of a block, B columns, both padded with zeros to powers of two; zeros stay
zeros in every product here. Import this module only where Triton is installed.
"""

# What follows looks like Python, but Triton compiles it, and its types are others.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _scramble(x):
    """`rounding._scramble`, on uint32."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def _norm(x):
    """Frobenius norm of a matrix."""
    return tl.sqrt(tl.sum(tl.sum(x * x, axis=1), axis=0))


@triton.jit
def _without_scale(x):
    """A matrix over its largest element; zeros stay zeros."""
    largest = tl.max(tl.max(tl.abs(x), axis=1), axis=0)
    return x * tl.where(largest > 0, 1.0 / largest, 0.0)


@triton.jit
def _split(x):
    """A matrix as the sum of two of float16, which have 22 bits of each element between them."""
    high = x.to(tl.float16)
    return high, (x - high.to(tl.float32)).to(tl.float16)


@triton.jit
def _product(x_high, x_low, y_high, y_low, z):
    """The matrix x y + z of split x and y, as exact as products of float32: low times low is nothing."""
    z = tl.dot(x_low, y_high, z)
    z = tl.dot(x_high, y_low, z)
    return tl.dot(x_high, y_high, z)


@triton.jit
def _polynomial(p_high, p_low, p, i, j, PA: tl.constexpr, PB: tl.constexpr, PC: tl.constexpr):
    """The matrix a I + b P + c P² of P, which is also given split, as a I + P (b I + c P); split."""
    r_high, r_low = _split(tl.where(i == j, PC * p + PB, PC * p))
    q = _product(p_high, p_low, r_high, r_low, tl.zeros_like(p))
    return _split(tl.where(i == j, q + PA, q))


@triton.jit
def _times_inverse_root(vectors_RB, a_BB, PA: tl.constexpr, PB: tl.constexpr, PC: tl.constexpr):
    """The rows times A^(−1/2), but for a factor of the whole.

    `newton_schulz.inverse_root`, which has P = z y and finds z and y: here P and the rows are
    carried along, x ← x Q and P ← Q P Q with the polynomial Q = a I + b P + c P² (Higham 2008,
    section 7.3, which is the same in exact arithmetic, and as stable).
    """
    p_BB = a_BB * (1.0 / _norm(a_BB))
    for step in tl.range(4, num_stages=1, disable_licm=True):
        i, j = tl.arange(0, p_BB.shape[0])[:, None], tl.arange(0, p_BB.shape[0])[None, :]
        high, low = _split(p_BB)
        q_high, q_low = _polynomial(high, low, p_BB, i, j, PA, PB, PC)
        half_high, half_low = _split(_product(high, low, q_high, q_low, tl.zeros_like(a_BB)))
        p_BB = _product(q_high, q_low, half_high, half_low, tl.zeros_like(a_BB))
        x_high, x_low = _split(vectors_RB)
        vectors_RB = _product(x_high, x_low, q_high, q_low, tl.zeros_like(vectors_RB))
    i, j = tl.arange(0, p_BB.shape[0])[:, None], tl.arange(0, p_BB.shape[0])[None, :]
    high, low = _split(p_BB)
    q_high, q_low = _polynomial(high, low, p_BB, i, j, PA, PB, PC)
    x_high, x_low = _split(vectors_RB)
    return _product(x_high, x_low, q_high, q_low, tl.zeros_like(vectors_RB))


@triton.jit
def _polar_factor(x_RB, TALL: tl.constexpr, PA: tl.constexpr, PB: tl.constexpr, PC: tl.constexpr):
    """`newton_schulz.polar_factor` of one block."""
    norm = _norm(x_RB)
    x_RB *= tl.where(norm > 0, 1.0 / norm, 0.0)
    for _ in tl.range(5, num_stages=1, disable_licm=True):
        high, low = _split(x_RB)
        t_high, t_low = tl.trans(high), tl.trans(low)
        if TALL:
            gram = _product(t_high, t_low, high, low, tl.zeros((high.shape[1], high.shape[1]), tl.float32))
        else:
            gram = _product(high, low, t_high, t_low, tl.zeros((high.shape[0], high.shape[0]), tl.float32))
        g_high, g_low = _split(gram)
        q_high, q_low = _split(PB * gram + PC * _product(g_high, g_low, g_high, g_low, tl.zeros_like(gram)))
        if TALL:
            x_RB = _product(high, low, q_high, q_low, PA * x_RB)
        else:
            x_RB = _product(q_high, q_low, high, low, PA * x_RB)
    return x_RB


@triton.jit(do_not_specialize=["rows"])  # which no address is aligned by
def step_kernel(
    gradient_ptr,  # (N, rows, columns) float32: g, and then u
    momentum_ptr,  # the same: M
    fisher_ptr,  # F: (N, columns, columns), or (N, columns (columns + 1) / 2) where PACKED
    square_ptr,  # (N, rows) float32: w; read where SQUARES
    seed_ptr,  # (N,) int32, of this update; read where ROUNDED
    should_step_ptr,  # one int32; read where GATED: if it is 0, u is 0 and nothing else changes
    rows,
    columns,
    mu,
    momentum_scale,
    gradient_scale,  # M̂ = momentum_scale M + gradient_scale g
    decay,  # ρ
    gain,  # √((1 − ρ) / rows)
    correction,  # F̂ = correction F
    damping,  # δ + ε
    noise,  # see `rounding.rounding_noise`
    eps,
    R: tl.constexpr,
    B: tl.constexpr,
    SQUARES: tl.constexpr,
    PACKED: tl.constexpr,
    ROUNDED: tl.constexpr,
    UPDATES: tl.constexpr,
    GATED: tl.constexpr,
    TINY: tl.constexpr,
    PA: tl.constexpr,
    PB: tl.constexpr,
    PC: tl.constexpr,
):
    """One step of block `program_id(0)`: see `block_step.update_blocks`, whose order this is."""
    n = tl.program_id(0).to(tl.int64)
    i_R, j_B = tl.arange(0, R), tl.arange(0, B)
    inside_RB = (i_R < rows)[:, None] & (j_B < columns)[None, :]
    at_RB = n * rows * columns + i_R[:, None] * columns + j_B[None, :]
    if GATED:
        if tl.load(should_step_ptr) == 0:
            tl.store(gradient_ptr + at_RB, tl.zeros((R, B), tl.float32), inside_RB)
            return
    gradient_RB = tl.load(gradient_ptr + at_RB, inside_RB, 0.0)
    momentum_RB = tl.load(momentum_ptr + at_RB, inside_RB, 0.0)
    momentum_RB += (1 - mu) * (gradient_RB - momentum_RB)
    tl.store(momentum_ptr + at_RB, momentum_RB, inside_RB)
    hat_RB = momentum_scale * momentum_RB + gradient_scale * gradient_RB

    vectors_RB, weighed_RB = _without_scale(hat_RB), gradient_RB
    square_R = tl.zeros((R,), tl.float32)
    if SQUARES:
        at_R = n * rows + i_R
        square_R = tl.load(square_ptr + at_R, i_R < rows, 0.0)
        if UPDATES:
            mean_R = tl.sum(gradient_RB * gradient_RB, axis=1) / columns
            square_R += (1 - decay) * (mean_R - square_R)
            tl.store(square_ptr + at_R, square_R, i_R < rows)
        square_R *= correction
        weight_R = tl.where(square_R > 0, 1.0 / tl.sqrt(square_R), 0.0)
        vectors_RB = _without_scale(vectors_RB * weight_R[:, None])
        weighed_RB = gradient_RB * weight_R[:, None]

    k_B = tl.arange(0, B)
    inside_BB = (k_B < columns)[:, None] & (j_B < columns)[None, :]
    diagonal_BB = (k_B[:, None] == j_B[None, :]) & inside_BB
    low_BB, high_BB = tl.minimum(k_B[:, None], j_B[None, :]), tl.maximum(k_B[:, None], j_B[None, :])
    if PACKED:
        at_BB = n * (columns * (columns + 1) // 2) + high_BB * (high_BB + 1) // 2 + low_BB
        stored_BB = inside_BB & (k_B[:, None] >= j_B[None, :])
    else:
        at_BB = n * columns * columns + k_B[:, None] * columns + j_B[None, :]
        stored_BB = inside_BB
    fisher_BB = tl.load(fisher_ptr + at_BB, inside_BB, 0.0).to(tl.float32)
    if UPDATES:
        weighed_RB *= gain
        fisher_BB = tl.dot(tl.trans(weighed_RB), weighed_RB, fisher_BB * decay, input_precision="tf32x3")
        if ROUNDED:
            seed = tl.load(seed_ptr + n).to(tl.uint32, bitcast=True)
            mixed_BB = ((low_BB << 16) + high_BB).to(tl.uint32, bitcast=True)
            mixed_BB = _scramble(_scramble(mixed_BB) ^ seed) & 0xFFFF
            bits_BB = fisher_BB.to(tl.uint32, bitcast=True) + mixed_BB
            fisher_BB = (bits_BB & 0xFFFF0000).to(tl.float32, bitcast=True)
            tl.store(fisher_ptr + at_BB, fisher_BB.to(tl.bfloat16), stored_BB)
        else:
            tl.store(fisher_ptr + at_BB, fisher_BB, stored_BB)

    curvature_B = tl.sum(tl.where(diagonal_BB, fisher_BB, 0.0), axis=0)
    mean = tl.sum(curvature_B, axis=0) / columns
    moment_B = curvature_B * correction
    if SQUARES:
        moment_B = moment_B / tl.maximum(mean * correction, TINY)
        moment_RB = square_R[:, None] * moment_B[None, :]
    else:
        moment_RB = tl.zeros((R, B), tl.float32) + moment_B[None, :]
    length = _norm(tl.where(moment_RB > 0, hat_RB / (tl.sqrt(moment_RB) + eps), 0.0))
    a_BB = fisher_BB * (1.0 / tl.maximum(mean, TINY))
    if ROUNDED:
        row_B = tl.sqrt(tl.sum(a_BB * a_BB, axis=1))
        damping = tl.maximum(noise * tl.max(row_B, axis=0), damping)
    a_BB = tl.where(diagonal_BB, a_BB + damping, a_BB)
    vectors_RB = _times_inverse_root(vectors_RB, a_BB, PA, PB, PC)

    if SQUARES:  # of one row the direction is its own
        vectors_RB = _polar_factor(vectors_RB, R > B, PA, PB, PC)
    norm = _norm(vectors_RB)
    tl.store(gradient_ptr + at_RB, vectors_RB * tl.where(norm > 0, length / norm, 0.0), inside_RB)
