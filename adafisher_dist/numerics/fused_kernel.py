"""The Triton kernel of `fused_step`: one program takes the whole step of one dense block.

A block's Fisher is read once and written once; A and the iterates of Newton and Schulz, which are
made of it, never leave the chip. Tensor cores multiply float16: a matrix is split into two of them,
and a product is three of theirs, summed in float32. That is 22 bits of each element that is not far
below a matrix's largest, and has to be: A^(−1/2) shortens the largest directions of a block by up
to √(block_size/δ), and the polar factor stretches what is left of rounding errors by 3.4445⁵ (of
gradients of rank one, products of float16 alone make noise). F's own update is in float32, as three
products in TF32, since its elements have no common scale.

Shape suffixes: R rows of a block, B columns, both padded with zeros to powers of two; zeros stay
zeros in every product here. Import this module only where Triton is installed.
"""

# What follows looks like Python, but Triton compiles it, and its types are others.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def write_one(ptr):
    """The least of kernels: whether any can be compiled and started."""
    tl.store(ptr, 1.0)


@triton.jit
def _scramble(x):
    """`rounding._scramble`, on uint32."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def _norm(x):
    """Frobenius norm of a matrix."""
    return tl.sqrt_rn(tl.sum(x * x))  # over both axes at once: each thread's own elements first


@triton.jit
def _without_scale(x):
    """A matrix over its largest element; zeros stay zeros."""
    largest = tl.max(tl.abs(x))
    return x / tl.where(largest > 0, largest, 1.0)


@triton.jit
def _split(x):
    """A matrix as the sum of two of float16: 22 bits of each element above 2⁻¹⁴, fewer below."""
    high = x.to(tl.float16)
    return high, (x - high.to(tl.float32)).to(tl.float16)


@triton.jit
def _product(x_high, x_low, y_high, y_low, z):
    """The matrix x y + z of split x and y, to 22 bits: low times low is left out."""
    z = tl.dot(x_low, y_high, z)
    z = tl.dot(x_high, y_low, z)
    return tl.dot(x_high, y_high, z)


@triton.jit
def _polynomial(p_high, p_low, p_BB, step_ptr):
    """Split: a I + b P + c P², as P (b I + c P) + a I, of P, which is also given split."""
    a, b, c = tl.load(step_ptr), tl.load(step_ptr + 1), tl.load(step_ptr + 2)
    k_B = tl.arange(0, p_BB.shape[0])
    diagonal_BB = k_B[:, None] == k_B[None, :]
    factor_high, factor_low = _split(tl.where(diagonal_BB, c * p_BB + b, c * p_BB))
    q_BB = _product(p_high, p_low, factor_high, factor_low, tl.zeros_like(p_BB))
    return _split(tl.where(diagonal_BB, q_BB + a, q_BB))


@triton.jit
def _times_inverse_root(x_RB, a_BB, steps_ptr, STEPS: tl.constexpr):
    """`newton_schulz.times_inverse_root` of one block, but for a factor of the whole."""
    p_BB = a_BB / _norm(a_BB)
    # Nothing is to be moved out of the loops: what Triton gains by it there are no registers for.
    for number in tl.range(STEPS - 1, num_stages=1, disable_licm=True):
        p_high, p_low = _split(p_BB)
        q_high, q_low = _polynomial(p_high, p_low, p_BB, steps_ptr + 3 * number)
        half_high, half_low = _split(_product(p_high, p_low, q_high, q_low, tl.zeros_like(a_BB)))
        p_BB = _product(q_high, q_low, half_high, half_low, tl.zeros_like(a_BB))
        x_high, x_low = _split(x_RB)
        x_RB = _product(x_high, x_low, q_high, q_low, tl.zeros_like(x_RB))
    p_high, p_low = _split(p_BB)
    q_high, q_low = _polynomial(p_high, p_low, p_BB, steps_ptr + 3 * (STEPS - 1))
    x_high, x_low = _split(x_RB)
    return _product(x_high, x_low, q_high, q_low, tl.zeros_like(x_RB))


@triton.jit
def _polar_factor(x_RB, TALL: tl.constexpr, PA: tl.constexpr, PB: tl.constexpr, PC: tl.constexpr):
    """`newton_schulz.polar_factor` of one block."""
    norm = _norm(x_RB)
    x_RB = x_RB / tl.where(norm > 0, norm, 1.0)
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


# `rows` aligns no address. The pointers are read once a row or a block: whether they are aligned
# decides nothing, and would compile the kernel anew for some slices of a stack.
@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["square_ptr", "seed_ptr", "should_step_ptr"])
def step_kernel(
    gradient_ptr,  # (N, rows, columns) float32: g, and then u
    momentum_ptr,  # the same: M
    fisher_ptr,  # F: (N, columns, columns), or (N, columns (columns + 1) / 2) where PACKED
    square_ptr,  # (N, rows) float32: w; read where SQUARES
    seed_ptr,  # (N,) int32, of this update; read where ROUNDED
    should_step_ptr,  # one int32; read where GATED: if it is 0, u is 0 and nothing else changes
    steps_ptr,  # (STEPS, 3) float32: a, b and c of each step to A^(−1/2)
    rows,
    columns,
    weight,  # this and what follows: `fused_step.Scalars`
    momentum_scale,
    gradient_scale,
    decay,
    fisher_weight,  # 1 − decay, of which float32 would lose digits
    correction,
    damping,
    noise,
    eps,
    R: tl.constexpr,
    B: tl.constexpr,
    WHOLE: tl.constexpr,
    SQUARES: tl.constexpr,
    PACKED: tl.constexpr,
    ROUNDED: tl.constexpr,
    GATED: tl.constexpr,
    TINY: tl.constexpr,
    STEPS: tl.constexpr,
    PA: tl.constexpr,
    PB: tl.constexpr,
    PC: tl.constexpr,
):
    """One step of block `program_id(0)`: see `block_step.update_blocks`, whose order this is."""
    n = tl.program_id(0).to(tl.int64)
    if WHOLE:  # nothing is padded, and the compiler leaves out what would tell
        rows, columns = R, B
    i_R, j_B = tl.arange(0, R), tl.arange(0, B)
    inside_RB = (i_R < rows)[:, None] & (j_B < columns)[None, :]
    at_RB = n * rows * columns + i_R[:, None] * columns + j_B[None, :]
    if GATED:
        if tl.load(should_step_ptr) == 0:
            tl.store(gradient_ptr + at_RB, tl.zeros((R, B), tl.float32), inside_RB)
            return
    gradient_RB = tl.load(gradient_ptr + at_RB, inside_RB, 0.0)
    momentum_RB = tl.load(momentum_ptr + at_RB, inside_RB, 0.0)
    momentum_RB += weight * (gradient_RB - momentum_RB)
    tl.store(momentum_ptr + at_RB, momentum_RB, inside_RB)
    hat_RB = momentum_scale * momentum_RB + gradient_scale * gradient_RB

    vectors_RB, weighed_RB = _without_scale(hat_RB), gradient_RB
    square_R = tl.zeros((R,), tl.float32)
    if SQUARES:
        at_R = n * rows + i_R
        square_R = tl.load(square_ptr + at_R, i_R < rows, 0.0)
        mean_R = tl.sum(gradient_RB * gradient_RB, axis=1) / columns
        square_R += fisher_weight * (mean_R - square_R)
        tl.store(square_ptr + at_R, square_R, i_R < rows)
        square_R *= correction
        weight_R = tl.where(square_R > 0, 1.0 / tl.sqrt_rn(square_R), 0.0)  # tl.sqrt of a subnormal is 0
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
    weighed_RB *= tl.sqrt_rn(fisher_weight / rows)
    fisher_BB = tl.dot(tl.trans(weighed_RB), weighed_RB, fisher_BB * decay, input_precision="tf32x3")
    # Only the lower triangle counts, which is what checkpoints keep.
    fisher_BB = tl.where(k_B[:, None] >= j_B[None, :], fisher_BB, tl.trans(fisher_BB))
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
    length = _norm(tl.where(moment_RB > 0, hat_RB / (tl.sqrt_rn(moment_RB) + eps), 0.0))
    a_BB = fisher_BB * (1.0 / tl.maximum(mean, TINY))
    if ROUNDED:
        row_B = tl.sqrt_rn(tl.sum(a_BB * a_BB, axis=1))
        damping = tl.maximum(noise * tl.max(row_B, axis=0), damping)
    a_BB = tl.where(diagonal_BB, a_BB + damping, a_BB)
    vectors_RB = _times_inverse_root(vectors_RB, a_BB, steps_ptr, STEPS)

    if SQUARES:  # of one row the direction is its own
        vectors_RB = _polar_factor(vectors_RB, R > B, PA, PB, PC)
        root_R = tl.sqrt_rn(square_R)
        vectors_RB *= (root_R / (root_R + eps))[:, None]
    norm = _norm(vectors_RB)
    tl.store(gradient_ptr + at_RB, vectors_RB * (length / tl.where(norm > 0, norm, 1.0)), inside_RB)
