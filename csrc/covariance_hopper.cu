// Sums of products of columns on Hopper: parts += Σ w (x - shift)(y - shift)ᵀ, as products of bf16 halves of fp32.
//
// An entry is high + low, both bf16; high·high + high·low + low·high lacks low·low, which shows where all terms are
// positive: on the diagonal of a symmetric scatter, where those squares are added up apart. Products of different rows
// may be of equal columns anywhere, so there low·low is multiplied too. Blocks take tiles of 128 × 256 columns times a
// range of rows. One warpgroup reads rows, splits them and stores both halves in the order in which products read them;
// two multiply, 64 × 256 each. Products of 32 rows start from zero and are added to fp32 sums in registers, since tensor
// cores truncate what they add up; the sums go to fp64 memory, which the block owns, every 8192 rows.

constexpr int THREADS = 384, ROWS = 32, FLUSH = 8192, STAGES = 4;
constexpr int WIDE = 256, TALL = 128;                    // columns of y and of x of a tile
constexpr int CORE = 128;                                // bytes of 8 × 8 halves
constexpr int X_BYTES = ROWS / 8 * TALL / 8 * CORE, Y_BYTES = ROWS / 8 * WIDE / 8 * CORE;
constexpr int STAGE_BYTES = 2 * (X_BYTES + Y_BYTES);     // x high, x low, y high, y low
constexpr int AHEAD = 32;                                // rows that are brought to L2 before they are read
constexpr int BARRIERS = 128, TILE = 64;                  // bytes

struct Products {
    const float* x;           // (H, P, D)
    const float* y;           // (H, P, E): x itself where `symmetric`
    const double* given;      // (H, P) or null for ones
    double* weights;          // (H, P): 0 for a pair that is out
    const float* shift_x;     // (H, D)
    const float* shift_y;     // (H, E)
    double* parts;            // (H, S, D, E), zero before
    double* sums;             // (H, S, D): of w (x - shift), where `symmetric`
    double* low_squares;      // (H, S, D): what the diagonal lacks, likewise
    long long heads, num_pairs, dim, other;
    long long x_h, x_n, y_h, y_n, g_h, g_n;
    long long symmetric;      // only tiles that hold entries of the upper triangle
    long long splits, size;   // ranges of rows, and rows of one, a multiple of ROWS
};

// A warp a pair: its weight, 0 where that is not positive and finite or an entry is not finite.
extern "C" __global__ void __launch_bounds__(256) pair_weights(const Products p) {
    const long long pair = (long long)blockIdx.x * 8 + threadIdx.x / 32, head = pair / p.num_pairs, n = pair % p.num_pairs;
    if (head >= p.heads) return;
    const int lane = threadIdx.x % 32;
    const double weight = p.given ? p.given[head * p.g_h + n * p.g_n] : 1.0;
    int inside = weight > 0 && weight < INF;
    const float *x = p.x + head * p.x_h + n * p.x_n, *y = p.y + head * p.y_h + n * p.y_n;
#pragma unroll 4
    for (int d = lane; d < p.dim; d += 32) inside &= is_finite(x[d]);
    if (!p.symmetric)
#pragma unroll 4
        for (int d = lane; d < p.other; d += 32) inside &= is_finite(y[d]);
    inside = !__ballot_sync(ALL, !inside);
    if (lane == 0) p.weights[pair] = inside ? weight : 0.0;
}

struct Tile {
    long long head, split, first;  // row
    int rows, x, y;                // how many, and the first columns
    bool diagonal;                 // one tile of every 128 columns adds up their sums
};
static_assert(sizeof(Tile) <= TILE, "its place in shared memory");

__device__ inline Tile tile_of(const Products& p) {
    const int down = (p.dim + TALL - 1) / TALL, across = (p.other + WIDE - 1) / WIDE;
    int tiles = down * across;
    if (p.symmetric) {
        tiles = 0;
        for (int i = 0; i < down; ++i) tiles += across - i * TALL / WIDE;
    }
    int i = 0, j = blockIdx.x % tiles;
    if (p.symmetric)
        for (; j >= across - i * TALL / WIDE; ++i) j -= across - i * TALL / WIDE;
    else
        i = j / across, j %= across;
    const int first = p.symmetric ? i * TALL / WIDE : 0;
    Tile tile;
    tile.split = blockIdx.x / tiles;
    tile.head = tile.split / p.splits;
    tile.first = tile.split % p.splits * p.size;
    tile.rows = (int)(p.num_pairs - tile.first < p.size ? p.num_pairs - tile.first : p.size);
    tile.x = i * TALL;
    tile.y = (first + j) * WIDE;
    tile.diagonal = p.symmetric && j == 0;
    return tile;
}

struct Shared {
    Barrier *there, *read;  // [STAGES]
    unsigned char* stages;
    float *shift_x, *shift_y;
    Tile* tile;  // read again where it is needed: registers are few
};

__device__ inline Shared carve(unsigned char* memory) {
    Barrier* barriers = (Barrier*)memory;
    float* shifts = (float*)(memory + BARRIERS + STAGES * STAGE_BYTES);
    return {barriers, barriers + STAGES, memory + BARRIERS, shifts, shifts + TALL, (Tile*)(shifts + TALL + WIDE)};
}

struct Eight {
    Four<float> at[2];
};

// Eight columns of a row, of which `columns` are left; 0 past them.
__device__ inline Eight load(const float* row, int columns) {
    Eight entries = {};
#pragma unroll
    for (int i = 0; i < 2; ++i)
        if (columns > 4 * i) entries.at[i] = *(const Four<float>*)(row + 4 * i);
    return entries;
}

__device__ inline void less_high(const float (&values)[2], unsigned high, float (&rest)[2]) {
    rest[0] = values[0] - __uint_as_float(high << 16);
    rest[1] = values[1] - __uint_as_float(high & 0xffff0000u);
}

// The high and the low half of (entries - shift) · weight, to 16 bytes each; the values themselves are added up, and
// the products of their low halves with those of the unweighted ones.
template <bool SUMS>
__device__ inline void split(const Eight& entries, const float* shift, float weight, bool inside, unsigned char* high,
                             unsigned char* low, float (&sum)[8], float (&square)[8]) {
    Four<unsigned> highs, lows;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        float plain[2], value[2], rest[2];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const float entry = entries.at[i / 2].at[i % 2 * 2 + j] - shift[2 * i + j];
            plain[j] = inside ? entry : 0.0f;
            value[j] = plain[j] * weight;
        }
        highs.at[i] = two_bf16(value[0], value[1]);
        less_high(value, highs.at[i], rest);
        lows.at[i] = two_bf16(rest[0], rest[1]);
        if (SUMS) {
            float plain_rest[2];
            less_high(plain, two_bf16(plain[0], plain[1]), plain_rest);
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                sum[2 * i + j] += value[j];
                square[2 * i + j] = fmaf(rest[j], plain_rest[j], square[2 * i + j]);
            }
        }
    }
    *(Four<unsigned>*)high = highs;
    *(Four<unsigned>*)low = lows;
}

// What one thread of the warpgroup that splits reads of a row: thread t has row t % 8 of every 8, and columns t / 8 · 8 of
// every 128. In a tile on the diagonal those of x are among those of y.
struct Loaded {
    Eight x, y[2];
    float weight;
    bool inside;
};

// Where a thread reads: its columns of a row, how many of them there are, and how many rows are left of the range.
struct Place {
    const float *x, *y;
    const double* weight;
    int x_columns, y_columns, left;
};

template <bool DIAGONAL>
__device__ inline Loaded load_rows(const Products& p, Place& at) {
    Loaded loaded = {};
    if (!DIAGONAL && at.left > AHEAD) {
        if (at.x_columns > 0) prefetch(at.x + AHEAD * p.x_n);
        if (at.y_columns > 0) prefetch(at.y + AHEAD * p.y_n);
        if (at.y_columns > 128) prefetch(at.y + AHEAD * p.y_n + 128);
    }
    if (at.left > 0) {
        if (!DIAGONAL) loaded.x = load(at.x, at.x_columns);
        loaded.y[0] = load(at.y, at.y_columns);
        loaded.y[1] = load(at.y + 128, at.y_columns - 128);
        loaded.weight = (float)*at.weight;
        loaded.inside = *at.weight > 0;
    }
    at.x += 8 * p.x_n;
    at.y += 8 * p.y_n;
    at.weight += 8;
    at.left -= 8;
    return loaded;
}

// Eight threads have a part of the sums of the same columns each.
__device__ inline void add_sums(const Products& p, const Tile& tile, float (&values)[8], double* to) {
    const int column = tile.x + threadIdx.x / 8 * 8;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        double sum = values[i];
        for (int step = 1; step < 8; step *= 2) sum += __shfl_xor_sync(ALL, sum, step);
        if ((int)threadIdx.x % 8 == i && column + i < p.dim) atomicAdd(to + tile.split * p.dim + column + i, sum);
        values[i] = 0;
    }
}

template <bool DIAGONAL>
__device__ inline void split_rows(const Products& p, const Shared& s) {
    const Tile& tile = *s.tile;
    const int row = threadIdx.x % 8, chunk = threadIdx.x / 8, rows = tile.rows;
    const bool second = tile.x != tile.y;  // on the diagonal: x is the second half of y
    const long long first = tile.first + row;
    const int column_x = tile.x + chunk * 8, column_y = tile.y + chunk * 8;
    Place at = {p.x + tile.head * p.x_h + first * p.x_n + column_x,
                p.y + tile.head * p.y_h + first * p.y_n + column_y,
                p.weights + tile.head * p.num_pairs + first,
                (int)p.dim - column_x,
                (int)p.other - column_y,
                rows - row};
    float sum[8] = {}, square[8] = {};
    Loaded next = load_rows<DIAGONAL>(p, at);
    int stage = 0, lap = 0;
    for (int start = 0; start < rows; start += ROWS) {
        unsigned char* x = s.stages + stage * STAGE_BYTES + chunk * CORE + row * 16;
        unsigned char* y = x + 2 * X_BYTES;
        wait(s.read + stage, lap ^ 1);
#pragma unroll
        for (int group = 0; group < ROWS / 8; ++group, x += TALL / 8 * CORE, y += WIDE / 8 * CORE) {
            const Loaded now = next;
            next = load_rows<DIAGONAL>(p, at);
            Eight of_x = now.x;
            if (DIAGONAL)
#pragma unroll
                for (int i = 0; i < 8; ++i)
                    of_x.at[i / 4].at[i % 4] = second ? now.y[1].at[i / 4].at[i % 4] : now.y[0].at[i / 4].at[i % 4];
            split<DIAGONAL>(of_x, s.shift_x + chunk * 8, now.weight, now.inside, x, x + X_BYTES, sum, square);
            split<false>(now.y[0], s.shift_y + chunk * 8, 1.0f, now.inside, y, y + Y_BYTES, sum, square);
            unsigned char* half = y + 16 * CORE;
            split<false>(now.y[1], s.shift_y + 128 + chunk * 8, 1.0f, now.inside, half, half + Y_BYTES, sum, square);
        }
        publish_stores();
        __syncwarp();
        if (threadIdx.x % 32 == 0) arrive(s.there + stage);
        if (++stage == STAGES) stage = 0, lap ^= 1;
        if (DIAGONAL && (start % FLUSH == FLUSH - ROWS || start + ROWS >= rows)) {
            add_sums(p, tile, sum, p.sums);
            add_sums(p, tile, square, p.low_squares);
        }
    }
}

// 64 × 128 products of 32 rows: the small terms first, while there is nothing for them to be truncated against.
template <bool SYMMETRIC>
__device__ inline void multiply_rows(float (&product)[64], const unsigned char* x, const unsigned char* y) {
    constexpr int X_STEP = 2 * TALL / 8 * CORE, Y_STEP = 2 * WIDE / 8 * CORE;  // of 16 rows
    constexpr int FIRST = SYMMETRIC ? 2 : 3;
    hold(product);
    begin_products();
#pragma unroll
    for (int term = FIRST; term >= 0; --term)  // bits: the low half of x, the low half of y
#pragma unroll
        for (int s = 0; s < ROWS / 16; ++s) {
            const unsigned long long a = factor(x + (term / 2) * X_BYTES + s * X_STEP, TALL / 8 * CORE, CORE);
            const unsigned long long b = factor(y + (term % 2) * Y_BYTES + s * Y_STEP, WIDE / 8 * CORE, CORE);
            multiply_transposed(product, a, b, term < FIRST || s > 0);
        }
    commit_products();
    wait_products();
    hold(product);
}

// A warpgroup's 64 × 128 sums to the block's part of fp64 memory, and zero afterwards. Nobody else adds to it: these are
// atomic only because such additions need not be waited for.
__device__ inline void flush(const Products& p, const Tile& tile, float (&sums)[64], int x, int y) {
    const int row = x + threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4, column = y + threadIdx.x % 4 * 2;
    double* part = p.parts + tile.split * p.dim * p.other;
#pragma unroll
    for (int i = 0; i < 64; ++i) {
        const int d = row + i % 4 / 2 * 8, e = column + i / 4 * 8 + i % 2;
        if (d < p.dim && e < p.other) atomicAdd(part + d * p.other + e, (double)sums[i]);
        sums[i] = 0;
    }
}

template <bool SYMMETRIC>
__device__ inline void add_products(const Products& p, const Shared& s) {
    const Tile& tile = *s.tile;
    const int group = threadIdx.x / 128 - 1, rows = tile.rows;
    float left[64] = {}, right[64] = {};
    int stage = 0, lap = 0;
    for (int start = 0; start < rows; start += ROWS) {
        const unsigned char* x = s.stages + stage * STAGE_BYTES + group * 64 / 8 * CORE;
        const unsigned char* y = s.stages + stage * STAGE_BYTES + 2 * X_BYTES;
        float product[64];
        wait(s.there + stage, lap);
        multiply_rows<SYMMETRIC>(product, x, y);
#pragma unroll
        for (int i = 0; i < 64; ++i) left[i] += product[i];
        multiply_rows<SYMMETRIC>(product, x, y + 16 * CORE);
        __syncwarp();
        if (threadIdx.x % 32 == 0) arrive(s.read + stage);
#pragma unroll
        for (int i = 0; i < 64; ++i) right[i] += product[i];
        if (++stage == STAGES) stage = 0, lap ^= 1;
        if (start % FLUSH == FLUSH - ROWS || start + ROWS >= rows) {
            flush(p, tile, left, tile.x + group * 64, tile.y);
            flush(p, tile, right, tile.x + group * 64, tile.y + 128);
        }
    }
}

template <bool SYMMETRIC>
__device__ inline void products_of_columns(const Products& p) {
    extern __shared__ __align__(128) unsigned char memory[];
    const Shared s = carve(memory);
    if (threadIdx.x == 0) {
        *s.tile = tile_of(p);
        for (int i = 0; i < STAGES; ++i) {
            init_barrier(s.there + i, 4);  // a warp arrives once
            init_barrier(s.read + i, 8);
        }
        publish_barriers();
    }
    __syncthreads();
    const Tile& tile = *s.tile;
    for (int d = threadIdx.x; d < TALL; d += THREADS)
        s.shift_x[d] = tile.x + d < p.dim ? p.shift_x[tile.head * p.dim + tile.x + d] : 0.0f;
    for (int d = threadIdx.x; d < WIDE; d += THREADS)
        s.shift_y[d] = tile.y + d < p.other ? p.shift_y[tile.head * p.other + tile.y + d] : 0.0f;
    __syncthreads();
    if (threadIdx.x >= 128) {
        take_registers<208>();
        add_products<SYMMETRIC>(p, s);
    } else {
        give_registers<88>();
        if (SYMMETRIC && tile.diagonal)
            split_rows<true>(p, s);
        else
            split_rows<false>(p, s);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) column_products(const Products p) { products_of_columns<true>(p); }
extern "C" __global__ void __launch_bounds__(THREADS, 1) cross_products(const Products p) { products_of_columns<false>(p); }
