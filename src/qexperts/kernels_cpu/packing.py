"""Activations into the form that products are taken of: a row at a time, in the order of the weights' operands."""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from .spec import X_SIZES, Arg, Kind
from .vectors import F32, I8, I16, I32, Emitter, vector

__all__ = ["Packing"]

STEP = 16  # k that activations are packed in at once
ROUND = 1.5 * 2**23  # added and subtracted again: rounds to an integer


class Packing:
    """How activations of one kind are packed."""

    def __init__(self, kind: Kind) -> None:
        self._kind = kind

    def pack_row(self, e: Emitter, a: Any, x: Any, out: Any, sums: Any) -> None:
        """A row of activations -> the order of the operands, and the sum (and scale) of each group."""
        k, b = self._kind, e.builder
        steps = b.sdiv(e.field(a, Arg.K), e.number(STEP))
        size = b.sdiv(e.mul(e.field(a, Arg.GROUP_WORDS), k.per_word), e.number(STEP))
        with e.loop(e.field(a, Arg.GROUPS)) as g:
            start = e.mul(g, size)
            left = b.sub(steps, start)
            count = b.select(b.icmp_signed("<", size, left), size, left)
            scale = inverse = None
            if k.steps:
                scale, inverse = self._scale_of_x(e, x, start, count)
            total = e.variable(vector(F32, STEP))
            small = _Small(e) if k.dot == "int16" else None
            with e.loop(count) as i:
                step = e.add(start, i)
                total.set(b.fadd(total.get(), self._pack_step(e, a, x, out, step, (inverse, small))))
            if small is not None:
                with b.if_then(small.too_small(total.get(), count)):
                    e.store(e.number(1), a, 8 * Arg.WIDE)
            if k.sums:
                e.store(e.total(total.get()), sums, e.mul(g, 8))
                e.store(ir.Constant(F32, 1.0) if scale is None else scale, sums, e.add(e.mul(g, 8), 4))

    def _x(self, e: Emitter, x: Any, step: Any) -> tuple[Any, Any]:
        """The elements of one step as they are, and as fp32."""
        element: ir.Type = F32 if self._kind.x == "fp32" else I16
        raw = e.load(x, vector(element, STEP), e.mul(step, STEP * X_SIZES[self._kind.x]))
        return raw, e.float_of(raw, self._kind.x)

    def _scale_of_x(self, e: Emitter, x: Any, start: Any, count: Any) -> tuple[Any, Any]:
        """max|x| / steps of a group, and its inverse; 1 for a group of zeros."""
        b, limit = e.builder, ir.Constant(F32, float(self._kind.steps))
        top = e.variable(vector(F32, STEP))
        with e.loop(count) as i:
            top.set(e.maximum(top.get(), e.call_unary("fabs", self._x(e, x, e.add(start, i))[1])))
        largest = e.largest(top.get())
        zero = b.fcmp_ordered("==", largest, ir.Constant(F32, 0.0))
        largest = b.select(zero, limit, largest)
        return b.fdiv(largest, limit), e.splat(b.fdiv(limit, largest), STEP)

    def _pack_step(self, e: Emitter, a: Any, x: Any, out: Any, step: Any, rounding: tuple[Any, _Small | None]) -> Any:
        """Pack one step; returns what its elements count as in the group's sum."""
        (inverse, small), k, b = rounding, self._kind, e.builder
        raw, value = self._x(e, x, step)
        if k.steps:
            large = e.constant(value.type, ROUND)
            exact = b.fmul(value, inverse)
            value = b.fsub(b.fadd(exact, large), large)
            if small is not None:
                small.add(exact, value)
            if k.whole:
                kind = I8 if k.dot == "int8" else I16
                codes = b.trunc(b.fptosi(value, vector(I32, STEP)), vector(kind, STEP))
                e.store(self._ordered(e, codes), out, e.mul(step, STEP * kind.width // 8))
                return value
        if k.dot == "fp32":
            e.store(value, out, e.mul(step, 4 * STEP))
        elif k.x == "bf16":
            e.store(self._ordered(e, raw), out, e.mul(step, 2 * STEP))
        else:
            high = e.bf16_of_float(value)
            rest = b.fsub(value, e.float_of_bf16(high))
            rest = b.select(b.fcmp_ordered("ord", rest, rest), rest, e.zero(rest.type))  # Inf is its high part alone
            low = e.bf16_of_float(rest)
            e.store(self._ordered(e, high), out, e.mul(step, 2 * STEP))
            e.store(self._ordered(e, low), out, e.add(e.mul(step, 2 * STEP), e.field(a, Arg.X_TERM)))
        return value

    def _ordered(self, e: Emitter, elements: Any) -> Any:
        k = self._kind
        inside = [i + j * k.operands for i in range(k.operands) for j in range(k.per_word // k.operands)]
        return e.shuffle(elements, elements, [w + i for w in range(0, STEP, k.per_word) for i in inside])


class _Small:
    """What rounding to 16 bits does to the small activations of a group: those under an eighth of its largest.

    Where one activation is hundreds of times as large as the others, those keep few bits; and if its weights are zero,
    they are all there is. So nothing is multiplied in this form if the small ones are an eighth of a group or more and
    their error is above 2^-9 of them (root mean square), half of what rounding them to bf16 makes at most; nor if
    there is an Inf or NaN.
    """

    def __init__(self, e: Emitter) -> None:
        self._e = e
        self._errors, self._values, self._count = (e.variable(vector(F32, STEP)) for _ in range(3))

    def add(self, exact: Any, rounded: Any) -> None:
        """Elements in steps."""
        e, b = self._e, self._e.builder
        zero, kind = e.zero(exact.type), exact.type
        chosen = b.fcmp_ordered("<", e.call_unary("fabs", exact), e.constant(kind, 4096.0))
        error, value = b.fsub(exact, rounded), b.select(chosen, exact, zero)
        error = b.select(chosen, error, zero)
        self._errors.set(e.fma(error, error, self._errors.get()))
        self._values.set(e.fma(value, value, self._values.get()))
        self._count.set(b.fadd(self._count.get(), b.select(chosen, e.constant(kind, 1.0), zero)))

    def too_small(self, total: Any, steps: Any) -> Any:
        """total: of the group's integers, NaN if any is."""
        e, b = self._e, self._e.builder
        errors, values, count, total = (e.total(t) for t in (
            self._errors.get(), self._values.get(), self._count.get(), total))  # fmt: skip
        many = b.fcmp_ordered(">=", count, b.sitofp(e.mul(steps, STEP // 8), F32))
        limit = b.fmul(values, ir.Constant(F32, 2.0**-18))
        limit = b.select(b.fcmp_ordered(">", limit, ir.Constant(F32, 0.25)), limit, ir.Constant(F32, 0.25))
        return b.or_(b.and_(many, b.fcmp_ordered(">", errors, limit)), b.fcmp_unordered("uno", total, total))
