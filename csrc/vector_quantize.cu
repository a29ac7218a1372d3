// vector_quantize for few rows and a codebook that fits shared memory, in one launch: lookup, straight-through output,
// losses, counts, sums and, where it is asked for, the moving averages of the codebook. And its backward, in another.
//
// Blocks take tiles of 32 rows. A lane is a row, a warp takes every eighth code. Each block adds up its rows; the one
// that finishes last merges the blocks' parts in fp64 and in their order, so that no bit depends on the schedule. It is
// found by a ticket that wraps around to 0, so that a launch leaves behind what the next one needs.
//
// FMAs are written out (compile with --fmad=false), so that the same source gives the same bits on a CPU
// (tests/cuda_host).

constexpr int ROWS = 32;  // of a tile: a lane each
constexpr int WARPS = 8;
constexpr int THREADS = 32 * WARPS;

// Arguments: eight bytes each, so that the launcher packs them without padding. Strides count entries.
struct Forward {
    const void* x;                // (H, N, D), or (H, B, L, D): row n is at (n / x_l) * x_b + (n % x_l) * x_n
    const void* codebook;         // (H, K, D), entries of a code side by side; null with given indices
    const long long* given;       // (H, N) or null: the indices, not to be looked up; outside [0, K) is no code
    const unsigned char* mask;    // (H, N) or null
    void* quantized;              // (H, N, D) or null
    long long* indices;           // (H, N) or null
    float* distance;              // (H, N) or null
    float* commitment_loss;       // (H,) or null, as the next five
    float* codebook_loss;         // (H,)
    long long* counts;            // (H, K)
    float* sums;                  // (H, K, D)
    float* residual_sums;         // (H, K, D)
    long long* rows_in;           // (H,)
    float* new_codebook;          // (K, D): `codebook` itself, to be updated with the next two; null for no update
    float* cluster_size;          // (K,)
    float* code_sums;             // (K, D)
    float* parts;                 // (H, P, K, D)
    double* part_losses;          // (H, P)
    int* part_counts;             // (H, P, K)
    unsigned* tickets;            // (H,) of zeros, and zeros again afterwards; null: no statistics at all
    long long num_rows, num_codes, dim, programs;
    long long x_h, x_b, x_l, x_n, x_d, c_h, c_k, m_h, m_n, i_h, i_n;
    long long dot;                // metric: the largest product instead of the smallest distance
    long long exact;              // decide every row in fp64
    long long whole;              // entries of x come in aligned groups of four
    long long whole_codes;
    long long lowest;             // the index of a row that is not finite: -1 or 0
    double decay, eps, weight;    // of the averages, and of the loss
};

struct Backward {
    const void* x;
    const void* codes;              // (H, N, D) in the dtype of x, NaN for a row that is not finite
    const long long* indices;       // (H, N), or null: a row is in where its code is no NaN
    const float* residual_sums;     // (H, K, D)
    const long long* rows_in;       // (H,)
    const void* grad_quantized;     // or null
    const float* grad_commitment;   // (H,)
    const float* grad_codebook_loss;  // (H,)
    void* grad_x;                   // (H, N, D)
    float* grad_codebook;           // (H, K, D) or null
    long long heads, num_rows, num_codes, dim;
    long long x_h, x_b, x_l, x_n, x_d, g_h, g_n, g_d, commitment_h, codebook_h;
    double weight;
};

struct Shared {
    double* norm;       // [K] half the squared norm of a centred code, inf for a code that is not finite
    float* codes;       // [K][stride] as they are stored
    float* rows;        // [ROWS][stride] likewise
    float* centre;      // [stride]
    float* score;       // [WARPS][ROWS]
    int* index;         // [WARPS][ROWS]
    int* state;         // [WARPS][ROWS]
    float* largest;     // [K]
    unsigned* members;  // [K] the rows of this tile that chose a code, a bit each
    int* count;         // [K]
    int* finite;        // [K]
    int* chosen;        // [ROWS]
    double* partial;    // [WARPS]
};

// The row stride in shared memory: a multiple of four, an odd one, so that eight lanes with a row each meet no bank twice.
__device__ inline int padded(int dim) { return ((dim + 3) / 4 | 1) * 4; }

__device__ inline Shared carve(unsigned char* memory, int num_codes, int stride) {
    Shared s;
    s.norm = (double*)memory;
    s.partial = s.norm + num_codes;
    s.codes = (float*)(s.partial + WARPS + num_codes % 2);  // sixteen bytes again
    s.rows = s.codes + num_codes * stride;
    s.centre = s.rows + ROWS * stride;
    s.score = s.centre + stride;
    s.index = (int*)(s.score + WARPS * ROWS);
    s.state = s.index + WARPS * ROWS;
    s.largest = (float*)(s.state + WARPS * ROWS);
    s.members = (unsigned*)(s.largest + num_codes);
    s.count = (int*)(s.members + num_codes);
    s.finite = s.count + num_codes;
    s.chosen = s.finite + num_codes;
    return s;
}

__device__ inline double sum_of_warp(double value) {
    for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(ALL, value, step);
    return value;
}

// `count` rows of `dim` entries into shared memory, in fp32 and padded with zeros. `first` gives where a row starts.
template <class T, class First>
__device__ inline void stage(float* to, int rows, int present, int dim, int stride, bool whole, long long step,
                             const T* from, First first) {
    const int fours = stride / 4;
    for (int e = threadIdx.x; e < rows * fours; e += THREADS) {
        const int row = e / fours, d = 4 * (e % fours);
        Four<float> value = {};
        if (row < present && d < dim) {
            const T* source = from + first(row) + d * step;
            if (whole) {
                const Four<T> four = *(const Four<T>*)source;
                for (int j = 0; j < 4; ++j) value.at[j] = wide(four.at[j]);
            } else {
                for (int j = 0; j < 4; ++j)
                    if (d + j < dim) value.at[j] = wide(source[j * step]);
            }
        }
        *(Four<float>*)(to + row * stride + d) = value;
    }
}

// The column mean rounded to a multiple of 2^ceil(log2 rms), so that x - centre stays exact for integer data; the mean
// itself where rms is 0, and 0 on overflow.
__device__ inline float grid_centre(float mean, float variance) {
    const float rms = sqrtf(variance), step = __uint_as_float((__float_as_uint(rms) + 0x7fffffu) & 0x7f800000u);
    if (!is_finite(mean) || !is_finite(rms) || !is_finite(step)) return 0.0f;
    return rms > 0 ? (float)(floor((double)mean / step + 0.5) * step) : mean;
}

struct Ready {
    double smallest;  // half norm of a finite code
    float limit;      // the largest |x - centre| whose fp32 scores are safe; -1 where none is
    bool centred;
};

// Whether the codes are closer to the centre than to 0, in the geometric mean: the centre of codes thrown far out would
// cost those that are left, and all the rows beside these, their digits. A code of zeros does not decide alone.
__device__ inline bool brings_closer(const Shared& s, int num_codes, int dim, int stride, int lanes) {
    const int lane = threadIdx.x % lanes, codes = THREADS / lanes;
    for (int start = 0; start < num_codes; start += codes) {
        const int k = start + threadIdx.x / lanes;
        double before = 0, after = 0;
        if (k < num_codes && s.finite[k])
            for (int d = lane; d < dim; d += lanes) {
                const double code = s.codes[k * stride + d], off = code - s.centre[d];
                before = fma(code, code, before);
                after = fma(off, off, after);
            }
        for (int step = lanes / 2; step > 0; step /= 2) {
            before += __shfl_xor_sync(ALL, before, step);
            after += __shfl_xor_sync(ALL, after, step);
        }
        const float ratio = (float)fmin(fmax((before + 1e-30) / (after + 1e-30), 1e-10), 1e30);
        if (k < num_codes && lane == 0) s.largest[k] = logf(ratio);
    }
    __syncthreads();
    float gain = 0;
    for (int k = threadIdx.x % 32; k < num_codes; k += 32) gain += s.largest[k];
    for (int step = 16; step > 0; step /= 2) gain += __shfl_xor_sync(ALL, gain, step);
    return gain > 0;
}

// Centre, norms and limit of the codes in shared memory.
__device__ inline Ready prepare(const Shared& s, int num_codes, int dim, int stride, bool centre, bool dot) {
    int lanes = 32;  // of a code
    while (lanes > 1 && lanes * num_codes > THREADS) lanes /= 2;
    const int lane = threadIdx.x % lanes, codes = THREADS / lanes;
    for (int start = 0; start < num_codes; start += codes) {
        const int k = start + threadIdx.x / lanes;
        int finite = k < num_codes;
        if (finite)
            for (int d = lane; d < dim; d += lanes) finite &= is_finite(s.codes[k * stride + d]);
        for (int step = lanes / 2; step > 0; step /= 2) finite &= __shfl_xor_sync(ALL, finite, step);
        if (k < num_codes && lane == 0) s.finite[k] = finite;
    }
    __syncthreads();
    int off_origin = 0;
    for (int d = threadIdx.x; d < stride; d += THREADS) {
        float middle = 0;
        if (centre && d < dim) {
            float count = 0, sum = 0, square = 0;
            for (int k = 0; k < num_codes; ++k)
                if (s.finite[k]) count += 1, sum += s.codes[k * stride + d];
            const float mean = sum / fmaxf(count, 1.0f);
            for (int k = 0; k < num_codes; ++k)
                if (s.finite[k]) square = fmaf(s.codes[k * stride + d] - mean, s.codes[k * stride + d] - mean, square);
            middle = grid_centre(mean, square / fmaxf(count, 1.0f));
        }
        s.centre[d] = middle;
        off_origin |= middle != 0;
    }
    Ready ready;
    ready.centred = __syncthreads_or(off_origin);
    if (ready.centred) {
        ready.centred = brings_closer(s, num_codes, dim, stride, lanes);
        __syncthreads();
        if (!ready.centred)
            for (int d = threadIdx.x; d < stride; d += THREADS) s.centre[d] = 0;
        __syncthreads();
    }
    for (int start = 0; start < num_codes; start += codes) {
        const int k = start + threadIdx.x / lanes;
        double square = 0;
        float largest = 0;
        if (k < num_codes && s.finite[k])
            for (int d = lane; d < dim; d += lanes) {
                const float code = s.codes[k * stride + d];
                const double difference = (double)code - s.centre[d];
                square = fma(difference, difference, square);
                largest = fmaxf(largest, fabsf(code - s.centre[d]));
            }
        for (int step = lanes / 2; step > 0; step /= 2) {
            square += __shfl_xor_sync(ALL, square, step);
            largest = fmaxf(largest, __shfl_xor_sync(ALL, largest, step));
        }
        if (k < num_codes && lane == 0) {
            s.norm[k] = s.finite[k] ? 0.5 * square : INF;
            s.largest[k] = largest;
        }
    }
    __syncthreads();
    double smallest = INF, longest = 0;
    float largest = 0;
    for (int k = threadIdx.x % 32; k < num_codes; k += 32) {
        smallest = fmin(smallest, s.norm[k]);
        if (s.finite[k]) longest = fmax(longest, s.norm[k]);
        largest = fmaxf(largest, s.largest[k]);
    }
    for (int step = 16; step > 0; step /= 2) {
        smallest = fmin(smallest, __shfl_xor_sync(ALL, smallest, step));
        longest = fmax(longest, __shfl_xor_sync(ALL, longest, step));
        largest = fmaxf(largest, __shfl_xor_sync(ALL, largest, step));
    }
    // below 2^-40 the product of two entries may underflow, above 2^120 a sum of products may overflow
    const bool safe = (float)longest < 0x1p120f && (largest >= 0x1p-40f || largest == 0);
    ready.limit = safe ? fminf(0x1p120f / (fmaxf(largest, 0x1p-40f) * dim), 0x1p120f) : -1.0f;
    ready.smallest = dot ? 0.0 : smallest;
    return ready;
}

enum { NOT_FINITE = 1, TOO_LARGE = 2, NOT_ZERO = 4, NOT_TINY = 8 };

// What the entries of a lane's row, every eighth four of them, say of its arithmetic.
__device__ inline void look_at_row(const Shared& s, const Ready& ready, int dim, int stride) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, fours = (dim + 3) / 4;
    int state = 0;
    const float tiny = ready.limit * 0x1p-110f * (dim * 0x1p-110f);
    for (int i = warp; i < fours; i += WARPS)
        for (int j = 0; j < 4; ++j) {
            const float entry = s.rows[lane * stride + 4 * i + j], size = fabsf(entry - s.centre[4 * i + j]);
            if (!is_finite(entry)) state |= NOT_FINITE;
            if (!(size <= ready.limit)) state |= TOO_LARGE;
            if (size > 0) state |= NOT_ZERO;
            if (!(size < tiny)) state |= NOT_TINY;
        }
    s.state[warp * ROWS + lane] = state;
}

// A lane's row against the codes of its warp: the best score and its code.
template <int CODES, bool CENTRED>
__device__ inline void score_row(const Shared& s, const Ready& ready, int num_codes, int dim, int stride, bool dot) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, fours = (dim + 3) / 4;
    const Four<float>* row = (const Four<float>*)(s.rows + lane * stride);
    const Four<float>* centre = (const Four<float>*)s.centre;
    float best = INF;
    int index = -1;
    for (int first = warp; first < num_codes; first += WARPS * CODES) {
        float product[CODES] = {};
        for (int i = 0; i < fours; ++i) {
            Four<float> entry = row[i], middle = {};
            if (CENTRED) {
                middle = centre[i];
                for (int j = 0; j < 4; ++j) entry.at[j] -= middle.at[j];
            }
#pragma unroll
            for (int c = 0; c < CODES; ++c) {
                const int k = min(first + WARPS * c, num_codes - 1);
                const Four<float> code = ((const Four<float>*)(s.codes + k * stride))[i];
#pragma unroll
                for (int j = 0; j < 4; ++j)
                    product[c] = fmaf(entry.at[j], CENTRED ? code.at[j] - middle.at[j] : code.at[j], product[c]);
            }
        }
#pragma unroll
        for (int c = 0; c < CODES; ++c) {
            const int k = first + WARPS * c;
            if (k < num_codes && s.finite[k]) {
                const float half_norm = dot ? 0.0f : (float)(s.norm[k] - ready.smallest);
                const float score = half_norm - product[c];  // added last: a common term would cost the product's digits
                if (score < best) best = score, index = k;
            }
        }
    }
    s.score[warp * ROWS + lane] = best;
    s.index[warp * ROWS + lane] = index;
}

// The fp64 minimum over all codes for one row, by a warp; -1 without a finite code.
__device__ inline int scan(const Shared& s, int row, int num_codes, int dim, int stride, bool dot) {
    double best = INF;
    int index = num_codes;
    for (int k = threadIdx.x % 32; k < num_codes; k += 32) {
        if (!s.finite[k]) continue;
        double score = 0;
        for (int d = 0; d < dim; ++d) {
            const double entry = s.rows[row * stride + d], code = s.codes[k * stride + d];
            score = dot ? fma(-entry, code, score) : fma(entry - code, entry - code, score);
        }
        score = fmin(score, WORST);
        if (score < best) best = score, index = k;
    }
    for (int step = 16; step > 0; step /= 2) {
        const double other = __shfl_xor_sync(ALL, best, step);
        const int k = __shfl_xor_sync(ALL, index, step);
        if (other < best || (other == best && k < index)) best = other, index = k;
    }
    return index < num_codes ? index : -1;
}

// The code of each row of the tile, the rows of each code, and the distances.
__device__ inline void decide(const Forward& p, const Shared& s, const Ready& ready, int head, long long start,
                              int present, int stride) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, num_codes = p.num_codes, dim = p.dim;
    float best = INF;
    int index = -1, state = 0;
    for (int w = 0; w < WARPS; ++w) {
        state |= s.state[w * ROWS + lane];
        if (p.given) continue;
        const float score = s.score[w * ROWS + lane];
        const int k = s.index[w * ROWS + lane];
        if (score < best || (score == best && k < index)) best = score, index = k;
    }
    if (p.given && lane < present) {
        const long long k = p.given[head * p.i_h + (start + lane) * p.i_n];
        index = k >= 0 && k < num_codes ? (int)k : -1;
    }
    bool kept = lane < present;
    if (kept && p.mask) kept = p.mask[head * p.m_h + (start + lane) * p.m_n] != 0;
    const bool finite = !(state & NOT_FINITE);
    const bool vanishes = p.dot && (state & NOT_ZERO) && !(state & NOT_TINY);
    const unsigned again = __ballot_sync(
        ALL, kept && finite && !p.given && (p.exact || (state & TOO_LARGE) || vanishes));
    if (!kept || !finite) index = -1;
    if (again) {  // the same in all warps
        for (int row = warp; row < ROWS; row += WARPS)
            if (again >> row & 1) {
                const int found = scan(s, row, num_codes, dim, stride, p.dot);
                if (lane == 0) s.chosen[row] = found;
            }
        __syncthreads();
        if (again >> lane & 1) index = s.chosen[lane];
        __syncthreads();
    }
    for (int k = warp; k < num_codes; k += WARPS) {
        const unsigned members = __ballot_sync(ALL, index == k);
        if (lane == 0) s.members[k] = members, s.count[k] += __popc(members);
    }
    if (warp == 0) {
        s.chosen[lane] = kept ? index : -2;  // -2: masked, quantised to zero
        if (p.indices && lane < present)
            p.indices[head * p.num_rows + start + lane] = index < 0 ? (kept ? p.lowest : -1) : index;
    }
    __syncthreads();
    if (p.distance)
        for (int row = warp; row < present; row += WARPS) {
            const int k = s.chosen[row];
            float total = 0;
            if (k >= 0)
                for (int d = lane; d < dim; d += 32) {
                    const float entry = s.rows[row * stride + d], code = s.codes[k * stride + d];
                    total = p.dot ? fmaf(entry, code, total) : fmaf(entry - code, entry - code, total);
                }
            for (int step = 16; step > 0; step /= 2) total += __shfl_xor_sync(ALL, total, step);
            if (lane == 0)
                p.distance[head * p.num_rows + start + row] = k >= 0 ? total : __uint_as_float(0x7fc00000u);
        }
}

// Quantised rows; returns this thread's share of the squared residuals.
template <class X>
__device__ inline double write_rows(const Forward& p, const Shared& s, int head, long long start, int present,
                                    int stride) {
    const int dim = p.dim, fours = (dim + 3) / 4;
    X* out = (X*)p.quantized + (head * p.num_rows + start) * p.dim;
    double loss = 0;
    for (int e = threadIdx.x; e < present * fours; e += THREADS) {
        const int row = e / fours, d = 4 * (e % fours), k = s.chosen[row];
        Four<float> value;
        Four<X> stored;
        const float missing = k == -2 ? 0.0f : __uint_as_float(0x7fc00000u);
        for (int j = 0; j < 4; ++j) value.at[j] = missing;
        if (k >= 0) {
            const Four<float> entry = *(const Four<float>*)(s.rows + row * stride + d);
            value = *(const Four<float>*)(s.codes + k * stride + d);
            for (int j = 0; j < 4; ++j) {
                const double residual = (double)entry.at[j] - value.at[j];  // the padding is 0 - 0
                loss = fma(residual, residual, loss);
            }
        }
        for (int j = 0; j < 4; ++j) narrow(value.at[j], stored.at[j]);
        if (dim % 4 == 0)
            *(Four<X>*)(out + (long long)row * dim + d) = stored;
        else
            for (int j = 0; j < 4; ++j)
                if (d + j < dim) out[(long long)row * dim + d + j] = stored.at[j];
    }
    return loss;
}

// Adds the residuals of the tile to the sums of its block, row by row in their order.
__device__ inline void add_residuals(const Shared& s, float* part, int num_codes, int dim, int stride, bool first) {
    for (int e = threadIdx.x; e < num_codes * dim; e += THREADS) {
        const int k = e / dim, d = e % dim;
        const float code = s.codes[k * stride + d];
        float total = first ? 0.0f : part[e];
        for (unsigned rows = s.members[k]; rows; rows &= rows - 1)
            total += s.rows[(__ffs(rows) - 1) * stride + d] - code;
        part[e] = total;
    }
}

// torch.lerp, whose two forms meet both ends exactly.
__device__ inline float lerp(float from, float to, float weight) {
    return weight < 0.5f ? fmaf(weight, to - from, from) : to - (to - from) * (1.0f - weight);
}

// What the last block of a head does: the parts of all of them, in their order.
__device__ inline void merge(const Forward& p, const Shared& s, int head, int stride) {
    const int num_codes = p.num_codes, dim = p.dim, lane = threadIdx.x % 32, programs = p.programs;
    const long long size = (long long)num_codes * dim;
    for (int k = threadIdx.x; k < num_codes; k += THREADS) {
        int count = 0;
        for (int i = 0; i < programs; ++i) count += __ldcg(p.part_counts + ((long long)head * programs + i) * num_codes + k);
        s.count[k] = count;
        if (p.counts) p.counts[head * num_codes + k] = count;
    }
    __syncthreads();
    double loss = 0, rows = 0;
    for (int i = lane; i < programs; i += 32) loss += __ldcg(p.part_losses + (long long)head * programs + i);
    for (int k = lane; k < num_codes; k += 32) rows += s.count[k];
    loss = sum_of_warp(loss), rows = sum_of_warp(rows);
    if (threadIdx.x == 0) {
        const float mean = (float)(loss / fmax(rows * dim, 1.0) * p.weight);
        if (p.commitment_loss) p.commitment_loss[head] = mean;
        if (p.codebook_loss) p.codebook_loss[head] = mean;
        if (p.rows_in) p.rows_in[head] = (long long)rows;
    }
    const float weight = rows > 0 ? (float)(1.0 - p.decay) : 0.0f, eps = (float)p.eps;  // no row, no change
    float shrink = 0;
    if (p.new_codebook) {
        float total = 0;
        for (int k = lane; k < num_codes; k += 32) total += lerp(p.cluster_size[k], s.count[k], weight);
        for (int step = 16; step > 0; step /= 2) total += __shfl_xor_sync(ALL, total, step);
        shrink = total / (total + (float)(num_codes * p.eps));
        __syncthreads();  // all have read the sizes
        for (int k = threadIdx.x; k < num_codes; k += THREADS) {
            const float updated = lerp(p.cluster_size[k], s.count[k], weight);
            p.cluster_size[k] = updated;
            s.largest[k] = (updated + eps) * shrink;
        }
        __syncthreads();
    }
    const float* parts = p.parts + head * programs * size;
    for (int e = threadIdx.x; e < size; e += THREADS) {
        const int k = e / dim, d = e % dim;
        double residual = 0;
#pragma unroll 4
        for (int i = 0; i < programs; ++i) residual += __ldcg(parts + i * size + e);
        // a code that no row chose may be a NaN
        const double chosen = s.count[k] ? fma((double)s.count[k], (double)s.codes[k * stride + d], residual) : 0.0;
        if (p.residual_sums) p.residual_sums[head * size + e] = (float)residual;
        if (p.sums) p.sums[head * size + e] = (float)chosen;
        if (p.new_codebook) {
            const float average = lerp(p.code_sums[e], (float)chosen, weight);
            p.code_sums[e] = average;
            p.new_codebook[e] = average / s.largest[k];
        }
    }
}

template <class X, class C>
__device__ inline void forward(const Forward& p, unsigned char* memory) {
    const int programs = p.programs, head = blockIdx.x / programs, program = blockIdx.x % programs;
    const int num_codes = p.num_codes, dim = p.dim, stride = padded(dim);
    const Shared s = carve(memory, num_codes, stride);
    const X* x = (const X*)p.x + head * p.x_h;
    float* part = p.parts + ((long long)head * programs + program) * num_codes * dim;
    for (int k = threadIdx.x; k < num_codes; k += THREADS) s.count[k] = 0;
    if (p.given) {  // sums of x - 0
        for (int e = threadIdx.x; e < num_codes * stride; e += THREADS) s.codes[e] = 0;
        for (int d = threadIdx.x; d < stride; d += THREADS) s.centre[d] = 0;
    } else {
        stage(s.codes, num_codes, num_codes, dim, stride, p.whole_codes, 1, (const C*)p.codebook + head * p.c_h,
              [&](int k) { return k * p.c_k; });
    }
    Ready ready = {};
    double loss = 0;
    bool first = true;
    for (long long start = (long long)program * ROWS; start < p.num_rows; start += (long long)programs * ROWS) {
        const int present = p.num_rows - start < ROWS ? (int)(p.num_rows - start) : ROWS;
        stage(s.rows, ROWS, present, dim, stride, p.whole, p.x_d, x, [&](int row) {
            const long long n = start + row;
            return p.x_l == 1 ? n * p.x_b : n / p.x_l * p.x_b + n % p.x_l * p.x_n;
        });
        __syncthreads();
        if (first && !p.given) ready = prepare(s, num_codes, dim, stride, sizeof(X) == 4 && !p.dot, p.dot);
        look_at_row(s, ready, dim, stride);
        if (!p.given) {
            if (ready.centred)
                score_row<4, true>(s, ready, num_codes, dim, stride, p.dot);
            else if (num_codes <= WARPS)
                score_row<1, false>(s, ready, num_codes, dim, stride, p.dot);
            else if (num_codes <= 2 * WARPS)
                score_row<2, false>(s, ready, num_codes, dim, stride, p.dot);
            else
                score_row<4, false>(s, ready, num_codes, dim, stride, p.dot);
        }
        __syncthreads();
        decide(p, s, ready, head, start, present, stride);
        if (p.quantized) loss += write_rows<X>(p, s, head, start, present, stride);
        if (p.tickets) add_residuals(s, part, num_codes, dim, stride, first);
        __syncthreads();
        first = false;
    }
    if (!p.tickets) return;
    if (first)
        for (int e = threadIdx.x; e < num_codes * dim; e += THREADS) part[e] = 0;
    loss = sum_of_warp(loss);
    if (threadIdx.x % 32 == 0) s.partial[threadIdx.x / 32] = loss;
    __syncthreads();
    for (int k = threadIdx.x; k < num_codes; k += THREADS)
        p.part_counts[((long long)head * programs + program) * num_codes + k] = s.count[k];
    if (threadIdx.x == 0) {
        loss = 0;
        for (int w = 0; w < WARPS; ++w) loss += s.partial[w];
        p.part_losses[(long long)head * programs + program] = loss;
    }
    __threadfence();
    __syncthreads();  // the parts of this block are there
    if (threadIdx.x == 0) s.chosen[0] = atomicInc(p.tickets + head, programs - 1) + 1 == (unsigned)programs;
    __syncthreads();
    if (!s.chosen[0]) return;
    __threadfence();
    merge(p, s, head, stride);
}

template <class X>
__device__ inline void backward(const Backward& p) {
    const long long entries = p.heads * p.num_rows * p.dim, code_entries = p.num_codes * p.dim;
    const long long total = entries + (p.grad_codebook ? p.heads * code_entries : 0);
    const long long step = (long long)gridDim.x * THREADS;
    for (long long e = (long long)blockIdx.x * THREADS + threadIdx.x; e < total; e += step) {
        if (e >= entries) {
            const long long at = e - entries, head = at / code_entries;
            const long long rows = p.rows_in[head] * p.dim;
            const double scale = (double)p.grad_codebook_loss[head * p.codebook_h] * (-2.0 / (rows > 1 ? rows : 1));
            p.grad_codebook[at] = p.residual_sums[at] * (float)scale;
            continue;
        }
        const long long at = e / p.dim, d = e % p.dim, head = at / p.num_rows, n = at % p.num_rows;
        const float code = wide(((const X*)p.codes)[e]);
        float gradient = 0;
        if (p.indices ? p.indices[at] >= 0 : code == code) {
            const long long rows = p.rows_in[head] * p.dim;
            const double scale = p.weight * p.grad_commitment[head * p.commitment_h] * (2.0 / (rows > 1 ? rows : 1));
            const long long row = p.x_l == 1 ? n * p.x_b : n / p.x_l * p.x_b + n % p.x_l * p.x_n;
            gradient = (wide(((const X*)p.x)[head * p.x_h + row + d * p.x_d]) - code) * (float)scale;
            if (p.grad_quantized)
                gradient += wide(((const X*)p.grad_quantized)[head * p.g_h + n * p.g_n + d * p.g_d]);
        }
        narrow(gradient, ((X*)p.grad_x)[e]);
    }
}

// One pair of dtypes a module, which compiles in a fraction of the time: -DX_TYPE=bf16 -DC_TYPE=float.
#ifndef X_TYPE
#define X_TYPE float
#define C_TYPE float
#endif

extern "C" __global__ void __launch_bounds__(THREADS, 1) vector_quantize_fwd(const Forward p) {
    extern __shared__ __align__(16) unsigned char memory[];
    forward<X_TYPE, C_TYPE>(p, memory);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) vector_quantize_bwd(const Backward p) {
    backward<X_TYPE>(p);
}
