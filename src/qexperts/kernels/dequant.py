"""Packed weights to matrix operands, in registers: one helper per format family.

    w = (code - zero) * scale, rounded once to the activation dtype

A word is 32 bits of codes. Sixteen consecutive k of one row belong to one lane q = 0..3 of a matrix fragment; the
lane's codes fill the k-slots 16 s + 8 h + 2 q + p (s = 0..3, h = 0..1, p = 0..1) of a block of 64: the order in which
m16n8k16 and wgmma want their register operand. Bits of a word that belong to (s, h, p):

    int8, fp8   word s           byte 2 p + h
    int4        word s // 2      bits 16 p + 4 (2 (s % 2) + h)
    int2        the only word    bits 16 p + 2 (2 s + h)

Extraction takes two codes (p = 0, 1) a step and never moves a bit between the halves of a register. Every family has
a PTX path (NVIDIA; an exponent is or-ed to the codes, and what it adds is subtracted again, exactly) and a portable
twin (interpreter, AMD, Intel) that gives the same bits. FP8 codes that stand for NaN are not preserved.

Sources: the exponent trick is that of FasterTransformer's fast_numeric_conversion and of Marlin.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "both",
    "code_bits",
    "code_value",
    "dequant_words",
    "fast_assembly",
    "fast_exponent",
    "fast_operands",
    "fast_operands_assembly",
    "fast_words",
    "is_asym",
    "round_to",
    "scale_operand",
    "slot_to_k",
    "zero_operand",
]


@triton.constexpr_function
def both(value: float, bf16: bool) -> str:
    """A bf16 or fp16 value, representable, in both halves of a register."""
    sign, mantissa, exponent = (0x8000 if value < 0 else 0), abs(value), 0
    while mantissa >= 2:
        mantissa, exponent = mantissa / 2, exponent + 1
    while mantissa < 1:
        mantissa, exponent = mantissa * 2, exponent - 1
    bias, width = (127, 7) if bf16 else (15, 10)
    return hex((sign | (exponent + bias) << width | int((mantissa - 1) * 2**width)) * 0x10001)


@triton.constexpr_function
def _nibbles(bits: int, bf16: bool, asym: bool, scaled: bool) -> str:
    """A word of 4- or 2-bit codes -> registers of two values: the word, then the steps' s if scaled, z if asym.

    A field may stay where it is in the mantissa of the magic number m, as far as that reaches; the multiply-add then
    undoes its weight f: (m + f c) / f - (m / f + zero) = c - zero, exactly.
    """
    mask = 0x000F000F if bits == 4 else 0x00030003
    magic, reach = (128, 7) if bf16 else (1024, 10)
    head = 0x43004300 if bf16 else 0x64006400
    offset = 0 if asym else 1 << (bits - 1)  # the sign bit is flipped, so that codes count from 0
    t = "bf16x2" if bf16 else "f16x2"
    steps, places = 8 // bits, reach // bits
    word = 4 * steps  # the number of the first input, after two outputs a register
    lines = [f".reg .b32 m, none, z, r, f, g; mov.b32 none, 0x80008000; mov.b32 m, ${word};"]
    for i in range(2 * steps):
        low = bits * (i % places)
        f = 1 << low
        if i and not low:
            lines.append(f"shr.u32 m, ${word}, {bits * i};")
        lines.append(f"lop3.b32 r, m, {mask << low:#x}, {head ^ (offset << low) * 0x10001:#x}, 0x6a;")  # (a & b) ^ c
        z = f"${word + 1 + i // 2 + (steps if scaled else 0)}"  # -(m + zero)
        if not asym:
            lines.append(f"mov.b32 z, {both(-(magic / f + offset), bf16)};")
        elif low:
            lines.append(f"mov.b32 f, {both(1.0, bf16)}; mov.b32 g, {both(magic - magic / f, bf16)};")
            lines.append(f"fma.rn.{t} z, {z}, f, g;")
        else:
            lines.append(f"mov.b32 z, {z};")
        lines.append(f"mov.b32 f, {both(1 / f, bf16)}; fma.rn.{t} r, r, f, z;")
        if scaled:
            lines.append(f"fma.rn.{t} r, r, ${word + 1 + i // 2}, none;")
        lines.append(f"mov.b32 {{${2 * i}, ${2 * i + 1}}}, r;")
    return "{" + "\n".join(lines) + "}"


@triton.constexpr_function
def _bytes(bf16: bool, asym: bool, scaled: bool) -> str:
    """4 codes of 8 bits -> 2 registers of two values: $4 word, then s if scaled, z if asym."""
    t, one = ("bf16x2", "0x3f803f80") if bf16 else ("f16x2", "0x3c003c00")
    z = "$6" if scaled else "$5"
    lines = [f".reg .b32 m, one, none, r, t; mov.b32 one, {one}; mov.b32 none, 0x80008000;"]
    for h in range(2):
        source = "m" if h else "$4"
        if h:
            lines.append("shr.u32 m, $4, 8;")
        if bf16:
            # 128 + low 7 bits, minus 128 or 256: bit 7 of the subtrahend doubles its exponent's 128
            flip = 0x4380 if asym else 0x4300  # asym: code ^ 0x80 = code - 128 as a signed byte
            lines.append(f"lop3.b32 r, {source}, 0x007f007f, 0x43004300, 0xea;")  # (a & b) | c
            lines.append(f"lop3.b32 t, {source}, 0x00800080, {(flip | 0x8000) * 0x10001:#x}, 0x6a;")
            lines.append("fma.rn.bf16x2 r, r, one, t;")
            if asym:
                lines.append(f"fma.rn.bf16x2 r, r, one, {z};")
        else:
            magic = 0x6400 if asym else 0x6480  # the sign bit flipped
            lines.append(f"lop3.b32 r, {source}, 0x00ff00ff, {magic * 0x10001:#x}, 0x6a;")
            addend = z if asym else "t"
            if not asym:
                lines.append("mov.b32 t, 0xe480e480;")
            lines.append(f"fma.rn.f16x2 r, r, one, {addend};")
        if scaled:
            lines.append(f"fma.rn.{t} r, r, $5, none;")
        lines.append(f"mov.b32 {{${2 * h}, ${2 * h + 1}}}, r;")
    return "{" + "\n".join(lines) + "}"


@triton.constexpr_function
def _fp8(e5m2: bool, bf16: bool, scaled: bool) -> str:
    """4 fp8 codes -> 2 registers of two values: $4 word, then s if scaled.

    Exponent and mantissa are shifted to where the wider type has them; a power of two then mends the exponent's bias,
    subnormals included.
    """
    t = "bf16x2" if bf16 else "f16x2"
    shift, mask, bias = {
        (False, True): (4, 0x07F0, 0x7B80),  # 2^120
        (True, True): (3, 0x0FE0, 0x7780),  # 2^112
        (False, False): (1, 0x3F80, 0x5C00),  # 2^8
        (True, False): (0, 0x7F00, 0),  # e5m2 is the upper half of fp16
    }[(e5m2, bf16)]
    lines = [".reg .b32 m, bias, none, r, t; mov.b32 none, 0x80008000;", f"mov.b32 bias, {bias * 0x10001:#x};"]
    for h in range(2):
        source = "$4" if h else "t"
        if not h:
            lines.append("shl.b32 t, $4, 8;")
        lines.append(f"and.b32 r, {source}, {'0xff00ff00' if not shift else '0x80008000'};")
        if shift:
            lines.append(f"shr.u32 m, {source}, {shift}; lop3.b32 r, m, {mask * 0x10001:#x}, r, 0xea;")
            lines.append(f"fma.rn.{t} r, r, bias, none;")
        if scaled:
            lines.append(f"fma.rn.{t} r, r, $5, none;")
        lines.append(f"mov.b32 {{${2 * h}, ${2 * h + 1}}}, r;")
    return "{" + "\n".join(lines) + "}"


@triton.constexpr_function
def fast_exponent() -> int:
    """What `fast_words` returns is this power of two too small. A scale has to lie between 2^-90 and 2^26."""
    return 32


@triton.constexpr_function
def fast_operands_assembly(fmt: str, bf16: bool = True) -> str:
    """$0, $1: scales of a code that starts at bit 0, at bit 4; $2: addend; from $3: s; $4: z, of `scale_operand` and
    `zero_operand`. fp16: $0: scale; $1, $2: addends of a code that starts at bit 4, at bit 0."""
    if not bf16:
        if fmt.endswith("_asym"):
            return (
                f"{{.reg .b32 a, b; mov.b32 $0, $3; mov.b32 $2, $4; mov.b32 a, {both(1.0, False)};"
                f"mov.b32 b, {both(1024.0 - 64.0, False)}; fma.rn.f16x2 $1, $4, a, b;}}"
            )
        offset = 0 if fmt.startswith("fp8") else 2 ** (code_bits(fmt) - 1)
        return (
            f"mov.b32 $0, $3; mov.b32 $1, {both(-64.0 - offset, False)}; mov.b32 $2, {both(-1024.0 - offset, False)};"
        )
    down = -fast_exponent()
    if fmt.endswith("_asym"):  # z holds 128 -+ zero
        z = -128.0 if fmt.startswith("int8") else 128.0
        return (
            "{.reg .b32 a, b; mov.b32 $0, $3; mov.b32 $1, $3;"
            f"mov.b32 a, {both(2.0**down, True)}; mov.b32 b, {both(z * 2.0**down, True)};"
            "fma.rn.bf16x2 $2, $4, a, b;}"
        )
    up, addend = {"fp8_e4m3": (120, 0), "fp8_e5m2": (112, 0)}.get(fmt, (133, -(2.0 ** (code_bits(fmt) - 1))))
    lines = [".reg .b32 a, none; mov.b32 none, 0x80008000;"]
    for i, factor in enumerate((2.0 ** (up + down), 2.0 ** (up + down - 4), addend * 2.0**down)):
        value = both(factor, True) if factor else "0"
        lines.append(f"mov.b32 a, {value}; fma.rn.bf16x2 ${i}, $3, a, none;")
    return "{" + "\n".join(lines) + "}"


@triton.constexpr_function
def _scaled(product: str, t: str, result: str, scale: str, second: str) -> str:
    """r times a scale. "two": times the sum of both; "fp32": r is in fp16, the product in the result's type."""
    if product == "two":
        return f"fma.rn.bf16x2 x, r, {second}, none; fma.rn.bf16x2 r, r, {scale}, x;"
    if product == "fp32":
        return (
            f"mov.b32 {{l, h}}, r; cvt.f32.f16 f, l; cvt.f32.f16 g, h; mul.rn.f32 f, f, {scale};"
            f"mul.rn.f32 g, g, {scale}; cvt.rn.{result}.f32 r, g, f;"
        )
    return f"fma.rn.{t} r, r, {scale}, none;"


@triton.constexpr_function
def fast_assembly(fmt: str, steps: tuple[int, int] | None = None, bf16: bool = True, product: str = "") -> str:
    """A word of codes -> registers of two bf16 values, scaled down: word, scales for bits 0 and 4, addend.

    The lowest 8 bits of a bf16, its exponent's last bit among them, count from 0 in steps of 2^-133. A code stays where
    it is in such a byte, f times too large, and one multiply-add makes of it

        f c 2^-133 * s 2^(133 - 32) / f - offset s 2^-32 = (c - offset) s 2^-32

    rounded once. With a zero point, whose product with the scale would not be exact, it is (c - zero) 2^-32 first.
    fp16 has no such range: it is (1024 + f c) / f - (1024 / f + offset or zero) first, and nothing is scaled down.

    Args:
        steps: of 16 k, from one to before another, from pairs of equal words, scales and addends; None: all, from one.
        product: of `hopper_pairs.py`. "two" is made as with a zero point, "fp32" as in fp16.
    """
    bits = code_bits(fmt)
    result, bf16 = "bf16x2" if bf16 else "f16x2", bf16 and product != "fp32"
    registers = range(16 // bits)
    word, next_input = 32 // bits, 1  # numbers of the inputs
    if steps is not None:
        registers = registers[2 * steps[0] : 2 * steps[1]]
        word, next_input = len(registers), 2
    lines = [".reg .b16 l, h; .reg .f32 f, g; .reg .b32 r, x, none, ka, kb, m0, m2, m8, m10;"]
    lines.append(f"mov.b32 none, 0x80008000; mov.b32 m0, ${word};")
    t = "bf16x2" if bf16 else "f16x2"
    scaled = _scaled(product, t, result, f"${word + next_input}", f"${word + 2 * next_input}")
    if fmt.startswith("fp8"):
        shift, mask = {
            ("fp8_e4m3", True): (4, 0x07F0), ("fp8_e5m2", True): (3, 0x0FE0), ("fp8_e4m3", False): (1, 0x3F80),
            ("fp8_e5m2", False): (0, 0x7F00),
        }[fmt, bf16]  # fmt: skip
        lines.append(f"shl.b32 m8, ${word}, 8;")
        for h, source in enumerate(("m8", "m0")):
            lines.append(f"and.b32 r, {source}, 0x80008000; shr.u32 m2, {source}, {shift};")
            lines.append(f"lop3.b32 r, m2, {mask * 0x10001:#x}, r, 0xea;")
            if not bf16 and shift:  # the difference of the exponents' biases, which a scale has no room for
                lines.append(f"mov.b32 ka, {both(2.0**8, False)}; fma.rn.f16x2 r, r, ka, none;")
            lines.append(scaled)
            lines.append(f"mov.b32 ${h}, r;" if steps else f"mov.b32 {{${2 * h}, ${2 * h + 1}}}, r;")
        return "{" + "\n".join(lines) + "}"
    asym = fmt.endswith("_asym")
    offset = 0 if asym else 1 << (bits - 1)  # the sign bit is flipped, so that codes count from 0
    lines += [f"shr.u32 m{at}, m0, {at};" for at in ((8,) if bits > 2 else (2, 8, 10))]
    head, up = (0, 133 - fast_exponent()) if bf16 else (0x6400, 0)  # 1024
    lines.append(f"mov.b32 ka, {both(2.0**up, bf16)}; mov.b32 kb, {both(2.0 ** (up - 4), bf16)};")
    for i in registers:
        low = 4 if bits < 8 and bits * i % 8 >= 4 else 0
        a, b = ((1 << bits) - 1) << low, head ^ offset << low
        lines.append(f"lop3.b32 r, m{bits * i - low}, {a * 0x10001:#x}, {b * 0x10001:#x}, 0x6a;")  # (a & b) ^ c
        if asym or not bf16 or product == "two":
            addend = word + (2 if low and not bf16 else 3) * next_input
            lines.append(f"fma.rn.{t} r, r, {'kb' if low else 'ka'}, ${addend};")
            lines.append(scaled)
        else:
            lines.append(f"fma.rn.bf16x2 r, r, ${word + (2 if low else 1) * next_input}, ${word + 3 * next_input};")
        lines.append(f"mov.b32 ${i - registers[0]}, r;" if steps else f"mov.b32 {{${2 * i}, ${2 * i + 1}}}, r;")
    return "{" + "\n".join(lines) + "}"


@triton.constexpr_function
def _ptx(fmt: str, dtype: tl.dtype, scaled: bool) -> str:
    """The assembly of a format."""
    bf16, asym = dtype == tl.bfloat16, fmt.endswith("_asym")
    if fmt.startswith("fp8"):
        return _fp8(fmt == "fp8_e5m2", bf16, scaled)
    if fmt.startswith("int8"):
        return _bytes(bf16, asym, scaled)
    return _nibbles(4 if fmt.startswith("int4") else 2, bf16, asym, scaled)


@triton.constexpr_function
def code_bits(fmt: str) -> int:
    return {"int4": 4, "int2": 2}.get(fmt[:4], 8)


@triton.constexpr_function
def is_asym(fmt: str) -> bool:
    return fmt.endswith("_asym")


@triton.jit
def round_to(v, DTYPE: tl.constexpr, PATH: tl.constexpr):
    """fp32 -> DTYPE, to nearest even. The interpreter truncates to bf16, so there it is done by hand."""
    if PATH == "interpreter" and tl.bfloat16 == DTYPE:
        bits = v.to(tl.uint32, bitcast=True)
        v = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return v.to(DTYPE)


@triton.jit
def slot_to_k(slot, BITS: tl.constexpr):
    """The k whose code fills a k-slot when a lane's 16 k are read as they lie in the public layout."""
    s, h, q, p = slot // 16 % 4, slot // 8 % 2, slot // 2 % 4, slot % 2
    if BITS == 8:
        k = 4 * s + 2 * p + h
    elif BITS == 4:
        k = 8 * (s // 2) + 4 * p + 2 * (s % 2) + h
    else:
        k = 8 * p + 2 * s + h
    return slot // 64 * 64 + 16 * q + k


@triton.jit
def _twice(v, DTYPE: tl.constexpr):
    """A value in both halves of a register: i32."""
    bits = v.to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return bits | (bits << 16)


@triton.jit
def _join8(o0, o1, o2, o3, o4, o5, o6, o7):
    """Values of (s % 2, h, p), p fastest -> [..., 2, 2, 2]."""
    return tl.join(tl.join(tl.join(o0, o4), tl.join(o2, o6)), tl.join(tl.join(o1, o5), tl.join(o3, o7)))


@triton.jit
def _join16(o0, o1, o2, o3, o4, o5, o6, o7, o8, o9, oa, ob, oc, od, oe, of):
    """Values of (s // 2, s % 2, h, p), p fastest -> [..., 2, 2, 2, 2]."""
    return _join8(
        tl.join(o0, o8), tl.join(o1, o9), tl.join(o2, oa), tl.join(o3, ob),
        tl.join(o4, oc), tl.join(o5, od), tl.join(o6, oe), tl.join(o7, of),
    )  # fmt: skip


@triton.jit
def _join4(o0, o1, o2, o3):
    """Values of (h, p), p fastest -> [..., 2, 2]."""
    return tl.join(tl.join(o0, o2), tl.join(o1, o3))


@triton.jit
def scale_operand(v, DTYPE: tl.constexpr, PATH: tl.constexpr):
    """A scale as `dequant_words` wants it.

    bf16 is widened by its bits: a product with a widened fp16 that is rounded to fp16, LLVM takes in fp16 if it sees
    both widened, since their mantissas fit. The scale's exponent does not.
    """
    if PATH == "ptx" and v.dtype == DTYPE:
        v = _twice(v, DTYPE)
    elif v.dtype == tl.bfloat16:
        v = (v.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        v = v.to(tl.float32)
    return v


@triton.jit
def zero_operand(v, FORMAT: tl.constexpr, DTYPE: tl.constexpr, PATH: tl.constexpr):
    """A loaded zero point as `dequant_words` wants it: what PTX adds to the code under its exponent."""
    v = v.to(tl.float32)
    if PATH == "ptx":
        if tl.float16 == DTYPE:
            v = _twice(-1024 - v, DTYPE)
        elif FORMAT == "int8_asym":
            v = _twice(128 - v, DTYPE)
        else:
            v = _twice(-128 - v, DTYPE)
    return v


@triton.jit
def _ptx4(w, s, z, FORMAT: tl.constexpr, DTYPE: tl.constexpr, SCALED: tl.constexpr):
    OUT: tl.constexpr = "=h,=h,=h,=h,r"
    ASM: tl.constexpr = _ptx(FORMAT, DTYPE, SCALED)
    if is_asym(FORMAT) and SCALED:
        o0, o1, o2, o3 = tl.inline_asm_elementwise(ASM, OUT + ",r,r", [w, s, z], (tl.int16,) * 4, True, 1)
    elif is_asym(FORMAT):
        o0, o1, o2, o3 = tl.inline_asm_elementwise(ASM, OUT + ",r", [w, z], (tl.int16,) * 4, True, 1)
    elif SCALED:
        o0, o1, o2, o3 = tl.inline_asm_elementwise(ASM, OUT + ",r", [w, s], (tl.int16,) * 4, True, 1)
    else:
        o0, o1, o2, o3 = tl.inline_asm_elementwise(ASM, OUT, [w], (tl.int16,) * 4, True, 1)
    return _join4(o0, o1, o2, o3).to(DTYPE, bitcast=True)


@triton.jit
def _ptx8(w, s0, s1, z0, z1, FORMAT: tl.constexpr, DTYPE: tl.constexpr, SCALED: tl.constexpr):
    OUT: tl.constexpr = "=h,=h,=h,=h,=h,=h,=h,=h,r"
    ASM: tl.constexpr = _ptx(FORMAT, DTYPE, SCALED)
    if is_asym(FORMAT) and SCALED:
        o0, o1, o2, o3, o4, o5, o6, o7 = tl.inline_asm_elementwise(
            ASM, OUT + ",r,r,r,r", [w, s0, s1, z0, z1], (tl.int16,) * 8, True, 1
        )
    elif is_asym(FORMAT):
        o0, o1, o2, o3, o4, o5, o6, o7 = tl.inline_asm_elementwise(
            ASM, OUT + ",r,r", [w, z0, z1], (tl.int16,) * 8, True, 1
        )
    elif SCALED:
        o0, o1, o2, o3, o4, o5, o6, o7 = tl.inline_asm_elementwise(
            ASM, OUT + ",r,r", [w, s0, s1], (tl.int16,) * 8, True, 1
        )
    else:
        o0, o1, o2, o3, o4, o5, o6, o7 = tl.inline_asm_elementwise(ASM, OUT, [w], (tl.int16,) * 8, True, 1)
    return _join8(o0, o1, o2, o3, o4, o5, o6, o7).to(DTYPE, bitcast=True)


@triton.jit
def _ptx16(w, s0, s1, s2, s3, z0, z1, z2, z3, FORMAT: tl.constexpr, DTYPE: tl.constexpr, SCALED: tl.constexpr):
    OUT: tl.constexpr = "=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,r"
    ASM: tl.constexpr = _ptx(FORMAT, DTYPE, SCALED)
    if is_asym(FORMAT) and SCALED:
        o0, o1, o2, o3, o4, o5, o6, o7, o8, o9, oa, ob, oc, od, oe, of = tl.inline_asm_elementwise(
            ASM, OUT + ",r,r,r,r,r,r,r,r", [w, s0, s1, s2, s3, z0, z1, z2, z3], (tl.int16,) * 16, True, 1
        )
    elif is_asym(FORMAT):
        o0, o1, o2, o3, o4, o5, o6, o7, o8, o9, oa, ob, oc, od, oe, of = tl.inline_asm_elementwise(
            ASM, OUT + ",r,r,r,r", [w, z0, z1, z2, z3], (tl.int16,) * 16, True, 1
        )
    elif SCALED:
        o0, o1, o2, o3, o4, o5, o6, o7, o8, o9, oa, ob, oc, od, oe, of = tl.inline_asm_elementwise(
            ASM, OUT + ",r,r,r,r", [w, s0, s1, s2, s3], (tl.int16,) * 16, True, 1
        )
    else:
        o0, o1, o2, o3, o4, o5, o6, o7, o8, o9, oa, ob, oc, od, oe, of = tl.inline_asm_elementwise(
            ASM, OUT, [w], (tl.int16,) * 16, True, 1
        )
    t = _join16(o0, o1, o2, o3, o4, o5, o6, o7, o8, o9, oa, ob, oc, od, oe, of)
    return t.to(DTYPE, bitcast=True)


@triton.jit
def fast_operands(s, z, FORMAT: tl.constexpr):
    """From a `scale_operand` and a `zero_operand` of bf16, PTX: what `fast_words` wants."""
    ASM: tl.constexpr = fast_operands_assembly(FORMAT)
    return tl.inline_asm_elementwise(ASM, "=r,=r,=r,r,r", [s, z], (tl.int32,) * 3, True, 1)


@triton.jit
def fast_words(w, a, b, c, FORMAT: tl.constexpr):
    """`dequant_words` for bf16 scales and results and one scale a row, PTX; 2^`fast_exponent` too small.

    Args:
        w: as there. a, b, c: `fast_operands`, broadcastable to w.
    Returns: [BLOCK_N, 64 * B]; bf16.
    """
    BITS: tl.constexpr = code_bits(FORMAT)
    ASM: tl.constexpr = fast_assembly(FORMAT)
    if BITS == 8:
        o0, o1, o2, o3 = tl.inline_asm_elementwise(ASM, "=h,=h,=h,=h,r,r,r,r", [w, a, b, c], (tl.int16,) * 4, True, 1)
        t = tl.permute(_join4(o0, o1, o2, o3), (0, 1, 3, 4, 2, 5))
    elif BITS == 4:
        o0, o1, o2, o3, o4, o5, o6, o7 = tl.inline_asm_elementwise(
            ASM, "=h,=h,=h,=h,=h,=h,=h,=h,r,r,r,r", [w, a, b, c], (tl.int16,) * 8, True, 1
        )
        t = tl.permute(_join8(o0, o1, o2, o3, o4, o5, o6, o7), (0, 1, 3, 4, 5, 2, 6))
    else:
        o0, o1, o2, o3, o4, o5, o6, o7, o8, o9, oa, ob, oc, od, oe, of = tl.inline_asm_elementwise(
            ASM, "=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,r,r,r,r", [w, a, b, c], (tl.int16,) * 16, True, 1
        )
        t = tl.permute(
            _join16(o0, o1, o2, o3, o4, o5, o6, o7, o8, o9, oa, ob, oc, od, oe, of), (0, 1, 3, 4, 5, 6, 2, 7)
        )
    return tl.reshape(t.to(tl.bfloat16, bitcast=True), (w.shape[0], 64 * w.shape[1]))


@triton.jit
def _int_value(w, z, SHIFT: tl.constexpr, BITS: tl.constexpr, ASYM: tl.constexpr):
    """code - zero of the code that starts at bit SHIFT: f32, exact."""
    code = (w >> SHIFT) & ((1 << BITS) - 1)
    if ASYM:
        value = code.to(tl.float32) - z
    else:
        value = ((code ^ (1 << (BITS - 1))) - (1 << (BITS - 1))).to(tl.float32)
    return value


@triton.jit
def _fp8_value(w, SHIFT: tl.constexpr, E5M2: tl.constexpr):
    """The fp8 code that starts at bit SHIFT: f32, exact, built from its fields so that no device flushes subnormals."""
    code = (w >> SHIFT) & 0xFF
    if E5M2:
        exponent, mantissa = (code >> 2) & 0x1F, code & 3
        normal, small = ((exponent + 112) << 23) | (mantissa << 21), 2.0**-16
    else:
        exponent, mantissa = (code >> 3) & 0xF, code & 7
        normal, small = ((exponent + 120) << 23) | (mantissa << 20), 2.0**-9
    magnitude = tl.where(exponent == 0, mantissa.to(tl.float32) * small, normal.to(tl.float32, bitcast=True))
    return tl.where(code >= 128, -magnitude, magnitude)


@triton.jit
def code_value(w, z, SHIFT: tl.constexpr, FORMAT: tl.constexpr):
    """code - zero of the code that starts at bit SHIFT: f32, exact. The portable twin of the PTX."""
    if FORMAT == "fp8_e4m3" or FORMAT == "fp8_e5m2":
        v = _fp8_value(w, SHIFT, FORMAT == "fp8_e5m2")
    else:
        v = _int_value(w, z, SHIFT, code_bits(FORMAT), is_asym(FORMAT))
    return v


@triton.jit
def _twin4(w, z, FORMAT: tl.constexpr):
    return _join4(
        code_value(w, z, 0, FORMAT), code_value(w, z, 16, FORMAT), code_value(w, z, 8, FORMAT),
        code_value(w, z, 24, FORMAT),
    )  # fmt: skip


@triton.jit
def _twin8(w, z0, z1, FORMAT: tl.constexpr):
    BITS: tl.constexpr = code_bits(FORMAT)
    return _join8(
        code_value(w, z0, 0, FORMAT), code_value(w, z0, 16, FORMAT),
        code_value(w, z0, BITS, FORMAT), code_value(w, z0, 16 + BITS, FORMAT),
        code_value(w, z1, 2 * BITS, FORMAT), code_value(w, z1, 16 + 2 * BITS, FORMAT),
        code_value(w, z1, 3 * BITS, FORMAT), code_value(w, z1, 16 + 3 * BITS, FORMAT),
    )  # fmt: skip


@triton.jit
def _twin16(w, z0, z1, z2, z3, FORMAT: tl.constexpr):
    return tl.permute(tl.join(_twin8(w, z0, z1, FORMAT), _twin8(w >> 8, z2, z3, FORMAT)), (0, 1, 2, 3, 7, 4, 5, 6))


@triton.jit
def dequant_words(
    w, s0, s1, s2, s3, z0, z1, z2, z3, FORMAT: tl.constexpr, DTYPE: tl.constexpr, PATH: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Words of a block of weights -> the matrix operand.

    Args:
        w: [BLOCK_N, B, 4, J]; i32; B blocks of 64 k, lane q, J words of a lane (4 for 8-bit codes, 2 int4, 1 int2).
        s0 .. s3: `scale_operand`s of the steps in one word (8-bit codes: s0; int4: s0, s1; int2: all), broadcastable
            to w.
        z0 .. z3: `zero_operand`s like the scales; read for asymmetric formats only.
        DTYPE: of the result. PATH: "ptx" (NVIDIA), "portable", or "interpreter" (portable; see `tile.py`).
        WIDE: the scales are not in DTYPE; PTX then gives code - zero, exact, and the product is taken in fp32.
    Returns: [BLOCK_N, 64 * B]; DTYPE; columns are k-slots.
    """
    BLOCK_N: tl.constexpr = w.shape[0]
    B: tl.constexpr = w.shape[1]
    BITS: tl.constexpr = code_bits(FORMAT)
    PTX_SCALED: tl.constexpr = not WIDE
    PRODUCT: tl.constexpr = WIDE or PATH != "ptx"
    if BITS == 8:
        if PATH == "ptx":
            t = _ptx4(w, s0, z0, FORMAT, DTYPE, PTX_SCALED)
        else:
            t = _twin4(w, z0, FORMAT)
        if PRODUCT:
            t = t.to(tl.float32) * s0[:, :, :, :, None, None]
        t = tl.permute(round_to(t, DTYPE, PATH), (0, 1, 3, 4, 2, 5))
    elif BITS == 4:
        if PATH == "ptx":
            t = _ptx8(w, s0, s1, z0, z1, FORMAT, DTYPE, PTX_SCALED)
        else:
            t = _twin8(w, z0, z1, FORMAT)
        if PRODUCT:
            t = t.to(tl.float32) * tl.join(s0, s1)[:, :, :, :, :, None, None]
        t = tl.permute(round_to(t, DTYPE, PATH), (0, 1, 3, 4, 5, 2, 6))
    else:
        if PATH == "ptx":
            t = _ptx16(w, s0, s1, s2, s3, z0, z1, z2, z3, FORMAT, DTYPE, PTX_SCALED)
        else:
            t = _twin16(w, z0, z1, z2, z3, FORMAT)
        if PRODUCT:
            t = t.to(tl.float32) * tl.join(tl.join(s0, s2), tl.join(s1, s3))[:, :, :, :, :, :, None, None]
        t = tl.permute(round_to(t, DTYPE, PATH), (0, 1, 3, 4, 5, 6, 2, 7))
    return tl.reshape(t, (BLOCK_N, 64 * B))
