"""Records: an instruction set, a kind of kernel, and the places of what a call passes to a kernel. No code generation.

word       32 bits of codes: `per_word` codes of one row, consecutive k
panel      16 rows of a weight: [K / per_word, 16] words; what the layout "panels" stores one after the other
operand    what a word becomes for a dot product, `operands` of them a word: one fp32, two bf16 or four bytes of
           the codes i, i + operands, i + 2 * operands, ...; the activations stand in the same order
block      `panels` panels, the columns of y that a thread computes at once
"""

from __future__ import annotations

import dataclasses
import enum

__all__ = ["ISA_VARIABLE", "ITEM_ROWS", "PANEL", "X_SIZES", "Arg", "Isa", "Kind"]

ISA_VARIABLE = "QEXPERTS_CPU_ISA"  # names an instruction set in place of the best
PANEL = 16
X_SIZES = {"bf16": 2, "fp16": 2, "fp32": 4}  # bytes of an activation
ITEM_ROWS = 240  # of an item, at most: so often its unpacked weights are used, and a hot expert is many items
# What a code becomes when its sign bit is flipped, less the code.
_UNSIGNED = {"int8_sym": 128, "int4_sym": 8, "int2_sym": 2}


class Arg(enum.IntEnum):
    """Places of a call's 64-bit integers. Steps are bytes between neighbours."""

    NEXT, JOINED = 0, 1  # the unit of work that is free next; threads that have come to it
    X_IN, X_IN_STEP = 2, 3  # activations as they were given, by row
    X, X_STEP, X_TERM = 4, 5, 6  # packed, by row; from the high parts of a row to its low parts
    SUMS, SUMS_STEP = 7, 8  # (sum, scale) of the activations of a group, fp32 [S, groups, 2]
    CODES, CODES_E, CODES_STEP = 9, 10, 11  # by expert; by row of w (source "rows") or by k ("columns")
    SCALES, SCALES_E, SCALES_N, SCALES_G = 12, 13, 14, 15
    ZEROS = 16  # stepped as the scales
    Y, Y_STEP = 17, 18
    N, K, WORDS = 19, 20, 21
    GROUPS, GROUP_WORDS = 22, 23
    ITEMS, ITEM_COUNT, END = 24, 25, 26  # (expert, row, rows) each; first row that belongs to no expert
    COUNTS, COUNTS_WIDE, E, S = 27, 28, 29, 30
    SCRATCH, SCRATCH_STEP = 31, 32  # by thread
    BLOCK_GROUPS, CHUNK_GROUPS = 33, 34  # groups that are unpacked, or gathered for few rows, at once
    PACK, GEMM = 35, 36  # functions of the kind; 0: x needs no packing
    CAME, PLANNED = 37, 38  # threads that have come at all; whether the items are there
    PACK_NEXT, PACKED = 39, 40  # the row to pack next; rows that are packed
    WIDE = 41  # set if activations do not fit 16 bits: nothing is multiplied


@dataclasses.dataclass(frozen=True)
class Isa:
    """An instruction set.

    Attributes:
        cpu, features: as LLVM knows them.
        lanes: 32-bit values in a register.
        panels, rows: of the largest block of accumulators: rows * panels * 16 / lanes registers.
        dots: "bf16", "int8" and "int16" where it has instructions for them; "fp32" everywhere.
        halves: whether it converts between fp16 and fp32.
        near: whether what is read next is fetched into the first cache, not the second.
        gathered_bits: codes of at most so many bits are gathered into panels even for few rows (rows.py).
    """

    name: str
    cpu: str
    features: str
    lanes: int
    panels: int
    rows: int
    dots: tuple[str, ...] = ("fp32",)
    halves: bool = True
    near: bool = True
    gathered_bits: int = 0

    @property
    def direct_rows(self) -> int:
        """Rows up to which unpacking once more costs less than storing what has been unpacked."""
        return min(4, self.rows)

    @property
    def set_rows(self) -> int:
        """Rows of a set (rows.py)."""
        return 4 if self.lanes == 16 else 1


@dataclasses.dataclass(frozen=True)
class Kind:
    """Everything that decides the code of a kernel.

    Attributes:
        format, bits, asym: of the weight.
        x, y: "bf16", "fp16" or "fp32".
        dot: "bf16", "fp32", "int8" or "int16".
        int8: activations are quantized to 8 bits by row and group, whatever the dot product.
        scale: dtype of scales and zeros, "" for none.
        scale_access: "vector" (n contiguous), "strided", "tensor" or "block128".
        source: order of the codes: "panels", "rows" ([N, K] as given) or "columns" ([K, N]).
        panels: isa.panels, or 1 where N is less than as many times 16.
        row_words: words of a group, where few rows are multiplied with the rows of a weight as they lie (rows.py); 0
            where those are gathered into panels.
    """

    isa: Isa
    format: str
    bits: int
    asym: bool
    x: str
    y: str
    dot: str
    int8: bool
    scale: str
    scale_access: str
    source: str
    panels: int
    row_words: int = 0

    def deciding(self, part: str) -> Kind:
        """The kind with defaults in place of what makes no difference to a part, so that kinds share its code."""
        if part == "run":
            return Kind(self.isa, "", 8, False, "bf16", "bf16", "fp32", False, "", "", "panels", 1)
        if part == "pack":
            return dataclasses.replace(
                self, y="bf16", scale="", scale_access="", source="panels", panels=1, row_words=0
            )
        return self

    @property
    def per_word(self) -> int:
        return 32 // self.bits

    @property
    def operands(self) -> int:
        return self.per_word // {"fp32": 1, "bf16": 2, "int8": 4, "int16": 2}[self.dot]

    @property
    def terms(self) -> int:
        """bf16 numbers that an activation is the sum of."""
        return 2 if self.dot == "bf16" and self.x == "fp16" else 1

    @property
    def x_words(self) -> int:
        """32-bit values of a row of activations, packed, to a word of codes."""
        return self.operands * self.terms

    @property
    def steps(self) -> int:
        """What the largest activation of a row and group is rounded to an integer as; 0 if it is not."""
        return 127 if self.int8 else 32767 if self.dot == "int16" else 0

    @property
    def whole(self) -> bool:
        """Whether products are added as integers."""
        return self.dot.startswith("int")

    @property
    def registers(self) -> int:
        """Of a row of a block."""
        return self.panels * PANEL // self.isa.lanes

    @property
    def offset(self) -> int:
        """A code as the dot product sees it, less the code itself."""
        if self.dot == "int16" and self.bits == 8:
            return 0
        if self.whole:
            return _UNSIGNED.get(self.format, 0)
        return -128 if self.dot == "bf16" and self.format == "int8_asym" else 0

    @property
    def shifted(self) -> bool:
        """Whether a zero point (or offset) times the sum of the activations is subtracted from a group's sum."""
        return self.dot != "fp32" and (self.asym or self.offset != 0)

    @property
    def subtracts(self) -> bool:
        """Whether zero points are subtracted from the codes themselves, as fp32's error rule needs."""
        return self.dot == "fp32" and self.asym

    @property
    def parts(self) -> int:
        """fp32 vectors of a group of a panel: scales, and zeros with their sign turned."""
        return 1 + (self.shifted or self.subtracts)

    def scratch_bytes(self, gathered_words: int, words: int, groups: int, block_words: int) -> int:
        """Of a thread: the scales of a block, its sums, and its operands and words in the order of "panels", or what
        few rows are multiplied from (`rows_bytes`)."""
        line = self.panels * PANEL * 4
        gathered = 0 if self.source == "panels" else gathered_words * line
        scales = groups * self.parts * line if self.scale else 0
        rows = self.isa.direct_rows * sum(self.rows_bytes(words, groups))
        return scales + ITEM_ROWS * line + max(gathered + block_words * self.operands * line, rows)

    def rows_bytes(self, words: int, groups: int) -> tuple[int, int]:
        """Of a row of activations as `RowKernels.arrange` leaves it, and of its partial sums."""
        if not self.row_words:
            return 0, 0
        segments = groups * min(self.row_words, self.set_words) // self.set_words
        return words * self.x_words * 4, segments * self.part_rows // self.isa.set_rows * self.isa.lanes * 4

    @property
    def set_words(self) -> int:
        """Words of each row of a set in a register (rows.py)."""
        return self.isa.lanes // self.isa.set_rows

    @property
    def part_rows(self) -> int:
        """Rows of a part (rows.py)."""
        return self.panels * PANEL if self.isa.set_rows > 1 else self.isa.lanes

    @property
    def sums(self) -> bool:
        """Whether anything is known of the activations of each group."""
        return self.shifted or self.steps > 0

    @property
    def packs_x(self) -> bool:
        """Whether activations are read in another form than they are given in."""
        as_given = self.x == self.dot and (self.dot == "fp32" or self.operands == 1)
        return self.sums or not as_given
