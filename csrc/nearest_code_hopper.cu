// nearest_code of many half rows in a codebook of any size, on Hopper: rows stay in registers, codes stream past them.
//
// Two kernels make the codebook ready: tiles of codes in the order in which products read them, each with half the
// squared norms of its codes, so that one bulk copy brings a tile. In the lookup a block takes 256 rows after another.
// One warpgroup copies rows and tiles of codes into shared memory; two multiply, 2 × 64 rows each. While the
// tensor cores work on one half of a warpgroup's rows, the warpgroup looks for the smallest scores of the other.
//
// A score is half the squared norm, less the smallest one, less the product; it is added last (docs/numerics.md). Rows
// that fp32 must not decide are scanned in fp64 by the last kernel, which also computes distances where they are wanted.

#ifndef DIM
#define DIM 64  // entries of a row, a multiple of 8 up to 256
#endif

constexpr int THREADS = 384, GROUPS = 2, HALVES = 2, ROWS = 64 * HALVES * GROUPS;
constexpr int STEPS = (DIM + 15) / 16;        // of 16 entries, a product each
constexpr int CODES = STEPS > 8 ? 64 : 128;   // of a tile
constexpr int ROW_BYTES = 32 * STEPS + 16;    // eight rows then start in different banks
constexpr int CODE_BYTES = 32 * STEPS * CODES, TILE_BYTES = CODE_BYTES + 4 * CODES;
constexpr int SHARED = 227 * 1024, BARRIERS = 128;
constexpr int FITTING = (SHARED - BARRIERS - ROWS * ROW_BYTES) / TILE_BYTES;
constexpr int STAGES = FITTING < 6 ? FITTING : 6;  // tiles in shared memory
constexpr int COPIERS = 96;  // threads that copy rows
constexpr int UNDECIDED = -2;  // for now, the index of a row that fp32 must not decide
static_assert(DIM % 8 == 0 && STAGES >= 2, "rows in groups of 16 bytes, and two tiles");

using Half = PRODUCT_TYPE;

struct Lookup {
    const Half* x;             // (H, N, D), or (H, B, L, D): row n is at (n / x_l) * x_b + (n % x_l) * x_n
    const Half* codebook;      // (H, K, D)
    unsigned char* tiles;      // (H, code_tiles, TILE_BYTES)
    double* norms;             // (H, code_tiles * CODES) half the squared norm, inf for a code that is not finite
    float* largest;            // (H, code_tiles * CODES) magnitude of an entry
    float* limits;             // (2, H): a row of largest entry below or above is not for fp32; the second -1 for none
    long long* indices;        // (H, N): -1 for a row that is not finite, or where no code is
    float* distance;           // (H, N) or null
    long long heads, num_rows, num_codes, code_tiles;
    long long x_h, x_b, x_l, x_n, c_h, c_k;
    long long dot;             // metric: the largest product instead of the smallest distance
};

// Where entry d of code c of a tile lies, in bytes: 8 × 8 halves side by side, then those of the next codes.
__device__ inline int place(int c, int d) { return (d / 8 * CODES + c) * 16 + d % 8 * 2; }

// A warp a code, padded ones too.
extern "C" __global__ void __launch_bounds__(256) ready_codes(const Lookup p) {
    const long long padded = p.code_tiles * CODES, code = (long long)blockIdx.x * 8 + threadIdx.x / 32;
    const long long head = code / padded, k = code % padded;
    if (head >= p.heads) return;
    const int lane = threadIdx.x % 32;
    const Half* entries = p.codebook + head * p.c_h + k * p.c_k;
    int finite = k < p.num_codes;
    double square = 0;
    float largest = 0;
    for (int d = lane; finite && d < DIM; d += 32) {
        const float entry = wide(entries[d]);
        finite = is_finite(entry);
        square = fma((double)entry, (double)entry, square);
        largest = fmaxf(largest, fabsf(entry));
    }
    for (int step = 16; step > 0; step /= 2) {
        finite &= __shfl_xor_sync(ALL, finite, step);
        square += __shfl_xor_sync(ALL, square, step);
        largest = fmaxf(largest, __shfl_xor_sync(ALL, largest, step));
    }
    unsigned char* tile = p.tiles + (head * p.code_tiles + k / CODES) * TILE_BYTES;
    for (int d = lane; d < 16 * STEPS; d += 32) {
        const bool given = finite && d < DIM;
        *(unsigned short*)(tile + place(k % CODES, d)) = given ? entries[d].bits : 0;
    }
    if (lane == 0) {
        p.norms[code] = finite ? 0.5 * square : INF;
        p.largest[code] = finite ? largest : 0.0f;
    }
}

// A block a head: norms less the smallest one, into the tiles, and the limit.
extern "C" __global__ void __launch_bounds__(256) ready_norms(const Lookup p) {
    extern __shared__ __align__(128) unsigned char memory[];
    double *smallest = (double*)memory, *longest = smallest + 8;
    float* largest = (float*)(longest + 8);
    const long long padded = p.code_tiles * CODES, head = blockIdx.x;
    const double* norms = p.norms + head * padded;
    double low = INF, high = 0;
    float entry = 0;
    for (long long k = threadIdx.x; k < padded; k += 256) {
        low = fmin(low, norms[k]);
        if (norms[k] < INF) high = fmax(high, norms[k]);
        entry = fmaxf(entry, p.largest[head * padded + k]);
    }
    for (int step = 16; step > 0; step /= 2) {
        low = fmin(low, __shfl_xor_sync(ALL, low, step));
        high = fmax(high, __shfl_xor_sync(ALL, high, step));
        entry = fmaxf(entry, __shfl_xor_sync(ALL, entry, step));
    }
    const int warp = threadIdx.x / 32;
    if (threadIdx.x % 32 == 0) smallest[warp] = low, longest[warp] = high, largest[warp] = entry;
    __syncthreads();
    for (int w = 0; w < 8; ++w) {
        low = fmin(low, smallest[w]);
        high = fmax(high, longest[w]);
        entry = fmaxf(entry, largest[w]);
    }
    for (long long k = threadIdx.x; k < padded; k += 256) {
        unsigned char* tile = p.tiles + (head * p.code_tiles + k / CODES) * TILE_BYTES;
        const bool finite = norms[k] < INF;
        ((float*)(tile + CODE_BYTES))[k % CODES] = !finite ? INF : p.dot ? 0.0f : (float)(norms[k] - low);
    }
    // below 2^-40 the product of two entries may underflow, above 2^120 a sum of products may overflow
    const bool safe = (float)high < 0x1p120f && (entry >= 0x1p-40f || entry == 0);
    const float limit = fminf(0x1p120f / (fmaxf(entry, 0x1p-40f) * DIM), 0x1p120f);
    if (threadIdx.x == 0) {
        p.limits[head] = 0x1p-100f / fmaxf(entry, 0x1p-40f);  // all products of the row may underflow
        p.limits[p.heads + head] = safe ? limit : -1.0f;
    }
}

__device__ inline const Half* row_at(const Lookup& p, int head, int n) {
    const int length = p.x_l;
    return p.x + head * p.x_h + (length == 1 ? n * p.x_b : n / length * p.x_b + n % length * p.x_n);
}

// The barriers, tiles and rows of a block.
struct Shared {
    Barrier *rows_there, *rows_read;    // a phase for every 256 rows
    Barrier *tile_there, *tile_read;    // [STAGES]
    unsigned char *rows, *tiles;
};

__device__ inline Shared carve(unsigned char* memory) {
    Barrier* barriers = (Barrier*)memory;
    return {barriers, barriers + 1, barriers + 2, barriers + 2 + STAGES, memory + BARRIERS,
            memory + BARRIERS + ROWS * ROW_BYTES};
}

// The first warpgroup: what the products need, as soon as there is room. One warp copies tiles of codes, the others rows.
__device__ inline void copy_codes(const Lookup& p, const Shared& s) {
    const int row_tiles = (p.num_rows + ROWS - 1) / ROWS;
    int stage = 0, lap = 0;
    for (int tile = blockIdx.x; tile < p.heads * row_tiles; tile += gridDim.x) {
        const unsigned char* codes = p.tiles + tile / row_tiles * p.code_tiles * TILE_BYTES;
        for (int t = 0; t < p.code_tiles; ++t, codes += TILE_BYTES) {
            wait(s.tile_read + stage, lap ^ 1);
            if (threadIdx.x == 0) {
                arrive_expecting(s.tile_there + stage, TILE_BYTES);
                copy_async(s.tiles + stage * TILE_BYTES, codes, TILE_BYTES, s.tile_there + stage);
            }
            if (++stage == STAGES) stage = 0, lap ^= 1;
        }
    }
}

__device__ inline void copy_rows(const Lookup& p, const Shared& s) {
    const int row_tiles = (p.num_rows + ROWS - 1) / ROWS;
    int turn = 0;
    for (int tile = blockIdx.x; tile < p.heads * row_tiles; tile += gridDim.x, ++turn) {
        const int head = tile / row_tiles, first = tile % row_tiles * ROWS, present = min((int)p.num_rows - first, ROWS);
        wait(s.rows_read, turn % 2 ^ 1);
        for (int piece = threadIdx.x - 32; piece < present * (DIM / 8); piece += COPIERS) {
            const int row = piece / (DIM / 8), eighth = piece % (DIM / 8);
            copy_sixteen(s.rows + row * ROW_BYTES + eighth * 16, row_at(p, head, first + row) + eighth * 8);
        }
        arrive_after_copies(s.rows_there);
    }
}

// Of 64 rows: what a thread of a warpgroup knows of its two, which it shares with the three lanes beside it.
struct Nearest {
    unsigned entries[STEPS][4];  // a factor of products
    float score[2];
    int index[2];
    bool scan[2];
};

__device__ inline void load_rows(Nearest& rows, const unsigned char* first, float lowest, float highest) {
    const int lane = threadIdx.x % 32;
    const unsigned char* at = first + (threadIdx.x / 32 % 4 * 16 + lane / 4) * ROW_BYTES + lane % 4 * 4;
    unsigned largest[2] = {};
#pragma unroll
    for (int s = 0; s < STEPS; ++s)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const unsigned two = *(const unsigned*)(at + i % 2 * 8 * ROW_BYTES + s * 32 + i / 2 * 16);
            rows.entries[s][i] = two;
            largest[i % 2] = max(largest[i % 2], max(two & 0x7fff, two >> 16 & 0x7fff));  // a NaN is the largest
        }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        for (int step = 1; step < 4; step *= 2) largest[i] = max(largest[i], __shfl_xor_sync(ALL, largest[i], step));
        Half entry;
        entry.bits = (unsigned short)largest[i];
        const float size = wide(entry);
        rows.scan[i] = !(size <= highest) || (size > 0 && size < lowest);
        rows.score[i] = INF;
        rows.index[i] = -1;
    }
}

__device__ inline void start_products(float (&product)[CODES / 2], const Nearest& rows, const unsigned char* tile) {
    hold(product);
    begin_products();
#pragma unroll
    for (int s = 0; s < STEPS; ++s)
        multiply(product, rows.entries[s], factor(tile + s * CODES * 32, CODES * 16, 128), s > 0);
    commit_products();
}

// Products of 64 rows and a tile of codes, the first of which is `first`, to the best scores so far. The codes are looked
// at one by one only where the best of the tile is better than what any of the row's four lanes has: an equal one is later.
__device__ inline void keep_nearest(Nearest& rows, float (&product)[CODES / 2], const unsigned char* tile, int first) {
    hold(product);
    const int column = threadIdx.x % 4 * 2;
    const float* norms = (const float*)(tile + CODE_BYTES) + column;
    float low[2] = {INF, INF};
#pragma unroll
    for (int c = 0; c < CODES / 8; ++c)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            product[4 * c + i] = norms[8 * c + i % 2] - product[4 * c + i];
            low[i / 2] = fminf(low[i / 2], product[4 * c + i]);
        }
    float bound[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        bound[i] = fminf(rows.score[i], __shfl_xor_sync(ALL, rows.score[i], 1));
        bound[i] = fminf(bound[i], __shfl_xor_sync(ALL, bound[i], 2));
    }
    if (!(low[0] < bound[0] || low[1] < bound[1])) return;
    int at[2] = {};
#pragma unroll
    for (int c = CODES / 8 - 1; c >= 0; --c)  // so that the lowest of equal ones is the last
#pragma unroll
        for (int i = 3; i >= 0; --i)
            if (product[4 * c + i] == low[i / 2]) at[i / 2] = 8 * c + i % 2;
#pragma unroll
    for (int i = 0; i < 2; ++i)
        if (low[i] < bound[i]) rows.score[i] = low[i], rows.index[i] = first + column + at[i];
}

// The best codes of 64 rows, of which `first` is the first, from four lanes each to memory.
__device__ inline void store_rows(const Lookup& p, Nearest& rows, int head, int first) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        for (int step = 1; step < 4; step *= 2) {
            const float score = __shfl_xor_sync(ALL, rows.score[i], step);
            const int index = __shfl_xor_sync(ALL, rows.index[i], step);
            const bool lower = (unsigned)index < (unsigned)rows.index[i];  // -1 is none
            if (score < rows.score[i] || (score == rows.score[i] && lower)) rows.score[i] = score, rows.index[i] = index;
        }
        const int n = first + threadIdx.x / 32 % 4 * 16 + 8 * i + lane / 4;
        if (n < p.num_rows && lane % 4 == 0) p.indices[head * p.num_rows + n] = rows.scan[i] ? UNDECIDED : rows.index[i];
    }
}

// A warpgroup: its 2 × 64 of every 256 rows.
__device__ inline void multiply_rows(const Lookup& p, const Shared& s) {
    const int row_tiles = (p.num_rows + ROWS - 1) / ROWS, code_tiles = p.code_tiles;
    const int group = threadIdx.x / 128 - 1, lane = threadIdx.x % 32;
    int stage = 0, lap = 0, turn = 0;
    for (int tile = blockIdx.x; tile < p.heads * row_tiles; tile += gridDim.x, ++turn) {
        const int head = tile / row_tiles, first = tile % row_tiles * ROWS + group * 64 * HALVES;
        const float lowest = p.limits[head], highest = p.limits[p.heads + head];
        Nearest upper, lower;
        float upper_product[CODES / 2], lower_product[CODES / 2];
        wait(s.rows_there, turn % 2);
        load_rows(upper, s.rows + group * HALVES * 64 * ROW_BYTES, lowest, highest);
        load_rows(lower, s.rows + (group * HALVES + 1) * 64 * ROW_BYTES, lowest, highest);
        __syncwarp();
        if (lane == 0) arrive(s.rows_read);
        const unsigned char* codes = s.tiles + stage * TILE_BYTES;
        wait(s.tile_there + stage, lap);
        start_products(upper_product, upper, codes);
        wait_products();
        for (int t = 0;; ++t) {
            start_products(lower_product, lower, codes);
            keep_nearest(upper, upper_product, codes, t * CODES);
            __syncwarp();
            wait_products();
            const unsigned char* before = codes;
            Barrier* read = s.tile_read + stage;
            if (++stage == STAGES) stage = 0, lap ^= 1;
            if (t == code_tiles - 1) {
                keep_nearest(lower, lower_product, before, t * CODES);
                __syncwarp();
                if (lane == 0) arrive(read);
                break;
            }
            codes = s.tiles + stage * TILE_BYTES;
            wait(s.tile_there + stage, lap);
            start_products(upper_product, upper, codes);
            keep_nearest(lower, lower_product, before, t * CODES);
            __syncwarp();
            if (lane == 0) arrive(read);
            wait_products();
        }
        store_rows(p, upper, head, first);
        store_rows(p, lower, head, first + 64);
    }
}

// A warp: the fp64 minimum over all codes of one row, -1 if the row is not finite or no code is.
__device__ inline int scan_exactly(const Lookup& p, const Half* row, const Half* codebook) {
    const int lane = threadIdx.x % 32;
    int finite = 1;
    for (int d = lane; d < DIM; d += 32) finite &= is_finite(wide(row[d]));
    if (__ballot_sync(ALL, !finite)) return -1;
    double best = INF;
    int index = -1;
    for (int k = lane; k < p.num_codes; k += 32) {
        const Half* code = codebook + k * p.c_k;
        double score = 0;
        bool usable = true;
        for (int d = 0; d < DIM; ++d) {
            const float entry = wide(code[d]);
            usable &= is_finite(entry);
            const double x = wide(row[d]), difference = x - entry;
            score = p.dot ? fma(-x, (double)entry, score) : fma(difference, difference, score);
        }
        score = score < WORST ? score : WORST;  // past fp64, still better than a code that is not finite
        if (usable && score < best) best = score, index = k;
    }
    for (int step = 16; step > 0; step /= 2) {
        const double score = __shfl_xor_sync(ALL, best, step);
        const int other = __shfl_xor_sync(ALL, index, step);
        if (score < best || (score == best && (unsigned)other < (unsigned)index)) best = score, index = other;
    }
    return index;
}

// After the lookup, a warp for 32 rows: the undecided ones, and the distances that are asked for. (Without the 4, ptxas
// takes 32 registers for occupancy at 128 entries, and spills one.)
extern "C" __global__ void __launch_bounds__(256, 4) finish_rows(const Lookup p) {
    const int blocks = (p.num_rows + 255) / 256, head = blockIdx.x / blocks, lane = threadIdx.x % 32;
    const int first = blockIdx.x % blocks * 256 + threadIdx.x / 32 * 32, n = first + lane;
    const Half* codebook = p.codebook + head * p.c_h;
    int index = n < p.num_rows ? (int)p.indices[head * p.num_rows + n] : -1;
    unsigned left = __ballot_sync(ALL, index == UNDECIDED);
    const unsigned undecided = left;
    for (; left; left &= left - 1) {
        const int scanned = scan_exactly(p, row_at(p, head, first + __ffs(left) - 1), codebook);
        if (lane == __ffs(left) - 1) index = scanned;
    }
    if (undecided >> lane & 1) p.indices[head * p.num_rows + n] = index;
    if (!p.distance) return;
    float distance = 0;
    for (int row = 0; row < 32 && first + row < p.num_rows; ++row) {
        const int chosen = __shfl_sync(ALL, index, row);
        double score = 0;
        if (chosen >= 0) {
            const Half *entries = row_at(p, head, first + row), *code = codebook + chosen * p.c_k;
            for (int d = lane; d < DIM; d += 32) {
                const double x = wide(entries[d]), c = wide(code[d]);
                score = p.dot ? fma(x, c, score) : fma(x - c, x - c, score);
            }
        }
        for (int step = 16; step > 0; step /= 2) score += __shfl_xor_sync(ALL, score, step);
        if (lane == row) distance = chosen >= 0 ? (float)score : __uint_as_float(0x7fc00000u);
    }
    if (n < p.num_rows) p.distance[head * p.num_rows + n] = distance;
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) nearest_code(const Lookup p) {
    extern __shared__ __align__(128) unsigned char memory[];
    const Shared s = carve(memory);
    if (threadIdx.x == 0) {
        init_barrier(s.rows_there, COPIERS);
        init_barrier(s.rows_read, 4 * GROUPS);  // a warp arrives once
        for (int i = 0; i < STAGES; ++i) {
            init_barrier(s.tile_there + i, 1);
            init_barrier(s.tile_read + i, 4 * GROUPS);
        }
        publish_barriers();
    }
    if (DIM % 16)  // the entries that no copy writes
        for (int row = threadIdx.x; row < ROWS; row += THREADS)
            for (int d = DIM; d < 16 * STEPS; ++d) *(unsigned short*)(s.rows + row * ROW_BYTES + 2 * d) = 0;
    __syncthreads();
    if (threadIdx.x >= 128) {
        take_registers<232>();
        multiply_rows(p, s);
    } else {
        give_registers<40>();
        if (threadIdx.x < 32)
            copy_codes(p, s);
        else
            copy_rows(p, s);
    }
}
