"""Power sums of 16 lanes at once, as vector IR: the inner loop of kernels/cpu/moments/moments.py.

LLVM may not reorder a float sum, so a plain loop over one stays scalar. Here the order is part of the code: lane i adds
the values i, i + stride, i + 2 stride..., in float64 and in registers, so results depend on no machine's vector width.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic as _intrinsic

from ..core.jit import with_address

LANES = 16
FLOAT32, BFLOAT16, FLOAT16, FLOAT64 = range(4)  # kinds of input
PLAIN, SHIFTED, MASKED = range(3)  # modes, see lane_sums
SHIFT, SCALE, COUNT, ZEROS, LOW, HIGH, S1, S2, S3, S4 = range(10)  # rows of `sums`
ROWS = 10

intrinsic: Any = _intrinsic  # its annotations know nothing of the typing context
_I16, _I32, _I64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)
_FLOAT, _DOUBLE = ir.FloatType(), ir.DoubleType()
_KEEP_IN_CACHE = 3
_ARGUMENTS = 12  # of lane_sums


def _vector(element: ir.Type, lanes: int = LANES) -> ir.VectorType:
    return ir.VectorType(element, lanes)


def _constant(element: ir.Type, value: Any) -> ir.Constant:
    return ir.Constant(_vector(element), [value] * LANES)


class _Loop:
    """Writes the loop of one kind, order and mode at a builder's position."""

    def __init__(self, builder: ir.IRBuilder, kind: int, order: int, mode: int) -> None:
        self.b, self.kind, self.order, self.mode = builder, kind, order, mode
        self.stored = {FLOAT32: _FLOAT, BFLOAT16: _I16, FLOAT16: _I16, FLOAT64: _DOUBLE}[kind]
        self.size = {FLOAT32: 4, BFLOAT16: 2, FLOAT16: 2, FLOAT64: 8}[kind]
        self.wide = _DOUBLE if kind == FLOAT64 else _FLOAT  # what comparisons see
        self.counted = (ZEROS, COUNT) if mode == MASKED else (ZEROS,)

    def call(self, name: str, result: ir.Type, *args: Any) -> Any:
        function = ir.FunctionType(result, [a.type for a in args])
        return self.b.call(cgutils.get_or_insert_function(self.b.module, function, name), args)

    def splat(self, scalar: Any) -> Any:
        nothing = ir.Constant(_vector(scalar.type), ir.Undefined)
        first = self.b.insert_element(nothing, scalar, ir.Constant(_I32, 0))
        return self.b.shuffle_vector(first, nothing, _constant(_I32, 0))

    def at(self, address: Any, offset: int, element: ir.Type, lanes: int = LANES) -> Any:
        moved = self.b.add(address, ir.Constant(_I64, offset))
        return self.b.inttoptr(moved, _vector(element, lanes).as_pointer())

    def get_row(self, sums: Any, row: int) -> Any:
        return self.b.load(self.at(sums, row * LANES * 8, _DOUBLE), align=8)

    def set_row(self, sums: Any, row: int, value: Any) -> None:
        self.b.store(value, self.at(sums, row * LANES * 8, _DOUBLE), align=8)

    def emit(
        self,
        address: Any,
        runs: Any,
        step_run: Any,
        steps: Any,
        stride: Any,
        lanes: Any,
        rest: Any,
        ahead: Any,
        sums: Any,
    ) -> None:
        b, same_width = self.b, self.wide is _DOUBLE
        live, tail = (self.first(lanes) if self.mode == MASKED else None), self.first(rest)
        shift, scale = self.get_row(sums, SHIFT), self.get_row(sums, SCALE)
        powers = (S1, S2, S3, S4)[: self.order]
        start: dict[Any, Any] = {row: self.get_row(sums, row) for row in powers}
        for row in (LOW, HIGH):
            bound = self.get_row(sums, row)
            start[row] = bound if same_width else b.fptrunc(bound, _vector(_FLOAT))
        for row in self.counted:
            start[row] = ir.Constant(_I64, 0) if self.mode == PLAIN else _constant(_I32, 0)

        entry = b.block
        run, walk, body, ended, last, after, done = (
            b.append_basic_block(name) for name in ("run", "walk", "body", "ended", "last", "after", "done")
        )
        b.branch(run)
        b.position_at_end(run)
        outer = self.phis({"run": ir.Constant(_I64, 0), "begin": address, **start}, entry)
        b.cbranch(b.icmp_unsigned("<", outer["run"], runs), walk, done)

        b.position_at_end(walk)
        sums_so_far = {key: value for key, value in outer.items() if key not in ("run", "begin")}
        state = self.phis({"step": ir.Constant(_I64, 0), "address": outer["begin"], **sums_so_far}, run)
        b.cbranch(b.icmp_unsigned("<", state["step"], steps), body, ended)

        b.position_at_end(body)
        following = self.step(state, live, ahead, shift, scale)
        following["step"] = b.add(state["step"], ir.Constant(_I64, 1))
        following["address"] = b.add(state["address"], stride)
        self.close(state, following)
        b.branch(walk)

        b.position_at_end(ended)
        b.cbranch(b.icmp_unsigned(">", rest, ir.Constant(_I64, 0)), last, after)
        b.position_at_end(last)
        with_tail = self.step(state, tail, ahead, shift, scale)
        from_last = b.block
        b.branch(after)
        b.position_at_end(after)
        following = self.phis({key: state[key] for key in start}, ended)
        for key, value in with_tail.items():
            following[key].add_incoming(value, from_last)
        following["run"] = b.add(outer["run"], ir.Constant(_I64, 1))
        following["begin"] = b.add(outer["begin"], step_run)
        self.close(outer, following)
        b.branch(run)

        b.position_at_end(done)
        for row in powers:
            self.set_row(sums, row, outer[row])
        for row in (LOW, HIGH):
            self.set_row(sums, row, outer[row] if same_width else b.fpext(outer[row], _vector(_DOUBLE)))
        if self.mode != MASKED:
            whole, partly = (self.splat(b.uitofp(n, _DOUBLE)) for n in (b.mul(runs, steps), runs))
            count = b.fadd(whole, b.select(tail, partly, _constant(_DOUBLE, 0.0)))
            self.set_row(sums, COUNT, b.fadd(self.get_row(sums, COUNT), count))
        for row in self.counted:
            if self.mode == PLAIN:  # a scalar; it belongs to no lane, so it goes to the first
                count = b.uitofp(outer[row], _DOUBLE)
                vector = b.insert_element(_constant(_DOUBLE, 0.0), count, ir.Constant(_I32, 0))
            else:
                vector = b.uitofp(outer[row], _vector(_DOUBLE))
            self.set_row(sums, row, b.fadd(self.get_row(sums, row), vector))

    def first(self, lanes: Any) -> Any:
        """A mask of the lanes below `lanes`."""
        return self.b.icmp_unsigned("<", ir.Constant(_vector(_I64), list(range(LANES))), self.splat(lanes))

    def phis(self, values: dict[Any, Any], block: Any) -> dict[Any, Any]:
        """Loop-carried values that are `values` when the loop is entered from `block`."""
        carried = {key: self.b.phi(value.type) for key, value in values.items()}
        for key, value in values.items():
            carried[key].add_incoming(value, block)
        return carried

    def close(self, carried: dict[Any, Any], following: dict[Any, Any]) -> None:
        for key, value in following.items():
            carried[key].add_incoming(value, self.b.block)

    def step(self, state: dict[Any, Any], live: Any, ahead: Any, shift: Any, scale: Any) -> dict[Any, Any]:
        """One vector: the loop-carried values after it."""
        b, new = self.b, {}
        x, d = self.read(state["address"], live, ahead)
        zero = b.fcmp_ordered("==", x, _constant(self.wide, 0.0))
        below, above = b.fcmp_ordered("<", x, state[LOW]), b.fcmp_ordered(">", x, state[HIGH])
        good = live
        if self.mode == MASKED:
            bits = 64 if self.wide is _DOUBLE else 32
            size = self.call(f"llvm.fabs.v{LANES}f{bits}", x.type, x)
            good = b.and_(live, b.fcmp_ordered("<", size, _constant(self.wide, float("inf"))))
            new[COUNT] = b.add(state[COUNT], b.zext(good, _vector(_I32)))
            d = b.fsub(b.fmul(d, scale), shift)
        elif self.mode == SHIFTED:
            d = b.fsub(d, shift)
        if good is not None:
            zero, below, above = (b.and_(good, test) for test in (zero, below, above))
            d = b.select(good, d, _constant(_DOUBLE, 0.0))
        new[LOW], new[HIGH] = b.select(below, x, state[LOW]), b.select(above, x, state[HIGH])
        if self.mode == PLAIN:
            number = self.call(f"llvm.ctpop.i{LANES}", _I16, b.bitcast(zero, _I16))
            new[ZEROS] = b.add(state[ZEROS], b.zext(number, _I64))
        else:
            new[ZEROS] = b.add(state[ZEROS], b.zext(zero, _vector(_I32)))

        new[S1] = b.fadd(state[S1], d)
        fma = f"llvm.fma.v{LANES}f64"
        if self.order == 2:
            new[S2] = self.call(fma, d.type, d, d, state[S2])
        else:
            square = b.fmul(d, d)
            new[S2] = b.fadd(state[S2], square)
            new[S3] = self.call(fma, d.type, square, d, state[S3])
            new[S4] = self.call(fma, d.type, square, square, state[S4])
        return new

    def read(self, address: Any, live: Any, ahead: Any) -> tuple[Any, Any]:
        """16 values as they are compared, and the same in float64. Lanes that are not live are not touched."""
        b, wide = self.b, None
        if self.kind == FLOAT32 and live is None:  # two loads that fold into the conversions: saves a shuffle a vector
            halves = [
                b.fpext(b.load(self.at(address, 32 * i, _FLOAT, 8), align=4), _vector(_DOUBLE, 8)) for i in (0, 1)
            ]
            wide = b.shuffle_vector(*halves, ir.Constant(_vector(_I32), list(range(LANES))))
        there = b.inttoptr(b.add(address, ahead), ir.IntType(8).as_pointer())
        hints = [ir.Constant(_I32, hint) for hint in (0, _KEEP_IN_CACHE, 1)]  # read, keep, data
        self.call("llvm.prefetch.p0", ir.VoidType(), there, *hints)
        pointer = self.at(address, 0, self.stored)
        if live is None:
            x = b.load(pointer, align=self.size)
        else:
            nothing = _constant(self.stored, 0 if self.stored is _I16 else 0.0)
            suffix = "i16" if self.stored is _I16 else f"f{8 * self.size}"
            name = f"llvm.masked.load.v{LANES}{suffix}.p0"
            x = self.call(name, nothing.type, pointer, ir.Constant(_I32, self.size), live, nothing)
        if self.kind == BFLOAT16:
            x = b.bitcast(b.shl(b.zext(x, _vector(_I32)), _constant(_I32, 16)), _vector(_FLOAT))
        elif self.kind == FLOAT16:
            x = b.fpext(b.bitcast(x, _vector(ir.HalfType())), _vector(_FLOAT))
        if wide is None:
            wide = x if self.wide is _DOUBLE else b.fpext(x, _vector(_DOUBLE))
        return x, wide


def _variants() -> list[tuple[int, int, int]]:
    """Every (kind, order, mode); MASKED is rare, so one order is enough."""
    kinds = (FLOAT32, BFLOAT16, FLOAT16, FLOAT64)
    common = [(kind, order, mode) for kind in kinds for order in (2, 4) for mode in (PLAIN, SHIFTED)]
    return common + [(kind, 4, MASKED) for kind in kinds]


@intrinsic
def _lane_sums(typingctx: Any, arguments: Any) -> Any:
    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind, order, mode, *rest = cgutils.unpack_tuple(builder, args[0], _ARGUMENTS)
        eight, four = (ir.Constant(_I64, n) for n in (8, 4))
        number = builder.add(builder.mul(builder.add(builder.mul(kind, eight), order), four), mode)
        done = builder.append_basic_block("done")
        switch = builder.switch(number, done)
        for variant in _variants():
            block = builder.append_basic_block("variant")
            switch.add_case(ir.Constant(_I64, (variant[0] * 8 + variant[1]) * 4 + variant[2]), block)
            builder.position_at_end(block)
            _Loop(builder, *variant).emit(*rest)
            builder.branch(done)
        builder.position_at_end(done)
        return context.get_dummy_value()

    return types.void(types.UniTuple(types.uintp, _ARGUMENTS)), codegen


@with_address(types.void(*[types.uintp] * _ARGUMENTS))
def lane_sums(kind, order, mode, address, runs, step_run, steps, stride, lanes, rest, ahead, sums):
    """Add `runs` runs, `step_run` bytes apart, to `sums`: the address of ROWS x LANES float64.

    A run is `steps` vectors of LANES values, `stride` bytes apart, and then `rest` < LANES values.

    S1..S4 sum d..d^4 (order 2: S1, S2), COUNT counts values, ZEROS those equal to 0, LOW and HIGH are the extremes.
    PLAIN: d = x, and ZEROS of all lanes is in the first. SHIFTED: d = x - SHIFT. In both a value that is not finite
    makes S1 so. MASKED: order 4, d = x * SCALE - SHIFT; of whole vectors only lanes below `lanes` are read, non-finite
    values are left out. `ahead`: bytes to prefetch ahead.
    """
    _lane_sums((kind, order, mode, address, runs, step_run, steps, stride, lanes, rest, ahead, sums))


@intrinsic
def call_lane_sums(typingctx: Any, function: Any, arguments: Any) -> Any:
    """lane_sums(*arguments), given its address: so the loops are compiled once, and not again in every caller."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [_I64] * _ARGUMENTS)
        pointer = builder.inttoptr(args[0], kind.as_pointer())
        builder.call(pointer, cgutils.unpack_tuple(builder, args[1], _ARGUMENTS))
        return context.get_dummy_value()

    return types.void(types.uintp, types.UniTuple(types.uintp, _ARGUMENTS)), codegen
