"""Scales and codes of the Gluon prefill, from words in registers to pairs of values: see `hopper_prefill.py`.

    w = (code - zero) * scale, rounded once to the activations' dtype

Scales may have another dtype than the activations, and are then not rounded to it: results have the bits of
`dequant.py`. A slot of the weight has a row of 128 words for each group of its 128 k, and another one of zero points
where these do not fit into the same word, beside scales in fp32. Rows of the weight and glossary as there.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .dequant import both, code_bits, fast_assembly, fast_exponent, fast_operands_assembly, is_asym

__all__ = ["groups_of", "operands_of", "pairs_exponent", "pairs_of", "scale_rows", "scales_of"]

# scales of a block, [(warp, lh1, lh2), (lh0, rep, rh)]
SCALES = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 1], [0, 2]], [[0, 0], [0, 0], [0, 4], [2, 0], [1, 0]], [[4, 0], [8, 0]], [], [16, 8]
    )
)


@triton.constexpr_function
def groups_of(group):  # type: ignore[no-untyped-def]
    """Scales of a row of a block, at least one."""
    return max(128 // group, 1)


@triton.constexpr_function
def scale_rows(fmt, scale, group):  # type: ignore[no-untyped-def]
    """Rows of 128 words in a slot: scales of each group, with their zero points if they have 16 bits."""
    return groups_of(group) * (2 if is_asym(fmt) and scale == gl.float32 else 1)


@triton.constexpr_function
def _product(fmt: str, scale: tl.dtype, dtype: tl.dtype) -> str:
    """How a code is multiplied by a scale, to be rounded once like the exact product.

    "" in the dtype of both. "two": an fp16 scale is the sum of two bf16 values, the second of 3 bits; its product with
    a code of up to 5 bits is exact in bf16 and the addend of the other's. "fp32", rounded to that first.
    """
    if scale == dtype:
        return ""
    return "two" if scale == tl.float16 and not fmt.startswith("int8") else "fp32"


@triton.constexpr_function
def pairs_exponent(fmt: str, scale: tl.dtype, dtype: tl.dtype) -> int:
    """What `pairs_of` makes is this power of two too small."""
    return fast_exponent() if dtype == tl.bfloat16 and _product(fmt, scale, dtype) != "fp32" else 0


@triton.constexpr_function
def _pairs_assembly(fmt: str, step: int, steps: int, scale: tl.dtype, dtype: tl.dtype) -> str:
    """`fast_assembly` for pairs of equal words, scales and addends: a register of two values for each pair.

    step, steps: of 16 k, the first in the word and how many.
    """
    return fast_assembly(fmt, (step, step + steps), dtype == tl.bfloat16, _product(fmt, scale, dtype))


@triton.constexpr_function
def _word_assembly(fmt: str, scale: tl.dtype, dtype: tl.dtype) -> str:
    """What `_pairs_assembly` takes, $0, $1, $2, of a prepared scale, $3: scale in the low half, in the high half zero
    point or scale again; fp32 scales have their zero point in $4. "two": $0, $1 are the two values."""
    product = _product(fmt, scale, dtype)
    operands = fast_operands_assembly(fmt, dtype == tl.bfloat16 and product != "fp32")
    operands = operands.replace("$3", "s").replace("$4", "z")
    if not product:
        return _same_assembly(fmt, dtype == tl.bfloat16, operands)
    s, z = {
        tl.float16: ("cvt.f32.f16 s, l;", "cvt.f32.f16 z, h;"),
        tl.bfloat16: ("shl.b32 s, $3, 16;", "and.b32 z, $3, 0xffff0000;"),
        tl.float32: ("mov.b32 s, $3;", "mov.b32 z, $4;"),
    }[scale]
    asm = "{.reg .b16 l, h; .reg .b32 s, z, f; mov.b32 {l, h}, $3;" + s
    if product == "fp32":
        if is_asym(fmt):
            asm += f"{z} mov.b32 f, {_power(10, -1)}; sub.rn.f32 z, f, z; cvt.rn.f16x2.f32 z, z, z;"
        return asm + operands + "}"
    down = -fast_exponent()
    up = {"fp8_e4m3": 120, "fp8_e5m2": 112}.get(fmt, -down)
    asm += f"mov.b32 f, {_power(up + down)}; mul.rn.f32 s, s, f; cvt.rn.bf16x2.f32 $0, s, s;"
    asm += "and.b32 f, $0, 0xffff0000; sub.rn.f32 s, s, f; cvt.rn.bf16x2.f32 $1, s, s;"
    if is_asym(fmt):
        return asm + f"{z} mov.b32 f, {_power(down, -1)}; mul.rn.f32 z, z, f; cvt.rn.bf16x2.f32 $2, z, z;}}"
    return asm + f"mov.b32 $2, {both(-(2.0 ** (down + code_bits(fmt) - 1)), True)};}}"


@triton.constexpr_function
def _same_assembly(fmt: str, bf16: bool, operands: str) -> str:
    """The same where scales have the dtype of the result."""
    if not is_asym(fmt):
        return "{.reg .b32 s; mov.b32 s, $3;" + operands + "}"
    one, magic = both(-1.0, bf16), both((128.0 if fmt.startswith("int8") else -128.0) if bf16 else -1024.0, bf16)
    t = "bf16x2" if bf16 else "f16x2"
    return (
        "{.reg .b32 s, z, f, g; prmt.b32 s, $3, $3, 0x1010; prmt.b32 z, $3, $3, 0x3232;"
        f"mov.b32 f, {one}; mov.b32 g, {magic}; fma.rn.{t} z, z, f, g;" + operands + "}"
    )


@triton.constexpr_function
def _power(exponent: int, sign: int = 1) -> str:
    """A power of two in fp32."""
    return hex((sign < 0) << 31 | (127 + exponent) << 23)


@gluon.jit
def _row(ss, i, w):
    """A row of words of scales or zero points, to be broadcast to words like w [2, 4, 2, 8, 4]."""
    L: gl.constexpr = w.type.layout
    s = gl.permute(gl.reshape(ss.index(i).load(SCALES), (4, 2, 2, 2, 2, 2)), (4, 0, 5, 2, 1, 3))
    s = gl.reshape(s, (2, 4, 2, 8))
    return gl.expand_dims(gl.convert_layout(s, gl.SliceLayout(4, L), assert_trivial=True), 4)


@gluon.jit
def scales_of(ss, wi, w, CHUNK: gl.constexpr, GROUPS: gl.constexpr, WS: gl.constexpr):
    """Of the two steps of a chunk of a slot of the weight: scale and zero point, words that may be the same."""
    ROWS: gl.constexpr = ss.shape[0] // WS
    first = wi * ROWS + CHUNK * GROUPS // 4
    second = wi * ROWS + (2 * CHUNK + 1) * GROUPS // 8
    s0 = _row(ss, first, w)
    z0, s1 = s0, s0
    if ROWS > GROUPS:
        z0 = _row(ss, first + GROUPS, w)
    z1 = z0
    if GROUPS == 8:
        s1 = _row(ss, second, w)
        z1 = s1
        if ROWS > GROUPS:
            z1 = _row(ss, second + GROUPS, w)
    return s0, z0, s1, z1


@gluon.jit
def _step_operands(s, z, FORMAT: gl.constexpr, SCALE: gl.constexpr, DTYPE: gl.constexpr):
    """Scales and zero points as operands of the dequantization."""
    ASM: gl.constexpr = _word_assembly(FORMAT, SCALE, DTYPE)
    a, b, c = gl.inline_asm_elementwise(ASM, "=r,=r,=r,r,r", [s, z], (gl.int32, gl.int32, gl.int32), True, 1)
    return gl.join(a, a), gl.join(b, b), gl.join(c, c)


@gluon.jit
def operands_of(scales, GROUPS: gl.constexpr, FORMAT: gl.constexpr, SCALE: gl.constexpr, DTYPE: gl.constexpr):
    """Operands of the two steps of a chunk."""
    s0, z0, s1, z1 = scales
    a, b, c = _step_operands(s0, z0, FORMAT, SCALE, DTYPE)
    d, e, f = a, b, c
    if GROUPS == 8:
        d, e, f = _step_operands(s1, z1, FORMAT, SCALE, DTYPE)
    return a, b, c, d, e, f


@gluon.jit
def pairs_of(
    u, v, operands, GROUPS: gl.constexpr, FORMAT: gl.constexpr, SCALE: gl.constexpr, CHUNK: gl.constexpr,
    DTYPE: gl.constexpr,
):  # fmt: skip
    """Words of the two steps of a chunk -> DTYPE [2, 4, 2, 8, 4, 2, 2, 2], the last of p, s, h; 2^`pairs_exponent` too
    small."""
    BITS: gl.constexpr = code_bits(FORMAT)
    FIRST: gl.constexpr = 2 * CHUNK % (8 // BITS)  # steps in a word
    SECOND: gl.constexpr = (2 * CHUNK + 1) % (8 // BITS)
    a, b, c, d, e, f = operands
    u = gl.join(u, u)  # an element for p = 0 and one for p = 1, which the assembly makes together
    if BITS == 8 or GROUPS == 8:
        C: gl.constexpr = "=r,=r,r,r,r,r,r,r,r,r"
        v = gl.join(v, v)
        ASM: gl.constexpr = _pairs_assembly(FORMAT, FIRST, 1, SCALE, DTYPE)
        o0, o1 = gl.inline_asm_elementwise(ASM, C, [u, a, b, c], (DTYPE.value, DTYPE.value), True, 2)
        ASM2: gl.constexpr = _pairs_assembly(FORMAT, SECOND, 1, SCALE, DTYPE)
        o2, o3 = gl.inline_asm_elementwise(ASM2, C, [v, d, e, f], (DTYPE.value, DTYPE.value), True, 2)
    else:
        ASM: gl.constexpr = _pairs_assembly(FORMAT, FIRST, 2, SCALE, DTYPE)
        o0, o1, o2, o3 = gl.inline_asm_elementwise(
            ASM, "=r,=r,=r,=r,r,r,r,r,r,r,r,r", [u, a, b, c],
            (DTYPE.value, DTYPE.value, DTYPE.value, DTYPE.value), True, 2,
        )  # fmt: skip
    return gl.permute(gl.join(gl.join(o0, o1), gl.join(o2, o3)), (0, 1, 2, 3, 4, 5, 7, 6))
