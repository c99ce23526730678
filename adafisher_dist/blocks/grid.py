"""How one parameter is cut into blocks: closed formulas in integers, no object for each block."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from adafisher_dist.settings import StateConfig

# The longest side of a convolution's window. Longer dimensions at the end of a shape are inputs.
LARGEST_WINDOW = 32

# A matrix whose one side is more than so many times the other is a table (of tokens, of few
# outputs, of adapters): its elements are alone, as Adam's. Hidden layers are mostly up to 8 times
# as wide as high. So are the tables of vocabularies of 32,000 and a few tokens in wide models; few
# hidden layers have that length.
LARGEST_RATIO = 8
LARGEST_RATIO_OF_VOCABULARIES = 4
VOCABULARIES = range(30_000, 33_001)

# Tables as wide as this, of which a model has so many of one shape, may be hidden layers.
LEAST_WIDTH_OF_LAYERS = 512
LEAST_NUMBER_OF_LAYERS = 3

# The settings that tell how a parameter is cut: arguments of `make_grid`.
GRID_SETTINGS = ("block_size", "rows_per_block", "block_grid", "max_blocks")


class BlockShape(NamedTuple):
    """Shape of a block: elements of a row, rows that share a Fisher, whether that is a matrix."""

    columns: int
    rows: int
    dense: bool

    @property
    def name(self) -> str:
        """As state dicts have it: "64", "64x16", or "diagonal"."""
        if not self.dense:
            return "diagonal"
        return str(self.columns) if self.rows == 1 else f"{self.columns}x{self.rows}"


@dataclass(frozen=True, slots=True)
class BlockRun:
    """Blocks of one shape, evenly spaced in the flattened parameter: `count` in each row group.

    Row v of block c of row group s begins at element start + s·stride + c·columns + v·row_stride. A
    run that is not dense stands for elements with a diagonal Fisher: its shape is (1, 1), and
    `count` counts elements.

    Attributes:
        shape: of the blocks.
        start: the first element.
        row_groups: that it goes through.
        stride: elements from one row group to the next.
        row_stride: elements from one row of a block to the next.
        count: blocks in a row group.
        first_block: number of the first block.
        blocks_per_row_group: from one row group to the next.
    """

    shape: BlockShape
    start: int
    row_groups: int
    stride: int
    row_stride: int
    count: int
    first_block: int
    blocks_per_row_group: int

    @property
    def num_blocks(self) -> int:
        """Blocks in the run."""
        return self.row_groups * self.count


@dataclass(frozen=True, slots=True)
class Grid:
    """A parameter's blocks.

    The flattened parameter is a sequence of matrices of `matrix_numel` elements, each of rows of
    `row_numel` elements. `rows` of them make a row group (the last one of a matrix may have fewer),
    which is what ranks own: it is never shared out. Within a row group the rows are cut at the same
    places, every `columns` elements: each cut is one block, whose Fisher is shared by the group's
    rows. Blocks are numbered one row group after the other. Those of the row groups from
    `dense_row_groups` on keep a diagonal Fisher.

    Only where there is one matrix, `rows` is 1 and rows are not cut may the last row be short.
    """

    numel: int
    matrix_numel: int
    row_numel: int
    columns: int
    rows: int
    dense_row_groups: int

    @property
    def pieces(self) -> int:
        """Blocks in a row group."""
        return -(-self.row_numel // self.columns)

    @property
    def row_groups(self) -> int:
        """Row groups, dense and diagonal ones."""
        return self.numel // self.matrix_numel * self.row_groups_per_matrix

    @property
    def row_groups_per_matrix(self) -> int:
        """Row groups of each matrix, of which the last may have fewer rows."""
        return -(-self.matrix_numel // (self.row_numel * self.rows))

    @property
    def num_blocks(self) -> int:
        """Dense and diagonal blocks."""
        return self.row_groups * self.pieces

    @property
    def dense_blocks(self) -> int:
        """Blocks that have a matrix."""
        return self.dense_row_groups * self.pieces

    def start(self, row_group: int) -> int:
        """First element of a row group; `numel` for the one past the last."""
        matrix, own = divmod(row_group, self.row_groups_per_matrix)
        return min(self.numel, matrix * self.matrix_numel + own * self.row_numel * self.rows)

    def row_group_from(self, element: int) -> int:
        """The first row group that starts at or after `element`."""
        matrix, own = divmod(element, self.matrix_numel)
        return matrix * self.row_groups_per_matrix + -(-own // (self.row_numel * self.rows))

    def row_groups_before(self, element: int) -> int:
        """How many row groups end at or before `element`."""
        row_group = self.row_group_from(element)
        return row_group if self.start(row_group) == element else row_group - 1

    def fisher_numel(self, row_group: int) -> int:
        """Elements of the Fisher in the row groups before `row_group`: they measure the work."""
        dense = min(row_group, self.dense_row_groups)
        whole = self._whole_fisher_numel
        missing = whole - self._tail**2 if dense * self.row_numel > self.numel and self.rows == 1 else 0
        return dense * whole - missing + self.start(row_group) - self.start(dense)

    def row_group_of_fisher_numel(self, amount: int) -> int:
        """The first row group whose predecessors hold at least `amount` elements of the Fisher."""
        of_dense = self.fisher_numel(self.dense_row_groups)
        if amount <= of_dense:
            return min(self.dense_row_groups, -(-amount // max(1, self._whole_fisher_numel)))
        return min(self.row_groups, self.row_group_from(amount - of_dense + self.start(self.dense_row_groups)))

    def runs(self, start: int, stop: int) -> Iterator[BlockRun]:
        """Runs of the blocks of elements [start, stop), those of each shape in order.

        Row groups have to begin at both `start` and `stop`.
        """
        first, last = self.row_group_from(start), self.row_group_from(stop)
        dense_last = max(first, min(last, self.dense_row_groups))
        whole, rest = divmod(self.matrix_numel, self.row_numel * self.rows)
        if not rest:
            yield from self._pieces(first, dense_last, self.row_numel, self.rows)
        each = self.row_groups_per_matrix
        for begin in range(first // each * each, dense_last if rest else 0, each):  # matrix by matrix
            yield from self._pieces(max(first, begin), min(dense_last, begin + whole), self.row_numel, self.rows)
            if first <= begin + whole < dense_last:  # the last row group has fewer rows, or a shorter one
                row_numel, rows = min(self.row_numel, rest), max(1, rest // self.row_numel)
                yield from self._pieces(begin + whole, begin + each, row_numel, rows)
        if dense_last < last:
            begin = self.start(dense_last)
            count = stop - begin
            yield BlockRun(BlockShape(1, 1, False), begin, 1, count, 1, count, dense_last * self.pieces, 0)

    def blocks_by_shape(self, stop: int) -> Counter[BlockShape]:
        """How many blocks of each shape lie before element `stop`, where a row group begins."""
        blocks: Counter[BlockShape] = Counter()
        for run in self.runs(0, stop):
            blocks[run.shape] += run.num_blocks
        return blocks

    @property
    def _whole_fisher_numel(self) -> int:
        """Elements of the Fisher in a dense row group whose rows are whole."""
        return (self.pieces - 1) * self.columns**2 + self._last**2

    @property
    def _last(self) -> int:
        """Elements of a row's last piece."""
        return self.row_numel - (self.pieces - 1) * self.columns

    @property
    def _tail(self) -> int:
        """Elements of the last row, where it may be short."""
        return self.numel - (self.row_groups - 1) * self.row_numel

    def _pieces(self, first: int, stop: int, row_numel: int, rows: int) -> Iterator[BlockRun]:
        """The blocks of row groups [first, stop), of so many rows of `row_numel` elements each."""
        if first >= stop:
            return
        begin, block, stride = self.start(first), first * self.pieces, self.row_numel * self.rows
        whole, rest = divmod(row_numel, self.columns)
        for columns, count, offset in ((self.columns, whole, 0), (rest, 1, whole * self.columns)):
            if columns and count:
                shape = BlockShape(columns, rows, True)
                number = block + offset // self.columns
                yield BlockRun(shape, begin + offset, stop - first, stride, row_numel, count, number, self.pieces)


def make_grid(
    shape: Sequence[int],
    block_size: int,
    rows_per_block: int = 1,
    block_grid: str = "rows",
    max_blocks: int | None = None,
    table: bool | None = None,
) -> Grid:
    """The grid of a parameter of this shape (DESIGN.md, section 2: `rows` and `flat`).

    `table`: whether it is one; None: as its shape tells.
    """
    numel = prod(shape)
    matrices, total, row_numel = view(shape) if numel else (1, 0, 0)
    table = is_table(shape) if table is None else table
    if block_grid == "rows" and max_blocks is None and table:
        matrices, total, row_numel = 1, 1, numel
    matrix_numel, rows = max(1, numel // matrices), 1
    if block_grid == "rows" and total == 1:  # a vector's elements are alone, each with a diagonal Fisher
        max_blocks = 0
    if block_grid == "flat" or total <= 1:
        matrix_numel, row_numel, columns = max(1, numel), block_size, block_size
    elif rows_per_block == 1 and matrices == 1 and row_numel < block_size:
        row_numel = columns = block_size // row_numel * row_numel
    else:
        rows = _even(total, rows_per_block)
        # A matrix of few rows has smaller blocks, so that its Fisher takes no more memory an
        # element than another's.
        most = rows * max(block_size, 2 * rows_per_block) // rows_per_block
        columns = _even(row_numel, min(block_size, most))
    row_groups = Grid(numel, matrix_numel, row_numel, columns, rows, 0).row_groups
    dense = row_groups if max_blocks is None else min(row_groups, max_blocks // -(-row_numel // columns))
    return Grid(numel, matrix_numel, row_numel, columns, rows, dense)


def grid_of(shape: Sequence[int], config: StateConfig, whole: Sequence[int] | None = None) -> Grid:
    """The blocks of a parameter of this shape, with the settings of its group.

    A part of a parameter of shape `whole` is a table if that is one.
    """
    table = None if whole is None else is_table(whole)
    return make_grid(shape, config.block_size, config.rows_per_block, config.block_grid, config.max_blocks, table)


def view(shape: Sequence[int]) -> tuple[int, int, int]:
    """A parameter as matrices: their number, rows, and elements of a row (DESIGN.md, section 2).

    Dimensions of 1 do not count. What is left is a vector (one matrix of one row); a matrix; or
    more dimensions, of which short ones at the end are a convolution's window and belong to its
    row, and those before the last two stack matrices, as of experts.
    """
    left = [size for size in shape if size != 1]
    window = 1
    while len(left) > 2 and left[-1] <= LARGEST_WINDOW:
        window *= left.pop()
    if len(left) < 2:
        return 1, 1, prod(left) * window
    return prod(left[:-2]), left[-2], left[-1] * window


def is_table(shape: Sequence[int]) -> bool:
    """Whether a parameter of this shape is a vector or a table, whose elements are alone."""
    short, long = sorted(view(shape)[1:])
    return long > (LARGEST_RATIO_OF_VOCABULARIES if long in VOCABULARIES else LARGEST_RATIO) * short


def doubtful_tables(shapes: Sequence[Sequence[int]]) -> list[tuple[tuple[int, ...], int]]:
    """Shapes of tables that are many and wide, so that they may be hidden layers.

    With each the number of matrices, of which a parameter may be a stack.
    """
    counts: Counter[tuple[int, ...]] = Counter()
    for shape in shapes:
        counts[tuple(shape)] += view(shape)[0] if is_table(shape) else 0
    most = [(shape, count) for shape, count in counts.items() if count >= LEAST_NUMBER_OF_LAYERS]
    return [(shape, count) for shape, count in most if min(view(shape)[1:]) >= LEAST_WIDTH_OF_LAYERS]


def _even(total: int, most: int) -> int:
    """Length of the fewest, most equal parts of at most `most`; only the last may be shorter."""
    return -(-total // -(-total // most))
