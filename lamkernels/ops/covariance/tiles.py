"""The two inner loops of the CPU kernel, as LLVM vector IR: packing rows into panels, and products of panels.

A panel is ``WIDTH`` columns of up to a few hundred rows, [rows, WIDTH], zero where there is no column or the row is
out. The same panel serves as the factor whose entries are SIMD lanes and as the one whose entries are broadcast.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from lamkernels.ops.simd import BITS, I32, I64, _load, _real, _splat, _store, _stored, _widen, lanes, product_tile

# mypy: disable-error-code="no-untyped-call,no-any-return"

# The register tile: VECTORS of columns times TILE broadcast ones; TILE divides the width of a panel. 16 accumulators of
# AVX-512's 32 registers, 8 of AVX2's 16.
VECTORS, TILE = (2, 8) if BITS == 512 else (2, 4)


@intrinsic
def panel_width(typingctx: Any, computed: Any) -> Any:
    """Columns of a panel of values of this type, in compiled code."""
    width = VECTORS * lanes(computed.name)
    return types.int64(computed), lambda context, builder, signature, args: ir.Constant(I64, width)


@intrinsic
def pack_panel(
    typingctx: Any,
    x: Any,
    stride: Any,
    rows: Any,
    weights: Any,
    first: Any,
    count: Any,
    columns: Any,
    shift: Any,
    unit: Any,
    dither: Any,
    scaling: Any,
    out: Any,
    sums: Any,
    dithered: Any,
    largest: Any,
) -> Any:
    """Packs ``count`` rows of a panel as c = x − shift − dither·unit, or w·c if ``scaling``, and adds up w·c.

    x: pointer to the first column of row 0, rows ``stride`` elements apart. rows: address of the int64 numbers of the
    rows, or 0: the n-th is ``first + n`` or rows[first + n]. weights: address of their float64 weights, or 0; a row
    whose weight is not positive is not read and becomes zeros. columns: how many there are from here on. shift and
    unit: pointers. sums: address of [WIDTH] float64 sums to add to; dithered: the same for dither times the sums. They
    are in the computed type inside a call. largest: pointer to an int64 that becomes the bits of the largest |c|, which
    for a NaN are larger than those of infinity.
    """
    storage, computed = x.dtype, out.dtype
    kind, width, size = _real(computed), lanes(computed.name), computed.bitwidth // 8
    stored, integer = _stored(storage), ir.IntType(computed.bitwidth)
    vector, whole_numbers = ir.VectorType(kind, width), ir.VectorType(integer, width)
    wide, stored_vector = ir.VectorType(ir.DoubleType(), width), ir.VectorType(stored, width)
    zero, one, step = ir.Constant(I64, 0), ir.Constant(I64, 1), ir.Constant(I64, VECTORS * width)

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        x, stride, rows, weights, first, count, columns, shift, unit, dither, scaling, out, sums, dithered, largest = (
            args
        )
        x = builder.bitcast(x, stored.as_pointer())
        row_numbers = builder.inttoptr(rows, I64.as_pointer())
        row_weights = builder.inttoptr(weights, ir.DoubleType().as_pointer())
        listed, weighted = (builder.icmp_unsigned("!=", address, zero) for address in (rows, weights))
        totals = [cgutils.alloca_once_value(builder, ir.Constant(vector, None)) for _ in range(VECTORS)]
        bits = [cgutils.alloca_once_value(builder, ir.Constant(whole_numbers, None)) for _ in range(VECTORS)]
        masked_load = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(
                stored_vector, [stored_vector.as_pointer(), I32, ir.VectorType(ir.IntType(1), width), stored_vector]
            ),
            f"llvm.masked.load.v{width}{'i16' if isinstance(stored, ir.IntType) else f'f{storage.bitwidth}'}.p0",
        )
        most = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(integer, [whole_numbers]),
            f"llvm.vector.reduce.umax.v{width}i{computed.bitwidth}",
        )
        magnitude = ir.Constant(whole_numbers, [(1 << (computed.bitwidth - 1)) - 1] * width)
        starts = [ir.Constant(I64, v * width) for v in range(VECTORS)]
        number = ir.Constant(ir.VectorType(I64, width), list(range(width)))
        inside = [
            builder.icmp_signed("<", number, _splat(builder, builder.sub(columns, start), width)) for start in starts
        ]
        shifts: list[ir.Value] = []
        dithers: list[ir.Value] = []
        for start, mask in zip(starts, inside, strict=True):
            # not masked loads: shifts are padded to whole panels
            for pointer, found in ((shift, shifts), (unit, dithers)):
                value = _load(builder, builder.gep(pointer, [start]), vector, size)
                found.append(builder.select(mask, value, ir.Constant(vector, None)))
        dithers = [builder.fmul(value, _splat(builder, dither, width)) for value in dithers]

        def pack_rows(whole: bool) -> None:
            with cgutils.for_range_slice(builder, zero, count, one) as (n, _):
                place = builder.add(first, n)
                row, weight = cgutils.alloca_once(builder, I64), cgutils.alloca_once(builder, ir.DoubleType())
                builder.store(place, row)
                builder.store(ir.Constant(ir.DoubleType(), 1.0), weight)
                with builder.if_then(listed):
                    builder.store(builder.load(builder.gep(row_numbers, [place])), row)
                with builder.if_then(weighted):
                    builder.store(builder.load(builder.gep(row_weights, [place])), weight)
                to = builder.gep(out, [builder.mul(n, step)])
                source = builder.gep(x, [builder.mul(builder.load(row), stride)])
                w = builder.load(weight)
                positive = builder.fcmp_ordered(">", w, ir.Constant(ir.DoubleType(), 0.0))
                with builder.if_else(positive, likely=True) as (counted, left_out):
                    with counted:
                        factor = _splat(builder, w if size == 8 else builder.fptrunc(w, kind), width)
                        for v, start in enumerate(starts):
                            pointer = builder.gep(source, [start])
                            if whole:
                                entry = _load(builder, pointer, stored_vector, storage.bitwidth // 8)
                            else:
                                pointer = builder.bitcast(pointer, stored_vector.as_pointer())
                                align = ir.Constant(I32, storage.bitwidth // 8)
                                zeros = ir.Constant(stored_vector, None)
                                entry = builder.call(masked_load, [pointer, align, inside[v], zeros])
                            entry = _widen(builder, entry, storage)
                            if size == 8 and entry.type != vector:
                                entry = builder.fpext(entry, vector)
                            # in two steps: shift + dither·unit need not have a value of the type
                            centred = builder.fsub(builder.fsub(entry, shifts[v]), dithers[v])
                            absolute = builder.and_(builder.bitcast(centred, whole_numbers), magnitude)
                            before = builder.load(bits[v])
                            larger = builder.icmp_unsigned(">", absolute, before)
                            builder.store(builder.select(larger, absolute, before), bits[v])
                            weighed = builder.fmul(centred, factor)
                            builder.store(builder.fadd(builder.load(totals[v]), weighed), totals[v])
                            _store(builder, builder.select(scaling, weighed, centred), builder.gep(to, [start]), size)
                    with left_out:
                        for start in starts:
                            _store(builder, ir.Constant(vector, None), builder.gep(to, [start]), size)

        with builder.if_else(builder.icmp_signed(">=", columns, step), likely=True) as (full, partial):
            with full:
                pack_rows(True)
            with partial:
                pack_rows(False)
        for v in range(VECTORS):
            found = builder.call(most, [builder.load(bits[v])])
            found = found if size == 8 else builder.zext(found, I64)
            before = builder.load(largest)
            builder.store(builder.select(builder.icmp_unsigned(">", found, before), found, before), largest)
            total = builder.load(totals[v])
            total = total if size == 8 else builder.fpext(total, wide)
            times = dither if size == 8 else builder.fpext(dither, ir.DoubleType())
            for address, term in ((sums, total), (dithered, builder.fmul(total, _splat(builder, times, width)))):
                to = builder.gep(builder.inttoptr(address, ir.DoubleType().as_pointer()), [starts[v]])
                _store(builder, builder.fadd(_load(builder, to, wide, 8), term), to, 8)
        return context.get_dummy_value()

    i64 = types.int64
    to = types.CPointer(i64)
    signature = types.void(
        x, i64, i64, i64, i64, i64, i64, shift, unit, computed, types.boolean, out, i64, i64, to
    )  # fmt: skip
    return signature, codegen


@intrinsic
def add_products(typingctx: Any, left: Any, right: Any, depth: Any, out: Any, stride: Any) -> Any:
    """out[i, j] += Σ_n left[n, i] · right[n, j] for TILE columns i and all columns j of a panel, over ``depth`` rows.

    left: pointer to the first of TILE neighbouring columns in a panel; right: pointer to a panel; out: pointer to
    float64, rows ``stride`` elements apart. The sums over n are in the computed type.
    """
    computed = left.dtype
    width, size = lanes(computed.name), computed.bitwidth // 8
    wide = ir.VectorType(ir.DoubleType(), width)

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        left, right, depth, out, stride = args
        sums = product_tile(builder, right, left, depth, computed, VECTORS, TILE, VECTORS * width)
        for i in range(TILE):
            row = builder.gep(out, [builder.mul(stride, ir.Constant(I64, i))])
            for v in range(VECTORS):
                to = builder.gep(row, [ir.Constant(I64, v * width)])
                total = sums[i * VECTORS + v] if size == 8 else builder.fpext(sums[i * VECTORS + v], wide)
                _store(builder, builder.fadd(_load(builder, to, wide, 8), total), to, 8)
        return context.get_dummy_value()

    i64 = types.int64
    return types.void(left, right, i64, types.CPointer(types.float64), i64), codegen
