"""Vector types and instructions: what a micro-kernel says to LLVM, for any instruction set.

A vector register holds `lanes` 32-bit values. A panel is 16 rows of a weight, so it takes 16 / lanes registers. Only
`dot_bf16`, `dot_int8` and `lookup_*` are instructions of one instruction set; everything else is plain LLVM, which
splits or widens vectors as the target needs.
"""

from __future__ import annotations

import contextlib
import functools
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from llvmlite import binding, ir

__all__ = ["Emitter", "bf16_bits", "write_function"]

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F32 = ir.FloatType()
_POINTER = I8.as_pointer()


class _BFloat(ir.Type):
    """llvmlite has no bfloat of its own."""

    def __str__(self) -> str:
        return "bfloat"

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


def vector(element: ir.Type, count: int) -> ir.VectorType:
    return ir.VectorType(element, count)


def bf16_bits(value: float) -> int:
    """The bits of a value that bf16 holds exactly."""
    bits = struct.unpack("<I", struct.pack("<f", value))[0]
    assert value != value or bits & 0xFFFF == 0, value
    return bits >> 16


def write_function(module: ir.Module, name: str, parameters: Sequence[ir.Type], write: Callable[..., None]) -> Any:
    """A function of a module, which returns nothing; its body is what `write(emitter, *parameters)` writes."""
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), parameters), name)
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    write(Emitter(builder), *function.args)
    builder.ret_void()
    return function


class Variable:
    """A value that changes inside loops; LLVM keeps it in a register."""

    def __init__(self, e: Emitter, kind: ir.Type) -> None:
        self.kind, self._builder = kind, e.builder
        with e.builder.goto_entry_block():
            self._place = e.builder.alloca(kind)

    def get(self) -> Any:
        return self._builder.load(self._place, typ=self.kind)

    def set(self, value: Any) -> None:
        self._builder.store(value, self._place)


class Emitter:
    """Writes LLVM at the end of a function."""

    def __init__(self, builder: Any) -> None:
        self.builder = builder

    # ---- functions

    def call(self, write: Callable[..., None], *arguments: Any) -> None:
        """Call the function of 64-bit integers, addresses too, whose body `write(emitter, *arguments)` writes, once in
        a module: apart from this one, so that its registers are its own."""
        module, name = self.builder.module, write.__qualname__
        function = module.globals.get(name)
        if function is None:
            function = write_function(module, name, [I64] * len(arguments), write)
            function.linkage = "internal"
            function.attributes.add("noinline")
        self.builder.call(function, [self._integer(one) for one in arguments])

    def call_address(self, function: Any, record: Any) -> None:
        """Call `void function(void *record)`."""
        kind = ir.FunctionType(ir.VoidType(), [_POINTER])
        address = self.builder.bitcast(self.builder.inttoptr(function, _POINTER), kind.as_pointer())
        self.builder.call(address, [self.builder.inttoptr(record, _POINTER)])

    def _intrinsic(self, name: str, result: ir.Type, *arguments: Any) -> Any:
        kind = ir.FunctionType(result, [a.type for a in arguments])
        function = self.builder.module.globals.get(name) or ir.Function(self.builder.module, kind, name)
        return self.builder.call(function, arguments)

    # ---- addresses, integers

    def number(self, value: int) -> Any:
        return ir.Constant(I64, value)

    def _integer(self, value: Any) -> Any:
        return self.number(value) if isinstance(value, int) else value

    def add(self, *terms: Any) -> Any:
        return functools.reduce(self.builder.add, map(self._integer, terms))

    def sub(self, a: Any, b: Any) -> Any:
        return self.builder.sub(a, self._integer(b))

    def mul(self, a: Any, b: Any) -> Any:
        return self.builder.mul(a, self._integer(b))

    def least(self, a: Any, b: Any) -> Any:
        """The smaller integer."""
        return self.builder.select(self.compare(a, "<", b), a, self._integer(b))

    def most(self, a: Any, b: Any) -> Any:
        """The larger integer."""
        return self.builder.select(self.compare(a, ">", b), a, self._integer(b))

    def compare(self, a: Any, sign: str, b: Any) -> Any:
        return self.builder.icmp_signed(sign, a, self._integer(b))

    def field(self, record: Any, index: int) -> Any:
        """The 64-bit integer at a place of a record."""
        return self.load(record, I64, 8 * index)

    def set_field(self, record: Any, index: int, value: Any) -> None:
        self.store(value, record, 8 * index)

    def fetch_add(self, record: Any, index: int, value: Any) -> Any:
        """A field, which grows by value in the same step, whichever thread does it."""
        return self.builder.atomic_rmw("add", self.pointer(record, I64, 8 * index), self._integer(value), "acq_rel")

    def wait_for(self, record: Any, index: int, value: Any) -> None:
        """Until a field is at least value; what was written before it is then seen."""
        place = self.pointer(record, I64, 8 * index)
        with self.forever() as leave_if:
            leave_if(self.builder.load_atomic(place, "acquire", 8), ">=", value)

    def pointer(self, address: Any, kind: ir.Type, offset: Any = 0) -> Any:
        b = self.builder
        base = b.inttoptr(address, I8.as_pointer())
        if not isinstance(offset, int) or offset:
            base = b.gep(base, [self.number(offset) if isinstance(offset, int) else offset], source_etype=I8)
        return b.bitcast(base, kind.as_pointer())

    def address(self, pointer: Any) -> Any:
        return self.builder.ptrtoint(pointer, I64)

    def load(self, address: Any, kind: ir.Type, offset: Any = 0) -> Any:
        value = self.builder.load(self.pointer(address, kind, offset), typ=kind)
        value.align = 1
        return value

    def store(self, value: Any, address: Any, offset: Any = 0) -> None:
        self.builder.store(value, self.pointer(address, value.type, offset)).align = 1

    def prefetch(self, address: Any, offset: Any = 0, near: bool = True) -> None:
        """Have a cache line fetched, into the first cache if near, else into the second; any address will do."""
        place = self.pointer(address, I8, offset)
        self._intrinsic(
            "llvm.prefetch.p0", ir.VoidType(), place, *(ir.Constant(I32, i) for i in (0, 3 if near else 2, 1))
        )

    # ---- loops, conditions

    @contextlib.contextmanager
    def loop(self, count: Any) -> Iterator[Any]:
        """for i in range(count)"""
        b, before = self.builder, self.builder.block
        head, body, end = (b.append_basic_block(name) for name in ("loop", "body", "end"))
        b.branch(head)
        b.position_at_end(head)
        i = b.phi(I64)
        i.add_incoming(self.number(0), before)
        b.cbranch(self.compare(i, "<", count), body, end)
        b.position_at_end(body)
        yield i
        i.add_incoming(self.add(i, 1), b.block)
        b.branch(head)
        b.position_at_end(end)

    @contextlib.contextmanager
    def chunks(self, count: Any, size: Any) -> Iterator[tuple[Any, Any]]:
        """Of range(count), so many at once: the first, how many."""
        with self.loop(self.builder.sdiv(self.add(count, size, -1), size)) as i:
            first = self.mul(i, size)
            yield first, self.least(self.sub(count, first), size)

    @contextlib.contextmanager
    def forever(self) -> Iterator[Callable[[Any, str, Any], None]]:
        """while True; what this yields leaves the loop if a comparison holds."""
        b = self.builder
        again, end = b.append_basic_block("again"), b.append_basic_block("end")

        def leave_if(x: Any, sign: str, y: Any) -> None:
            on = b.append_basic_block("on")
            b.cbranch(self.compare(x, sign, y), end, on)
            b.position_at_end(on)

        b.branch(again)
        b.position_at_end(again)
        yield leave_if
        b.branch(again)
        b.position_at_end(end)

    def when(self, a: Any, sign: str, b: Any) -> Any:
        """if a (sign) b"""
        return self.builder.if_then(self.compare(a, sign, b))

    def when_else(self, a: Any, sign: str, b: Any) -> Any:
        """if a (sign) b, and else: a block for each."""
        return self.builder.if_else(self.compare(a, sign, b))

    def variable(self, kind: ir.Type, value: Any = None) -> Variable:
        made = Variable(self, kind)
        made.set(self.zero(kind) if value is None else value)
        return made

    # ---- vectors

    def zero(self, kind: ir.Type) -> Any:
        return ir.Constant(kind, None)

    def constant(self, kind: ir.VectorType, value: float | Sequence[float]) -> Any:
        values = list(value) if isinstance(value, Sequence) else [value] * kind.count
        return ir.Constant(kind, values)

    def splat(self, value: Any, count: int) -> Any:
        kind = vector(value.type, count)
        first = self.builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(I32, 0))
        return self.builder.shuffle_vector(first, first, self.constant(vector(I32, count), 0))

    def shuffle(self, a: Any, b: Any, order: Sequence[int]) -> Any:
        return self.builder.shuffle_vector(a, b, self.constant(vector(I32, len(order)), order))

    def cast(self, value: Any, kind: ir.Type) -> Any:
        return self.builder.bitcast(value, kind)

    def bits(self, value: Any, operation: str, amount: int) -> Any:
        """and_, or_, xor, shl, lshr or ashr with a constant."""
        kind = value.type
        other = self.constant(kind, amount) if isinstance(kind, ir.VectorType) else ir.Constant(kind, amount)
        return getattr(self.builder, operation)(value, other)

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        """a * b + c: one instruction where the target has it, two elsewhere."""
        return self._intrinsic(f"llvm.fmuladd.v{a.type.count}f32", a.type, a, b, c)

    def call_unary(self, name: str, a: Any) -> Any:
        return self._intrinsic(f"llvm.{name}.v{a.type.count}f32", a.type, a)

    def maximum(self, a: Any, b: Any) -> Any:
        return self._intrinsic(f"llvm.maxnum.v{a.type.count}f32", a.type, a, b)

    def plus(self, a: Any, b: Any) -> Any:
        """a + b, of integers or of fp32."""
        return self.builder.fadd(a, b) if a.type.element == F32 else self.builder.add(a, b)

    def total(self, a: Any) -> Any:
        """The sum of a vector's elements, halves first."""
        while a.type.count > 1:
            half = a.type.count // 2
            low, high = (self.shuffle(a, a, range(start, start + half)) for start in (0, half))
            a = self.builder.fadd(low, high)
        return self.builder.extract_element(a, ir.Constant(I32, 0))

    def largest(self, a: Any) -> Any:
        while a.type.count > 1:
            half = a.type.count // 2
            low, high = (self.shuffle(a, a, range(start, start + half)) for start in (0, half))
            a = self.maximum(low, high)
        return self.builder.extract_element(a, ir.Constant(I32, 0))

    def dot_bf16(self, total: Any, a: Any, b: Any) -> Any:
        """AVX-512 BF16: total += a[2i] * b[2i] + a[2i+1] * b[2i+1]; a, b: pairs of bf16 as 32-bit words."""
        pairs = vector(_BFloat(), 32)
        a, b = self.cast(a, pairs), self.cast(b, pairs)
        return self._intrinsic("llvm.x86.avx512bf16.dpbf16ps.512", total.type, total, a, b)

    def dot_int8(self, total: Any, a: Any, b: Any) -> Any:
        """AVX-512 VNNI: total += the products of four unsigned bytes of a and four signed bytes of b."""
        kind = vector(I8, 64) if binding.llvm_version_info[0] >= 22 else total.type
        return self._intrinsic(
            "llvm.x86.avx512.vpdpbusd.512", total.type, total, self.cast(a, kind), self.cast(b, kind)
        )

    def dot_int16(self, total: Any, a: Any, b: Any, fused: bool) -> Any:
        """total += a[2i] * b[2i] + a[2i+1] * b[2i+1], 16-bit integers; fused: AVX-512 VNNI, else AVX2."""
        lanes = total.type.count
        if fused:
            kind = vector(I16, 2 * lanes) if binding.llvm_version_info[0] >= 22 else total.type
            return self._intrinsic(
                "llvm.x86.avx512.vpdpwssd.512", total.type, total, self.cast(a, kind), self.cast(b, kind)
            )
        # 256 bits at a time: what has no VNNI is tuned for that, and LLVM then takes no instruction of 512 bits
        parts = []
        for first in range(0, lanes, 8):
            pairs = [self.cast(self.shuffle(t, t, range(first, first + 8)), vector(I16, 16)) for t in (a, b)]
            parts.append(self._intrinsic("llvm.x86.avx2.pmadd.wd", vector(I32, 8), *pairs))
        products = parts[0] if lanes == 8 else self.shuffle(parts[0], parts[1], range(lanes))
        return self.builder.add(total, products)

    def lookup_16(self, table: Sequence[int], index: Any) -> Any:
        """AVX-512 BW: entries of a table of 32 16-bit values, by the low 5 bits of each 16-bit element."""
        kind = vector(I16, 32)
        entries = self.constant(kind, [_signed(v, 16) for v in table])
        found = self._intrinsic("llvm.x86.avx512.permvar.hi.512", kind, entries, self.cast(index, kind))
        return self.cast(found, index.type)

    def lookup_8(self, table: Sequence[int], index: Any) -> Any:
        """AVX-512 VBMI: entries of a table of 128 bytes, by the low 7 bits of each byte."""
        kind = vector(I8, 64)
        low, high = (self.constant(kind, [_signed(v, 8) for v in table[i : i + 64]]) for i in (0, 64))
        found = self._intrinsic("llvm.x86.avx512.vpermi2var.qi.512", kind, low, self.cast(index, kind), high)
        return self.cast(found, index.type)

    # ---- numbers

    def float_of_int(self, value: Any) -> Any:
        return self.builder.sitofp(value, vector(F32, value.type.count))

    def float_of(self, value: Any, dtype: str) -> Any:
        """Elements of "fp32", "bf16" or "fp16" -> fp32."""
        if dtype == "fp32":
            return value
        return self.float_of_bf16(value) if dtype == "bf16" else self.float_of_half(value)

    def float_of_bf16(self, value: Any) -> Any:
        """16-bit elements -> fp32."""
        wide = self.builder.zext(value, vector(I32, value.type.count))
        return self.cast(self.bits(wide, "shl", 16), vector(F32, value.type.count))

    def float_of_half(self, value: Any) -> Any:
        """16-bit elements -> fp32, without an instruction for it: exponents are moved by multiplying."""
        wide = self.builder.zext(value, vector(I32, value.type.count))
        return self.float_of_small(self.bits(self.bits(wide, "and_", 0x7FFF), "shl", 13), self.bits(wide, "shl", 16),
                                   112, 0x7C00 << 13)  # fmt: skip

    def float_of_small(self, magnitude: Any, sign: Any, bias: int, special: int) -> Any:
        """fp32 from a smaller format whose exponent and mantissa stand in the places of fp32's.

        Args:
            magnitude: bits without the sign. sign: bit 31 is the sign, others are ignored.
            bias: what the exponent lacks. special: the smallest magnitude that is Inf or NaN.
        """
        b, kind = self.builder, vector(F32, magnitude.type.count)
        value = b.fmul(self.cast(magnitude, kind), self.constant(kind, 2.0**bias))
        odd = b.icmp_unsigned(">=", magnitude, self.constant(magnitude.type, special))
        raised = self.bits(magnitude, "or_", 0x7F800000)
        raw = b.select(odd, raised, self.cast(value, magnitude.type))
        return self.cast(b.or_(raw, self.bits(sign, "and_", -(2**31))), kind)

    def bf16_of_float(self, value: Any) -> Any:
        """fp32 -> 16-bit elements, rounded to nearest even; NaN stays NaN."""
        b, count = self.builder, value.type.count
        raw = self.cast(value, vector(I32, count))
        odd = self.bits(self.bits(raw, "lshr", 16), "and_", 1)
        rounded = b.add(self.bits(raw, "add", 0x7FFF), odd)
        nan = b.fcmp_unordered("uno", value, value)
        rounded = b.select(nan, self.bits(raw, "or_", 0x400000), rounded)
        return b.trunc(self.bits(rounded, "lshr", 16), vector(I16, count))

    def half_of_float(self, value: Any) -> Any:
        """fp32 -> 16-bit elements; only where the target converts (else LLVM would call a library)."""
        half = self.builder.fptrunc(value, vector(ir.HalfType(), value.type.count))
        return self.cast(half, vector(I16, value.type.count))


def _signed(value: int, bits: int) -> int:
    return value - (1 << bits) if value >= 1 << (bits - 1) else value
