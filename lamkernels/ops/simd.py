"""SIMD building blocks of the Numba backend, emitted as LLVM vector IR.

``micro`` is the register-blocked inner product with the argmin fused in, ``pack`` the transposing load that feeds it.
Vectors have the host's width; LLVM splits or widens them where a target differs. Rows are SIMD lanes, so a code's
entry is broadcast and the running minimum needs no reduction across lanes.
"""

from __future__ import annotations

import functools
from typing import Any

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import config, types
from numba.core import cgutils
from numba.extending import intrinsic

# mypy: disable-error-code="no-untyped-call,no-any-return"


def _vector_bits() -> int:
    """The widest vectors that Numba compiles for: of the host, or of NUMBA_CPU_FEATURES where that is set."""
    named = config.CPU_FEATURES  # type: ignore[attr-defined]
    if named is None:
        features = llvm.get_host_cpu_features()
    else:
        features = {feature[1:]: feature[0] == "+" for feature in named.split(",") if feature}
    return 512 if features.get("avx512f") else 256 if features.get("avx2") else 128


BITS = _vector_bits()

# The register tile: vectors of rows times codes. 3·4 accumulators of AVX2's 16 registers leave room for three vectors
# of rows and a broadcast; AVX-512 has 32. Few codes to a tile, so that a small codebook is padded little.
VECTORS, TILE = (3, 8) if BITS == 512 else (3, 4)
CHAINS = 4  # sums of squares that grow side by side: as many as an addition takes cycles
I32, I64 = ir.IntType(32), ir.IntType(64)

# Storage types by the scalar that stands for them: bf16 and fp16 travel as bit patterns.
BF16, F16 = types.uint16, types.int16


def lanes(dtype: Any) -> int:
    """Rows per vector when computing in float32 or float64."""
    return BITS // (8 * np.dtype(dtype).itemsize)


def _real(dtype: Any) -> ir.Type:
    return ir.DoubleType() if dtype == types.float64 else ir.FloatType()


def _splat(builder: ir.IRBuilder, scalar: ir.Value, width: int) -> ir.Value:
    undefined = ir.Constant(ir.VectorType(scalar.type, width), ir.Undefined)
    one = builder.insert_element(undefined, scalar, ir.Constant(I32, 0))
    return builder.shuffle_vector(one, undefined, ir.Constant(ir.VectorType(I32, width), [0] * width))


def _load(builder: ir.IRBuilder, pointer: ir.Value, kind: ir.Type, align: int) -> ir.Value:
    value = builder.load(builder.bitcast(pointer, kind.as_pointer()))
    value.align = align
    return value


def _store(builder: ir.IRBuilder, value: ir.Value, pointer: ir.Value, align: int) -> None:
    builder.store(value, builder.bitcast(pointer, value.type.as_pointer())).align = align


def _widen(builder: ir.IRBuilder, value: ir.Value, storage: Any) -> ir.Value:
    """Stored values as the type they are computed in: bf16 and fp16 become fp32, exactly."""
    width = value.type.count if isinstance(value.type, ir.VectorType) else 0

    def shaped(kind: ir.Type) -> ir.Type:
        return ir.VectorType(kind, width) if width else kind

    if storage == BF16:
        bits = builder.zext(value, shaped(I32))
        shift = ir.Constant(shaped(I32), [16] * width if width else 16)
        return builder.bitcast(builder.shl(bits, shift), shaped(ir.FloatType()))
    if storage == F16:
        return builder.fpext(builder.bitcast(value, shaped(ir.HalfType())), shaped(ir.FloatType()))
    return value


def _stored(storage: Any) -> ir.Type:
    return ir.IntType(16) if storage in (BF16, F16) else _real(storage)


@intrinsic
def view(typingctx: Any, address: Any, offset: Any, tag: Any) -> Any:
    """The pointer to ``tag``'s type at an integer address, ``offset`` elements on."""
    pointer = types.CPointer(tag)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        base = builder.inttoptr(args[0], context.get_value_type(pointer))
        return builder.gep(base, [args[1]])

    return pointer(types.int64, types.int64, tag), codegen


@intrinsic
def words(typingctx: Any, pointer: Any) -> Any:
    """The pointer to the int64 parameters of a kernel; the type it is declared as says the kernel's dtype."""
    target = types.CPointer(types.int64)
    return target(pointer), lambda context, builder, signature, args: builder.bitcast(
        args[0], context.get_value_type(target)
    )


def _zero(kind: Any) -> Any:
    return lambda context, builder, signature, args: context.get_constant(kind, 0)


@intrinsic
def stored_type(typingctx: Any, pointer: Any) -> Any:
    """Zero of the type that a kernel's entries are stored in; see :func:`lamkernels.ops.parallel.compiled`."""
    return pointer.dtype(pointer), _zero(pointer.dtype)


@intrinsic
def computed_type(typingctx: Any, pointer: Any) -> Any:
    """Zero of the type that a kernel computes in: float64 for float64 entries, else float32."""
    kind = types.float64 if pointer.dtype == types.float64 else types.float32
    return kind(pointer), _zero(kind)


@intrinsic
def at(typingctx: Any, array: Any, index: Any) -> Any:
    """The pointer to element ``index`` of a contiguous array."""
    pointer = types.CPointer(array.dtype)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        return builder.gep(data, [args[1]])

    return pointer(array, types.intp), codegen


@intrinsic
def prefetch(typingctx: Any, pointer: Any) -> Any:
    """Asks for the cache line at an address, which need not exist."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        byte = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [byte, I32, I32, I32])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        hints = (ir.Constant(I32, hint) for hint in (0, 3, 1))  # a read, into every cache, of data
        builder.call(function, [builder.bitcast(args[0], byte), *hints])
        return context.get_dummy_value()

    return types.void(pointer), codegen


@intrinsic
def widen(typingctx: Any, value: Any) -> Any:
    """A stored scalar as the type it is computed in."""
    computed = types.float32 if value in (BF16, F16) else value

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _widen(builder, args[0], value)

    return computed(value), codegen


@intrinsic
def narrow(typingctx: Any, value: Any, tag: Any) -> Any:
    """A float32 or float64 scalar rounded to nearest even as the stored type of ``tag``."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        result = context.cast(builder, args[0], value, types.float64 if tag == types.float64 else types.float32)
        if tag == F16:
            return builder.bitcast(builder.fptrunc(result, ir.HalfType()), ir.IntType(16))
        if tag == BF16:
            bits = builder.bitcast(result, I32)
            odd = builder.and_(builder.lshr(bits, ir.Constant(I32, 16)), ir.Constant(I32, 1))
            rounded = builder.add(bits, builder.add(odd, ir.Constant(I32, 0x7FFF)))
            quiet = builder.or_(bits, ir.Constant(I32, 0x400000))  # rounding could carry a NaN into an infinity
            kept = builder.select(builder.fcmp_unordered("uno", result, result), quiet, rounded)
            return builder.trunc(builder.lshr(kept, ir.Constant(I32, 16)), ir.IntType(16))
        return result

    return tag(value, tag), codegen


@intrinsic
def fetch_add(typingctx: Any, array: Any, index: Any) -> Any:
    """Adds one to an int64 element atomically and returns what it was: the next task, or how many are done."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        return builder.atomic_rmw("add", builder.gep(data, [args[1]]), ir.Constant(I64, 1), "acq_rel")

    return types.int64(array, types.intp), codegen


def _transposed(builder: ir.IRBuilder, rows: list[ir.Value], storage: Any, block: int) -> list[ir.Value]:
    """The columns of a square of entries, widened, from the addresses of its rows.

    ``block`` is the number of entries in 128 bits. Loads put every block in the lane of its column's vector, and what
    is left is to transpose inside lanes: unpacks, which are one instruction each on x86 and on ARM.
    """
    width, stored = len(rows), _stored(storage)

    def shuffle(a: ir.Value, b: ir.Value, mask: list[int]) -> ir.Value:
        return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(I32, len(mask)), mask))

    def unpack(a: ir.Value, b: ir.Value, unit: int, high: bool) -> ir.Value:
        pattern: list[int] = []
        for start in range(0, width, block):
            first = start + (block // 2 if high else 0)
            for j in range(first, first + block // 2, unit):
                pattern += [*range(j, j + unit), *range(width + j, width + j + unit)]
        return shuffle(a, b, pattern)

    def load(row: ir.Value, first: int) -> ir.Value:
        part = _load(builder, builder.gep(row, [ir.Constant(I64, first)]), ir.VectorType(stored, block), 1)
        return _widen(builder, part, storage)

    columns = []
    for first in range(0, width, block):
        # vector i has, in lane after lane, the entries from ``first`` on of the rows i, block + i, 2·block + i, ...
        vectors = []
        for i in range(block):
            parts = [load(row, first) for row in rows[i::block]]
            while len(parts) > 1:
                size = 2 * parts[0].type.count
                parts = [shuffle(a, b, list(range(size))) for a, b in zip(parts[::2], parts[1::2], strict=True)]
            vectors += parts
        if block == 2:
            a, b = vectors
            columns += [unpack(a, b, 1, False), unpack(a, b, 1, True)]
        else:
            a, b, c, d = vectors
            ab, cd = ([unpack(p, q, 1, high) for high in (False, True)] for p, q in ((a, b), (c, d)))
            columns += [unpack(ab[i], cd[i], 2, high) for i in (0, 1) for high in (False, True)]
    return columns


@intrinsic
def pack(
    typingctx: Any, x: Any, stride: Any, dim: Any, mean: Any, limit: Any, out: Any, step: Any, bad: Any, square: Any
) -> Any:
    """Loads one vector of rows transposed, centres it, and marks rows that the fast path must not decide.

    x: pointer to the first row, ``stride`` elements before the second.
    out[d * step + lane] = x[lane, d] − mean[d]; square[lane] is the sum of the squares of the row's out, and bad[lane]
    is 1 where it is NaN or not below ``limit``.
    """
    storage, computed = x.dtype, out.dtype
    kind, width = _real(computed), lanes(computed.name)
    itemsize, stored = computed.bitwidth // 8, _stored(storage)
    vector = ir.VectorType(kind, width)

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        x, stride, dim, mean, limit, out, step, bad, square = args
        x = builder.bitcast(x, stored.as_pointer())
        # in turns: the sum of one column need not wait for that of the column before
        squares = [cgutils.alloca_once_value(builder, ir.Constant(vector, None)) for _ in range(CHAINS)]

        def emit(d: ir.Value, columns: list[ir.Value]) -> None:
            for j, column in enumerate(columns):
                entry = builder.add(d, ir.Constant(I64, j))
                centred = builder.fsub(column, _splat(builder, builder.load(builder.gep(mean, [entry])), width))
                _store(builder, centred, builder.gep(out, [builder.mul(entry, step)]), itemsize)
                product = builder.fmul(centred, centred, flags=("contract",))
                total = squares[j % CHAINS]
                builder.store(builder.fadd(product, builder.load(total), flags=("contract",)), total)

        whole = builder.and_(dim, ir.Constant(I64, -width))
        with cgutils.for_range_slice(builder, ir.Constant(I64, 0), whole, ir.Constant(I64, width)) as (d, _):
            row, rows = builder.gep(x, [d]), []
            for _ in range(width):
                rows.append(row)
                row = builder.gep(row, [stride])
            emit(d, _transposed(builder, rows, storage, 16 // itemsize))
        with cgutils.for_range_slice(builder, whole, dim, ir.Constant(I64, 1)) as (d, _):
            column = ir.Constant(ir.VectorType(stored, width), ir.Undefined)
            row = builder.gep(x, [d])
            for lane in range(width):
                column = builder.insert_element(column, builder.load(row), ir.Constant(I32, lane))
                row = builder.gep(row, [stride])
            emit(d, [_widen(builder, column, storage)])
        total = functools.reduce(builder.fadd, map(builder.load, squares))
        huge = builder.fcmp_unordered(">=", total, _splat(builder, limit, width))
        _store(builder, builder.zext(huge, ir.VectorType(ir.IntType(8), width)), bad, 1)
        _store(builder, total, square, itemsize)
        return context.get_dummy_value()

    i64 = types.int64
    return types.void(x, i64, i64, mean, computed, out, i64, bad, square), codegen


@intrinsic
def micro(typingctx: Any, t: Any, c: Any, half_norm: Any, dim: Any, code: Any, best: Any, index: Any) -> Any:
    """Scores of a tile of rows against a tile of codes, and the running minimum.

    t: [D, rows] packed rows; c: [D, TILE] packed *negated* codes; half_norm: [TILE], added after the products.
    best[row], index[row]: the least score so far and its code; a tie keeps the earlier one. ``code`` is the index
    of the first code of the tile.
    """
    return types.void(t, c, half_norm, types.int64, types.int64, best, index), _micro(t.dtype)


@intrinsic
def micro_runner_up(
    typingctx: Any, t: Any, c: Any, half_norm: Any, dim: Any, code: Any, best: Any, index: Any, second: Any
) -> Any:
    """:func:`micro` that also keeps second[row], the second least score so far."""
    return types.void(t, c, half_norm, types.int64, types.int64, best, index, second), _micro(t.dtype)


def product_tile(
    builder: ir.IRBuilder, rows: ir.Value, scalars: ir.Value, depth: ir.Value, computed: Any, vectors: int, tile: int,
    stride: int,
) -> list[ir.Value]:  # fmt: skip
    """The sums over n < depth of rows[n, :] · scalars[n, j], j < tile, in registers: vector r of j at j · vectors + r.

    rows: pointer to [depth, vectors · lanes]; scalars: pointer to [depth, stride]; depth is at least 1.
    """
    width, itemsize = lanes(computed.name), computed.bitwidth // 8
    vector = ir.VectorType(_real(computed), width)
    before = builder.block
    loop, done = builder.append_basic_block("products"), builder.append_basic_block("sums")
    builder.branch(loop)
    builder.position_at_end(loop)
    left, rows_at, scalars_at = builder.phi(I64), builder.phi(rows.type), builder.phi(scalars.type)
    accumulators = [builder.phi(vector) for _ in range(vectors * tile)]
    row = [
        _load(builder, builder.gep(rows_at, [ir.Constant(I64, r * width)]), vector, itemsize) for r in range(vectors)
    ]
    sums = []
    for j in range(tile):
        entry = _splat(builder, builder.load(builder.gep(scalars_at, [ir.Constant(I64, j)])), width)
        for r in range(vectors):
            # "contract" alone: a fused multiply-add, without the licence to assume that there is no NaN
            product = builder.fmul(entry, row[r], flags=("contract",))
            sums.append(builder.fadd(product, accumulators[j * vectors + r], flags=("contract",)))
    # pointers that advance, not products of an index, which would be formed again on every turn
    for phi, start, following in (
        (left, depth, builder.sub(left, ir.Constant(I64, 1))),
        (rows_at, rows, builder.gep(rows_at, [ir.Constant(I64, vectors * width)])),
        (scalars_at, scalars, builder.gep(scalars_at, [ir.Constant(I64, stride)])),
        *((phi, ir.Constant(vector, None), total) for phi, total in zip(accumulators, sums, strict=True)),
    ):
        phi.add_incoming(start, before)
        phi.add_incoming(following, loop)
    builder.cbranch(builder.icmp_signed(">", left, ir.Constant(I64, 1)), loop, done)
    builder.position_at_end(done)
    return sums


def _micro(computed: Any) -> Any:
    kind, width, itemsize = _real(computed), lanes(computed.name), computed.bitwidth // 8
    vector = ir.VectorType(kind, width)
    integer = ir.VectorType(I32, width)

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        t, c, half_norm, dim, code, best, index, *runner_up = args
        sums = product_tile(builder, t, c, dim, computed, VECTORS, TILE, TILE)
        code = builder.trunc(code, I32)
        norms = [
            _splat(builder, builder.load(builder.gep(half_norm, [ir.Constant(I64, j)])), width) for j in range(TILE)
        ]
        for r in range(VECTORS):
            best_at, index_at = (builder.gep(p, [ir.Constant(I64, r * width)]) for p in (best, index))
            least, chosen = _load(builder, best_at, vector, itemsize), _load(builder, index_at, integer, 4)
            second_at = [builder.gep(p, [ir.Constant(I64, r * width)]) for p in runner_up]
            second = [_load(builder, p, vector, itemsize) for p in second_at]
            for j in range(TILE):
                score = builder.fadd(sums[j * VECTORS + r], norms[j])
                less = builder.fcmp_ordered("<", score, least)
                for i, value in enumerate(second):  # the larger of score and least, if it is smaller than the second
                    larger = builder.select(less, least, score)
                    second[i] = builder.select(builder.fcmp_ordered("<", larger, value), larger, value)
                least = builder.select(less, score, least)
                number = builder.add(code, ir.Constant(integer.element, j))
                chosen = builder.select(less, _splat(builder, number, width), chosen)
            _store(builder, least, best_at, itemsize)
            _store(builder, chosen, index_at, 4)
            for value, p in zip(second, second_at, strict=True):
                _store(builder, value, p, itemsize)
        return context.get_dummy_value()

    return codegen


@intrinsic
def quantize_rows(
    typingctx: Any,
    x: Any,
    stride: Any,
    indices: Any,
    rows: Any,
    dim: Any,
    codes: Any,
    stored_codes: Any,
    quantized: Any,
    sums: Any,
    counts: Any,
    loss: Any,
    summing: Any,
    scales: Any,
    streamed: Any,
) -> Any:
    """Output, loss and statistics of a block of rows whose codes are known; rows of index −1 are passed over.

    x: pointer to the first of ``rows`` rows, ``stride`` elements apart; scales: what each is multiplied by; indices:
    their int64 codes; codes (K, D) in the computed type, stored_codes (K, D) in that of x. Writes quantized (rows, D);
    if ``summing``, adds the residuals to sums (K, D) and the rows to counts (K,). Adds the squared residuals to loss,
    in vectors of the computed type inside a block and in float64 between blocks. Returns how many rows were in.
    If ``streamed``, quantized goes past the caches and must be aligned to vectors (with x86 a locked instruction, as
    ``fetch_add`` is, must come before another thread reads it).
    """
    storage, computed = x.dtype, codes.dtype
    kind, width, itemsize = _real(computed), lanes(computed.name), computed.bitwidth // 8
    stored = _stored(storage)
    vector, stored_vector = ir.VectorType(kind, width), ir.VectorType(stored, width)
    stored_size = storage.bitwidth // 8

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        x, stride, indices, rows, dim, codes, stored_codes, quantized, sums, counts, loss, summing, scales, streamed = (
            args
        )
        x, stored_codes, quantized = (builder.bitcast(p, stored.as_pointer()) for p in (x, stored_codes, quantized))
        squares = cgutils.alloca_once_value(builder, ir.Constant(vector, None))
        tail_squares = cgutils.alloca_once_value(builder, ir.Constant(kind, 0.0))
        inside = cgutils.alloca_once_value(builder, ir.Constant(I64, 0))
        zero, one = ir.Constant(I64, 0), ir.Constant(I64, 1)
        whole = builder.and_(dim, ir.Constant(I64, -width))

        def entries(
            d: ir.Value, row: ir.Value, scale: ir.Value, offset: ir.Value, to: ir.Value, squares: ir.Value, wide: bool
        ) -> None:
            """``width`` entries of a row from d on, or one."""
            as_stored, as_computed = (stored_vector, vector) if wide else (stored, kind)
            at_code = builder.add(offset, d)
            entry = _widen(builder, _load(builder, builder.gep(row, [d]), as_stored, stored_size), storage)
            code = _load(builder, builder.gep(codes, [at_code]), as_computed, itemsize)
            copied = code
            if stored != kind:
                copied = _load(builder, builder.gep(stored_codes, [at_code]), as_stored, stored_size)
            if wide:
                with builder.if_else(streamed) as (past, through):
                    with past:
                        line = builder.store(copied, builder.bitcast(builder.gep(to, [d]), copied.type.as_pointer()))
                        line.align = width * stored_size
                        line.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(I32, 1)]))
                    with through:
                        _store(builder, copied, builder.gep(to, [d]), stored_size)
            else:
                _store(builder, copied, builder.gep(to, [d]), stored_size)
            residual = builder.fsub(builder.fmul(entry, _splat(builder, scale, width) if wide else scale), code)
            product = builder.fmul(residual, residual, flags=("contract",))
            builder.store(builder.fadd(product, builder.load(squares), flags=("contract",)), squares)
            with builder.if_then(summing):
                at_sum = builder.gep(sums, [at_code])
                _store(builder, builder.fadd(_load(builder, at_sum, as_computed, itemsize), residual), at_sum, itemsize)

        with cgutils.for_range_slice(builder, zero, rows, one) as (n, _):
            k = builder.load(builder.gep(indices, [n]))
            with builder.if_then(builder.icmp_signed(">=", k, zero), likely=True):
                builder.store(builder.add(builder.load(inside), one), inside)
                with builder.if_then(summing):
                    count = builder.gep(counts, [k])
                    builder.store(builder.add(builder.load(count), one), count)
                row, to = builder.gep(x, [builder.mul(n, stride)]), builder.gep(quantized, [builder.mul(n, dim)])
                offset, scale = builder.mul(k, dim), builder.load(builder.gep(scales, [n]))
                with cgutils.for_range_slice(builder, zero, whole, ir.Constant(I64, width)) as (d, _):
                    entries(d, row, scale, offset, to, squares, True)
                with cgutils.for_range_slice(builder, whole, dim, one) as (d, _):
                    entries(d, row, scale, offset, to, tail_squares, False)
        total = (
            builder.fpext(builder.load(tail_squares), ir.DoubleType()) if itemsize == 4 else builder.load(tail_squares)
        )
        lanes_of_squares = builder.load(squares)
        for lane in range(width):
            part = builder.extract_element(lanes_of_squares, ir.Constant(I32, lane))
            total = builder.fadd(total, builder.fpext(part, ir.DoubleType()) if itemsize == 4 else part)
        builder.store(builder.fadd(builder.load(loss), total), loss)
        return builder.load(inside)

    i64 = types.int64
    return i64(
        x, i64, indices, i64, i64, codes, stored_codes, quantized, sums, counts, loss, types.boolean, scales,
        types.boolean,
    ), codegen  # fmt: skip
