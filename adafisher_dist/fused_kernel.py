"""The Triton kernel behind `fused`: one step of dense blocks with p = 1. Import it only where Triton is installed.

Shape suffixes: N blocks of this program, D vectors of a block, I rows and J columns of its Fisher. Tiles are (I, N, J)
and (D, N, J), in that order, for the sake of where their elements lie. Triton deals the last dimension out to the lanes
of a warp (and at 128 to its warps), then N, and leaves I and D to the registers: a thread holds whole columns. (Where a
program has several warps, each solves for vectors of its own.) Where D is 1, tiles do not have it. So

- row k of A, which each step of the elimination needs, is in registers; nothing is reduced across lanes to get at it;
- the same numbers are column k, since A is symmetric; each thread needs all of them: one broadcast through shared
  memory (a vector, never a tile);
- the right-hand sides, a block's D vectors, go along like more rows of A; only of them is column k in one lane, which
  sends it round by a shuffle a vector;
- a load or store of F is 32 neighbours of a row: coalesced, and in this layout already, so the tile is never
  converted. For that the hint `multiple_of(…, 1)` keeps Triton from loads of 16 bytes, which would change the layout,
  and which rows of odd length do not allow anyway;
- a block of up to 64 has one warp (with more than 16 vectors two), and so no other to wait for; a step is a chain of
  shuffle, division and multiply-add, and blocks hide each other's.

What Triton 3.9 makes of it for sm_90, counted in its code and by executing its PTX in an emulator; never measured on a
GPU. Warp instructions a block, beside what an H100's SM can issue while the block's bytes (F, m, g in; F, m, u out)
pass at 3 TB/s. The ladder is not counted, nor are the gate (a load and a branch) and packed blocks, which were added
later and make the code up to 8 % longer, nor the stretch of
an update (three sums a vector). Triton 3.3 to 3.6 make slower code for sizes up to 16.

    block  registers  warps an SM  instructions (fp32, bf16)  budget (fp32, bf16)  compiled in
        8         96           21         160,     200             200,     120            1 s
       16         96           21         570,     740             710,     390            1 s
       32        128           16       2 300,   3 000           2 700,   1 400            2 s
       48        168           12       9 600,  12 000           5 900,   3 100            6 s
       64        200           10      13 700,  16 500          10 400,   5 400            8 s
      128        255            8     114 000, 129 000          41 100,  20 900           13 s

With 16 vectors a block (and w in and out), counted in the machine code alone: straight parts once, loops as often as
they run, and not at all the calls for operands out of a division's ordinary range. (Of one vector that gives 140, 550,
2 200, 9 300, 13 100 and 104 000.) In the end what an element takes, beside that of blocks with one vector:

    block  registers  warps an SM  instructions (fp32, bf16)  budget (fp32, bf16)  an element (fp32)
        8        104           19         840,     890             830,     750            6.6,  18
       16        112           18       2 300,   2 500           1 900,   1 600            9.1,  34
       32        128           16       7 900,   8 600           5 100,   3 800             15,   69
       48        224            9      21 500,  23 900           9 500,   6 700             28,  193
       64        255            8      28 200,  30 900          15 200,  10 200             28,  205
      128        255            8     137 000, 146 000          50 600,  30 400             67,  816
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
def _fma(x, y, z):
    """The sum x y + z, rounded once; x and y are broadcast to z's shape."""
    return tl.fma(tl.broadcast(x, z)[0], tl.broadcast(y, z)[0], z)


@triton.jit
def _lerp(x, y, weight):
    """As torch.lerp."""
    change = y - x
    return tl.where(weight < 0.5, x + weight * change, y - (1 - weight) * change)


@triton.jit
def _row(a_INJ, i_I11, k, FIRST: tl.constexpr, STOP: tl.constexpr):
    """Row k of each block, (N, J); k is known to be in [FIRST, STOP), so only those registers are looked at."""
    return tl.sum(tl.where((i_I11 >= FIRST) & (i_I11 < STOP) & (i_I11 == k), a_INJ, 0.0), axis=0)


@triton.jit
def _element(x_DNJ, k):
    """Element k of each vector, (D, N, 1)."""
    # Zeros of that shape, whose sum no compiler makes: Triton 3.6 builds no shape out of another one's parts.
    first_DN1 = tl.zeros_like(tl.sum(x_DNJ, axis=-1, keep_dims=True)).to(tl.int32)
    return tl.gather(x_DNJ, first_DN1 + k, axis=-1)


@triton.jit
def _solve(a_INJ, b_DNJ, damping, SIZE: tl.constexpr, WIDTH: tl.constexpr, PANEL: tl.constexpr):
    """Solve (A + damping I) x = b by L D Lᵀ, for all the vectors b of a block.

    Returns x_DNJ, and whether all pivots were positive and finite, (N,).

    Right-looking: step k takes c cᵀ/pivot from the rest, c being row k, and the right-hand sides go along. Elements of
    c up to k are set to zero first. So rows and columns up to k stay as they were in their own step, without a mask on
    the tile: row k keeps pivot · L's column to the right of the diagonal, and the earlier steps' to the left of it,
    which is what the way back needs. L D Lᵀ rather than Cholesky: no square root in the chain of a step. The damping is
    added to the pivots, since nothing else reads the diagonal: B² additions less, and rounded later.

    A loop over `PANEL` rows at a time: the panel is known when compiling, so finished rows and padding cost nothing
    (half of the arithmetic), while k within it is not, so that the code stays short (a few thousand instructions) and
    compiles in seconds. The price is PANEL selects to find row k.
    """
    i_I11, j_1J = tl.arange(0, WIDTH)[:, None, None], tl.arange(0, WIDTH)[None, :]
    inverse_NJ = tl.zeros((a_INJ.shape[1], WIDTH), tl.float32)  # of the pivots
    for first in tl.static_range(0, SIZE, PANEL):
        for k in range(first, min(first + PANEL, SIZE)):
            c_NJ = _row(a_INJ, i_I11, k, first, min(first + PANEL, SIZE))
            inverse_N1 = 1.0 / (_element(c_NJ, k) + damping)
            inverse_NJ = tl.where(j_1J == k, inverse_N1, inverse_NJ)
            c_NJ = tl.where(j_1J > k, c_NJ, 0.0)
            w_NJ = c_NJ * -inverse_N1
            b_DNJ = _fma(w_NJ, _element(b_DNJ, k), b_DNJ)
            less_INJ = _fma(tl.trans(c_NJ)[:, :, None], w_NJ[None], a_INJ)
            a_INJ = tl.where((i_I11 >= first) & (i_I11 < SIZE), less_INJ, a_INJ)
    # Not positive, NaN, or so large or small that its inverse is 0 or infinite.
    sound_NJ = ((inverse_NJ > 0) & (inverse_NJ < float("inf"))) | (j_1J >= SIZE)
    sound_N = tl.min(sound_NJ.to(tl.int32), axis=1) > 0
    for first in tl.static_range((SIZE - 1) // PANEL * PANEL, -1, -PANEL):
        for after in range(0, min(first + PANEL, SIZE) - first):
            k = min(first + PANEL, SIZE) - 1 - after
            c_NJ = _row(a_INJ, i_I11, k, first, min(first + PANEL, SIZE))
            x_DN1 = _element(b_DNJ * inverse_NJ, k)
            b_DNJ = tl.where(j_1J < k, _fma(-c_NJ, x_DN1, b_DNJ), b_DNJ)
    return b_DNJ * inverse_NJ, sound_N


@triton.jit(do_not_specialize=["start", "stop", "offset"])
def step_kernel(
    fisher_ptr,  # F, (rows, SIZE, SIZE), or packed (rows, SIZE (SIZE + 1) / 2); float32 or bfloat16
    momentum_ptr,  # m, (rows, DEPTH, SIZE), float32
    gradient_ptr,  # g, and then u, (rows, DEPTH, SIZE), float32
    square_ptr,  # w, (rows, DEPTH), float32; read where DEPTH > 1
    length_ptr,  # L, (rows,), float32
    number_ptr,  # (rows,) int32, the blocks' numbers; read where ROUNDED
    rungs_ptr,  # (rows, 3) int32, how often a block needed each rung of the ladder
    go_ptr,  # one int32: where it is 0, u is 0 and nothing else changes
    start,
    stop,  # rows [start, stop)
    offset,  # of this update's seeds; see fisher.seeds
    decay,  # ρ
    gain,  # √((1 − ρ) / D)
    fisher_weight,  # 1 − ρ
    weight,  # 1 − μ
    momentum_scale,
    gradient_scale,  # m̂ = momentum_scale m + gradient_scale g
    unbias,  # F̂ = unbias F
    damping,  # δ + ε
    more_damping,  # of the ladder
    eps,  # ε
    reach,  # fisher.reach
    LARGEST_STRETCH: tl.constexpr,  # fisher.LARGEST_STRETCH
    SIZE: tl.constexpr,  # r
    WIDTH: tl.constexpr,  # the power of two that r is padded to
    DEPTH: tl.constexpr,  # D
    DEEP: tl.constexpr,  # the power of two that D is padded to
    NUMBER: tl.constexpr,  # blocks a program
    PANEL: tl.constexpr,
    UPDATES: tl.constexpr,  # whether F is updated
    ROUNDED: tl.constexpr,  # F is bfloat16
    PACKED: tl.constexpr,  # F is stored as lower triangles
    BY_DIAGONAL: tl.constexpr,  # grafting="rms"
):
    """One step of the rows [start, stop): F, m, w and g are read once; F, m, w and u written once.

    A packed block is read as a whole one: element (i, j) of the tile from where (max, min) is stored. The half above
    the diagonal is not coalesced then, but comes from the cache, and the tile has its layout without a transposition.
    """
    row_N = start + tl.program_id(0).to(tl.int64) * NUMBER + tl.arange(0, NUMBER)  # 64 bits: F may have > 2³¹ elements
    i_I11, j_11J = tl.arange(0, WIDTH)[:, None, None], tl.arange(0, WIDTH)[None, None, :]
    j_1J = tl.arange(0, WIDTH)[None, :]
    there_N = row_N < stop
    there_NJ = there_N[:, None] & (j_1J < SIZE)
    there_INJ = (i_I11 < SIZE) & there_NJ[None]
    at_NJ = row_N[:, None] * (DEPTH * SIZE) + j_1J
    if DEPTH == 1:  # then there is no dimension D
        at_DNJ, there_DNJ = at_NJ, there_NJ
    else:
        vector_D11 = tl.arange(0, DEEP)[:, None, None]
        at_DNJ = tl.multiple_of(row_N[None, :, None] * (DEPTH * SIZE) + (vector_D11 * SIZE + j_11J), [1, 1, 1])
        at_DN1 = row_N[None, :, None] * DEPTH + vector_D11
        there_DN1 = (vector_D11 < DEPTH) & there_N[:, None]
        there_DNJ = there_DN1 & (j_1J < SIZE)
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

    go = tl.load(go_ptr)  # looked at below, so that nothing has to wait for it first
    g_DNJ = tl.load(gradient_ptr + at_DNJ, mask=there_DNJ, other=0.0)
    m_DNJ = tl.load(momentum_ptr + at_DNJ, mask=there_DNJ, other=0.0)
    if DEPTH > 1:
        square_DN1 = tl.load(square_ptr + at_DN1, mask=there_DN1, other=0.0)
    f_INJ = tl.load(fisher_ptr + at_INJ, mask=there_INJ, other=0.0).to(tl.float32)

    # Several lanes or warps may hold a copy of an element of m, w or F; none may store it before all have loaded it.
    tl.debug_barrier()
    if go == 0:
        tl.store(gradient_ptr + at_DNJ, tl.zeros_like(g_DNJ), mask=there_DNJ)
        return
    m_DNJ = _lerp(m_DNJ, g_DNJ, weight)
    tl.store(momentum_ptr + at_DNJ, m_DNJ, mask=there_DNJ)
    hat_DNJ = m_DNJ * momentum_scale + g_DNJ * gradient_scale

    if UPDATES:
        # Symmetric to the last bit; of one vector that of fisher.update where torch does not fuse the addition.
        if DEPTH == 1:
            h_NJ = g_DNJ * gain
            f_INJ = decay * f_INJ + tl.trans(h_NJ)[:, :, None] * h_NJ[None]
        else:
            f_INJ = decay * f_INJ
            for vector in range(DEPTH):  # each is loaded again, since registers cannot be picked by number
                h_NJ = tl.load(gradient_ptr + at_NJ + vector * SIZE, mask=there_NJ, other=0.0) * gain
                f_INJ = _fma(tl.trans(h_NJ)[:, :, None], h_NJ[None], f_INJ)
            square_DN1 = _lerp(square_DN1, tl.sum(g_DNJ * g_DNJ, axis=-1, keep_dims=True) / SIZE, fisher_weight)
            tl.store(square_ptr + at_DN1, square_DN1, mask=there_DN1)
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
    right_DNJ = hat_DNJ * unit_N1
    s_DNJ, sound_N = _solve(f_INJ * scale_N1[None], right_DNJ, damping, SIZE, WIDTH, PANEL)

    if tl.min(sound_N.to(tl.int32), axis=0) == 0:
        # The ladder, for the blocks that need it: more damping, then the diagonal. F is read again, so that it need not
        # be kept, and one panel is all: slow, but little code. Without float64: what that could mend is rounding, of
        # the order of 1e-5 at most, and here the damping is 1e-2 at least.
        tl.debug_barrier()  # what other threads have stored of F
        again_INJ = tl.load(fisher_ptr + at_INJ, mask=there_INJ, other=0.0).to(tl.float32)
        more_DNJ, mended_N = _solve(again_INJ * scale_N1[None], right_DNJ, more_damping, SIZE, WIDTH, WIDTH)
        simple_DNJ = right_DNJ / tl.maximum(diagonal_NJ * scale_N1 + more_damping, 1e-2)
        s_DNJ = tl.where(sound_N[:, None], s_DNJ, tl.where(mended_N[:, None], more_DNJ, simple_DNJ))
        rung_N = tl.where(mended_N, 0, 2)
        tl.atomic_add(rungs_ptr + row_N * 3 + rung_N, 1, mask=there_N & ~sound_N, sem="relaxed")

    # As fisher.second_moment and fisher.graft.
    if DEPTH == 1:
        root_DNJ = tl.sqrt_rn(diagonal_NJ * unbias)
        seen_DN1 = trace_N1 > 0
    else:
        ratio_DN1 = square_DN1 * unbias / tl.maximum(d_N1, 1.1754943508222875e-38)
        root_DNJ = tl.sqrt_rn(ratio_DN1) * tl.sqrt_rn(diagonal_NJ * unbias)
        seen_DN1 = ratio_DN1 * d_N1 > 0
    by_diagonal_DNJ = tl.div_rn(hat_DNJ, root_DNJ + eps)
    norm_DN1 = tl.sqrt_rn(tl.sum(s_DNJ * s_DNJ, axis=-1, keep_dims=True))
    usable_DN1 = (norm_DN1 > 0) & (norm_DN1 < float("inf"))
    if BY_DIAGONAL:
        length_DN1 = tl.sqrt_rn(tl.sum(by_diagonal_DNJ * by_diagonal_DNJ, axis=-1, keep_dims=True))
        progress_DN1 = tl.div_rn(tl.sum(right_DNJ * s_DNJ, axis=-1, keep_dims=True), norm_DN1)
        wanted_DN1 = tl.div_rn(tl.sum(right_DNJ * by_diagonal_DNJ, axis=-1, keep_dims=True), length_DN1)
        length_N = tl.load(length_ptr + row_N, mask=there_N, other=1.0)
        most_N = tl.minimum(tl.div_rn(reach, length_N), LARGEST_STRETCH)
        stretch_DN1 = tl.minimum(tl.maximum(tl.div_rn(wanted_DN1, progress_DN1), 1.0), most_N[:, None])
        u_DNJ = s_DNJ * (tl.div_rn(length_DN1, norm_DN1) * stretch_DN1)
    else:
        seen_DN1 = d_N1 > 0
        u_DNJ = s_DNJ * unit_N1
    u_DNJ = tl.where(seen_DN1, tl.where(usable_DN1, u_DNJ, by_diagonal_DNJ), 0.0)
    tl.store(gradient_ptr + at_DNJ, u_DNJ, mask=there_DNJ)
