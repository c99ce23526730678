"""The Triton kernel behind `fused`: one step of dense blocks with p = 1. Import it only where Triton is installed.

Shape suffixes: N blocks of this program, I rows and J columns of a block. Tiles are (I, N, J), in that order, for the
sake of where their elements lie. Triton deals the last dimension out to the lanes of a warp (and at 128 to its warps),
then N, and leaves I to the registers: a thread holds whole columns. So

- row k of A, which each step of the elimination needs, is in registers; nothing is reduced across lanes to get at it;
- the same numbers are column k, since A is symmetric; each thread needs all of them: one broadcast through shared
  memory (a vector, never a tile);
- a load or store of F is 32 neighbours of a row: coalesced, and in this layout already, so the tile is never
  converted. For that the hint `multiple_of(…, 1)` keeps Triton from loads of 16 bytes, which would change the layout,
  and which rows of odd length do not allow anyway;
- a block of up to 64 has one warp, and so no other to wait for; a step is a chain of shuffle, division and
  multiply-add, and blocks hide each other's.

What Triton 3.9 makes of it for sm_90, counted in its code and by executing its PTX in an emulator; never measured on a
GPU. Warp instructions a block, beside what an H100's SM can issue while the block's bytes (F, m, g in; F, m, u out)
pass at 3 TB/s. The ladder is not counted, nor are the gate (a load and a branch) and packed blocks, which were added
later and make the code up to 8 % longer. Triton 3.3 to 3.6 make slower code for sizes up to 16.

    block  registers  warps an SM  instructions (fp32, bf16)  budget (fp32, bf16)  compiled in
        8         96           21         160,     200             200,     120            1 s
       16         96           21         570,     740             710,     390            1 s
       32        128           16       2 300,   3 000           2 700,   1 400            2 s
       48        168           12       9 600,  12 000           5 900,   3 100            6 s
       64        200           10      13 700,  16 500          10 400,   5 400            8 s
      128        255            8     114 000, 129 000          41 100,  20 900           13 s
"""

# What follows looks like Python, but Triton compiles it, and its types are others.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _hash(x):
    """`fisher._scramble`, on uint32."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def _row(a_INJ, i_I11, k, FIRST: tl.constexpr, STOP: tl.constexpr):
    """Row k of each block, (N, J); k is known to be in [FIRST, STOP), so only those registers are looked at."""
    return tl.sum(tl.where((i_I11 >= FIRST) & (i_I11 < STOP) & (i_I11 == k), a_INJ, 0.0), axis=0)


@triton.jit
def _element(x_NJ, k, NUMBER: tl.constexpr):
    """Element k of each block's vector, (N, 1)."""
    return tl.gather(x_NJ, tl.zeros((NUMBER, 1), tl.int32) + k, axis=1)


@triton.jit
def _solve(
    a_INJ, b_NJ, damping, SIZE: tl.constexpr, WIDTH: tl.constexpr, NUMBER: tl.constexpr, PANEL: tl.constexpr
):  # fmt: skip
    """Solve (A + damping I) x = b by L D Lᵀ; returns x_NJ, and whether all pivots were positive and finite.

    Right-looking: step k takes c cᵀ/pivot from the rest, c being row k, and the right-hand side goes along. Elements of
    c up to k are set to zero first. So rows and columns up to k stay as they were in their own step, without a mask on
    the tile: row k keeps pivot · L's column to the right of the diagonal, and the earlier steps' to the left of it,
    which is what the way back needs. L D Lᵀ rather than Cholesky: no square root in the chain of a step. The damping is
    added to the pivots, since nothing else reads the diagonal: B² additions less, and rounded later.

    A loop over `PANEL` rows at a time: the panel is known when compiling, so finished rows and padding cost nothing
    (half of the arithmetic), while k within it is not, so that the code stays short (a few thousand instructions) and
    compiles in seconds. The price is PANEL selects to find row k.
    """
    i_I11, j_1J = tl.arange(0, WIDTH)[:, None, None], tl.arange(0, WIDTH)[None, :]
    inverse_NJ = tl.zeros_like(b_NJ)  # of the pivots
    for first in tl.static_range(0, SIZE, PANEL):
        for k in range(first, min(first + PANEL, SIZE)):
            c_NJ = _row(a_INJ, i_I11, k, first, min(first + PANEL, SIZE))
            inverse_N1 = 1.0 / (_element(c_NJ, k, NUMBER) + damping)
            inverse_NJ = tl.where(j_1J == k, inverse_N1, inverse_NJ)
            c_NJ = tl.where(j_1J > k, c_NJ, 0.0)
            w_NJ = c_NJ * -inverse_N1
            b_NJ = tl.fma(w_NJ, tl.broadcast_to(_element(b_NJ, k, NUMBER), b_NJ.shape), b_NJ)
            left_INJ = tl.broadcast_to(tl.trans(c_NJ)[:, :, None], a_INJ.shape)
            less_INJ = tl.fma(left_INJ, tl.broadcast_to(w_NJ[None], a_INJ.shape), a_INJ)
            a_INJ = tl.where((i_I11 >= first) & (i_I11 < SIZE), less_INJ, a_INJ)
    # Not positive, NaN, or so large or small that its inverse is 0 or infinite.
    sound_NJ = ((inverse_NJ > 0) & (inverse_NJ < float("inf"))) | (j_1J >= SIZE)
    sound_N = tl.min(sound_NJ.to(tl.int32), axis=1) > 0
    for first in tl.static_range((SIZE - 1) // PANEL * PANEL, -1, -PANEL):
        for after in range(0, min(first + PANEL, SIZE) - first):
            k = min(first + PANEL, SIZE) - 1 - after
            c_NJ = _row(a_INJ, i_I11, k, first, min(first + PANEL, SIZE))
            x_NJ = tl.broadcast_to(_element(b_NJ * inverse_NJ, k, NUMBER), b_NJ.shape)
            b_NJ = tl.where(j_1J < k, tl.fma(-c_NJ, x_NJ, b_NJ), b_NJ)
    return b_NJ * inverse_NJ, sound_N


@triton.jit(do_not_specialize=["start", "stop", "offset"])
def step_kernel(
    fisher_ptr,  # F, (rows, SIZE, SIZE), or packed (rows, SIZE (SIZE + 1) / 2); float32 or bfloat16
    momentum_ptr,  # m, (rows, SIZE), float32
    gradient_ptr,  # g, and then u, (rows, SIZE), float32
    number_ptr,  # (rows,) int32, the blocks' numbers; read where ROUNDED
    rungs_ptr,  # (rows, 3) int32, how often a block needed each rung of the ladder
    go_ptr,  # one int32; read where GATED
    start,
    stop,  # rows [start, stop)
    offset,  # of this update's seeds; see fisher.seeds
    decay,  # ρ
    gain,  # √(1 − ρ)
    weight,  # 1 − μ
    momentum_scale,
    gradient_scale,  # m̂ = momentum_scale m + gradient_scale g
    unbias,  # F̂ = unbias F
    damping,  # δ + ε
    more_damping,  # of the ladder
    eps,  # ε
    SIZE: tl.constexpr,  # r
    WIDTH: tl.constexpr,  # the power of two that r is padded to
    NUMBER: tl.constexpr,  # blocks a program
    PANEL: tl.constexpr,
    GATED: tl.constexpr,  # where go is 0, u is 0 and nothing else changes
    UPDATES: tl.constexpr,  # whether F is updated
    ROUNDED: tl.constexpr,  # F is bfloat16
    PACKED: tl.constexpr,  # F is stored as lower triangles
    BY_DIAGONAL: tl.constexpr,  # grafting="rms"
):
    """One step of the rows [start, stop): F, m and g are read once; F, m and u written once.

    A packed block is read as a whole one: element (i, j) of the tile from where (max, min) is stored. The half above
    the diagonal is not coalesced then, but comes from the cache, and the tile has its layout without a transposition.
    """
    row_N = start + tl.program_id(0).to(tl.int64) * NUMBER + tl.arange(0, NUMBER)  # 64 bits: F may have > 2³¹ elements
    i_I11, j_11J = tl.arange(0, WIDTH)[:, None, None], tl.arange(0, WIDTH)[None, None, :]
    j_1J = tl.arange(0, WIDTH)[None, :]
    there_N = row_N < stop
    there_NJ = there_N[:, None] & (j_1J < SIZE)
    there_INJ = (i_I11 < SIZE) & there_NJ[None]
    at_NJ = row_N[:, None] * SIZE + j_1J
    if PACKED:
        base_1N1 = row_N[None, :, None] * (SIZE * (SIZE + 1) // 2)
        lower_I1J, upper_I1J = ((i_I11 * (i_I11 + 1)) >> 1) + j_11J, ((j_11J * (j_11J + 1)) >> 1) + i_I11
        at_INJ = tl.multiple_of(base_1N1 + tl.where(i_I11 >= j_11J, lower_I1J, upper_I1J), [1, 1, 1])
        # The same addresses there, but worked out anew, so that those of the loads need not be kept.
        stored_at_INJ = tl.multiple_of(base_1N1 + lower_I1J, [1, 1, 1])
        stored_INJ = there_INJ & (i_I11 >= j_11J)
    else:
        at_INJ = tl.multiple_of(row_N[None, :, None] * (SIZE * SIZE) + (i_I11 * SIZE + j_11J), [1, 1, 1])
        stored_at_INJ, stored_INJ = at_INJ, there_INJ

    if GATED:
        go = tl.load(go_ptr)  # looked at below, so that nothing has to wait for it first
    g_NJ = tl.load(gradient_ptr + at_NJ, mask=there_NJ, other=0.0)
    m_NJ = tl.load(momentum_ptr + at_NJ, mask=there_NJ, other=0.0)
    f_INJ = tl.load(fisher_ptr + at_INJ, mask=there_INJ, other=0.0).to(tl.float32)

    # Several lanes or warps may hold a copy of an element of m or F; none may store it before all have loaded it.
    tl.debug_barrier()
    if GATED:  # noqa: SIM102 (decided when compiling, as the inner one is not)
        if go == 0:
            tl.store(gradient_ptr + at_NJ, tl.zeros_like(g_NJ), mask=there_NJ)
            return
    change_NJ = g_NJ - m_NJ
    m_NJ = tl.where(weight < 0.5, m_NJ + weight * change_NJ, g_NJ - (1 - weight) * change_NJ)  # as torch.lerp
    tl.store(momentum_ptr + at_NJ, m_NJ, mask=there_NJ)
    hat_NJ = m_NJ * momentum_scale + g_NJ * gradient_scale

    if UPDATES:
        # Symmetric to the last bit, and that of fisher.update where torch does not fuse the addition.
        h_NJ = g_NJ * gain
        f_INJ = decay * f_INJ + tl.trans(h_NJ)[:, :, None] * h_NJ[None]
        if ROUNDED:
            number_N = tl.load(number_ptr + row_N, mask=there_N, other=0)
            seed_N = _hash((number_N * 0x9E3779B + offset).to(tl.uint32, bitcast=True))
            pair_I1J = (tl.minimum(i_I11, j_11J) << 16) + tl.maximum(i_I11, j_11J)
            noise_INJ = _hash(_hash(pair_I1J.to(tl.uint32, bitcast=True)) ^ seed_N[None, :, None]) & 0xFFFF
            bits_INJ = (f_INJ.to(tl.uint32, bitcast=True) + noise_INJ) & 0xFFFF0000
            f_INJ = bits_INJ.to(tl.float32, bitcast=True)
            narrow_INJ = (bits_INJ >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
            tl.store(fisher_ptr + stored_at_INJ, narrow_INJ, mask=stored_INJ)
        else:
            tl.store(fisher_ptr + stored_at_INJ, f_INJ, mask=stored_INJ)

    diagonal_NJ = tl.sum(tl.where(i_I11 == j_11J, f_INJ, 0.0), axis=0)
    trace_N1 = tl.sum(diagonal_NJ, axis=1, keep_dims=True)
    mean_N1 = tl.div_rn(trace_N1, SIZE * 1.0)
    d_N1 = mean_N1 * unbias
    scale_N1 = 1.0 / tl.maximum(mean_N1, 1.1754943508222875e-38)  # the smallest normal number
    unit_N1 = tl.where(d_N1 > 0, tl.div_rn(1.0, tl.sqrt_rn(d_N1)), 1.0)
    right_NJ = hat_NJ * unit_N1
    s_NJ, sound_N = _solve(f_INJ * scale_N1[None], right_NJ, damping, SIZE, WIDTH, NUMBER, PANEL)

    if tl.min(sound_N.to(tl.int32), axis=0) == 0:
        # The ladder, for the blocks that need it: more damping, then the diagonal. F is read again, so that it need not
        # be kept, and one panel is all: slow, but little code. Without float64: what that could mend is rounding, of
        # the order of 1e-5 at most, and here the damping is 1e-2 at least.
        tl.debug_barrier()  # what other threads have stored of F
        again_INJ = tl.load(fisher_ptr + at_INJ, mask=there_INJ, other=0.0).to(tl.float32)
        more_NJ, mended_N = _solve(again_INJ * scale_N1[None], right_NJ, more_damping, SIZE, WIDTH, NUMBER, WIDTH)
        simple_NJ = right_NJ / tl.maximum(diagonal_NJ * scale_N1 + more_damping, 1e-2)
        s_NJ = tl.where(sound_N[:, None], s_NJ, tl.where(mended_N[:, None], more_NJ, simple_NJ))
        rung_N = tl.where(mended_N, 0, 2)
        tl.atomic_add(rungs_ptr + row_N * 3 + rung_N, 1, mask=there_N & ~sound_N, sem="relaxed")

    # As fisher.graft.
    by_diagonal_NJ = tl.div_rn(hat_NJ, tl.sqrt_rn(diagonal_NJ * unbias) + eps)
    norm_N1 = tl.sqrt_rn(tl.sum(s_NJ * s_NJ, axis=1, keep_dims=True))
    usable_N1 = (norm_N1 > 0) & (norm_N1 < float("inf"))
    if BY_DIAGONAL:
        seen_N1 = trace_N1 > 0
        length_N1 = tl.sqrt_rn(tl.sum(by_diagonal_NJ * by_diagonal_NJ, axis=1, keep_dims=True))
        u_NJ = s_NJ * tl.div_rn(length_N1, norm_N1)
    else:
        seen_N1 = d_N1 > 0
        u_NJ = s_NJ * unit_N1
    u_NJ = tl.where(seen_N1, tl.where(usable_N1, u_NJ, by_diagonal_NJ), 0.0)
    tl.store(gradient_ptr + at_NJ, u_NJ, mask=there_NJ)
