// The functions of csrc/hopper.h on a CPU. What is asynchronous there is as late here as it may be: copies are made when no
// thread can go on (or, if `eager`, at once), products when their warpgroup waits for them, and until then the registers
// and the memory that they write are NaN. So a kernel that does not wait, or gives memory back too early, is wrong.

#pragma once

#include <deque>

#include "cuda_host.h"

struct Phase {  // the eight bytes of a barrier
    unsigned short expected, pending;
    unsigned ended : 1;
    int bytes : 31;
};
using Barrier = unsigned long long;
static_assert(sizeof(Phase) == sizeof(Barrier));

namespace host {

constexpr int WARPGROUP = 128;

struct Copy {
    void* to;
    const void* from;
    int bytes;
    Phase* barrier;
};

struct Product {
    float* d[WARPGROUP];
    unsigned a[WARPGROUP][4];
    unsigned long long descriptor[2];  // of a, where it is transposed in shared memory, and of b
    int columns;
    bool transposed, add;
};

inline std::deque<Copy> copies;
inline std::vector<std::deque<Product>> products;  // of every warpgroup, those that are not done
inline std::vector<long> issued;                   // of every thread; of a warpgroup those that are done
inline std::vector<long> finished;

inline void end_phase(Phase* barrier) {
    if (barrier->pending == 0 && barrier->bytes == 0) {
        barrier->ended ^= 1;
        barrier->pending = barrier->expected;
    }
}

inline void make(const Copy& copy) {
    std::memcpy(copy.to, copy.from, copy.bytes);
    if (!copy.barrier) return;
    if (copy.bytes == 0) --copy.barrier->pending;  // an arrival behind copies
    copy.barrier->bytes -= copy.bytes;
    end_phase(copy.barrier);
}

inline void queue(const Copy& copy) {
    broken |= copy.bytes && ((std::uintptr_t)copy.to | (std::uintptr_t)copy.from | copy.bytes) % 16;
    std::memset(copy.to, 0xff, copy.bytes);
    if (eager) return make(copy);
    copies.push_back(copy);
}

inline void start_block(int threads) {
    products.assign((threads + WARPGROUP - 1) / WARPGROUP, {});
    issued.assign(threads, 0);
    finished.assign(products.size(), 0);
}

inline bool make_oldest_copy() {
    if (copies.empty()) return false;
    make(copies.front());
    copies.pop_front();
    return true;
}

inline bool all_done() {
    return copies.empty() && std::all_of(products.begin(), products.end(), [](auto& left) { return left.empty(); });
}

inline const bool installed = (unit = {start_block, make_oldest_copy, all_done}, true);

inline float half_value(const unsigned char* at) {
    PRODUCT_TYPE half;
    std::memcpy(&half, at, sizeof half);
    return wide(half);
}

// COUNT × 16 entries of a factor in shared memory: across, and along the sum.
inline void read_factor(unsigned long long descriptor, bool transposed, int count, float (*entries)[16]) {
    const long start = (descriptor & 0x3fff) << 4, along = (descriptor >> 16 & 0x3fff) << 4;
    const long across = (descriptor >> 32 & 0x3fff) << 4;
    const int step_across = transposed ? 2 : 16, step_along = transposed ? 16 : 2;
    for (int i = 0; i < count; ++i)
        for (int k = 0; k < 16; ++k)
            entries[i][k] = half_value(memory + start + i / 8 * across + k / 8 * along + i % 8 * step_across +
                                       k % 8 * step_along);
}

inline void compute(const Product& product) {
    static float a[64][16], b[128][16];
    if (product.transposed) read_factor(product.descriptor[0], true, 64, a);
    for (int row = 0; row < 64 && !product.transposed; ++row)
        for (int k = 0; k < 16; ++k) {
            const unsigned two = product.a[row / 16 * 32 + row % 8 * 4 + k % 8 / 2][row % 16 / 8 + k / 8 * 2];
            a[row][k] = half_value((const unsigned char*)&two + k % 2 * 2);
        }
    read_factor(product.descriptor[1], product.transposed, product.columns, b);
    for (int thread = 0; thread < WARPGROUP; ++thread)
        for (int i = 0; i < product.columns / 2; ++i) {
            const float* row = a[thread / 32 * 16 + thread % 32 / 4 + i % 4 / 2 * 8];
            const float* column = b[i / 4 * 8 + thread % 4 * 2 + i % 2];
            double sum = product.add ? product.d[thread][i] : 0.0;
            for (int k = 0; k < 16; ++k) sum += (double)row[k] * column[k];
            float kept = (float)sum;
            if (std::fabs(kept) > std::fabs(sum)) kept = std::nextafter(kept, 0.0f);  // tensor cores truncate
            product.d[thread][i] = kept;
        }
}

// Of a thread's product, the first of its warpgroup to get there makes the record.
inline void issue(float* d, int count, const unsigned* a, unsigned long long first, unsigned long long second, bool add) {
    const int group = current / WARPGROUP, lane = current % WARPGROUP;
    auto& queue = products[group];
    const long number = issued[current]++ - finished[group];
    if (number == (long)queue.size()) queue.push_back({{}, {}, {first, second}, 2 * count, a == nullptr, add});
    Product& product = queue[number];
    const bool same = product.descriptor[0] == first && product.descriptor[1] == second;
    broken |= !same || product.columns != 2 * count || product.add != add || product.d[lane];
    product.d[lane] = d;
    if (a) std::memcpy(product.a[lane], a, sizeof product.a[lane]);
    if (!add) std::fill(d, d + count, NAN);
}

}  // namespace host

inline void init_barrier(Barrier* barrier, int arrivals) {
    *(Phase*)barrier = {(unsigned short)arrivals, (unsigned short)arrivals, 0, 0};
}
inline void publish_barriers() {}
inline void publish_stores() {}
template <int>
void take_registers() {}
template <int>
void give_registers() {}

inline void arrive_expecting(Barrier* barrier, int bytes) {
    Phase* phase = (Phase*)barrier;
    host::broken |= phase->pending == 0;
    --phase->pending;
    phase->bytes += bytes;
    host::end_phase(phase);
}
inline void arrive(Barrier* barrier) { arrive_expecting(barrier, 0); }

inline void wait(Barrier* barrier, int parity) {
    const auto ended = [](const void* what, long value) { return (long)((const Phase*)what)->ended != value; };
    if (!ended(barrier, parity)) host::wait_until(ended, barrier, parity);
}

inline void copy_async(void* to, const void* from, int bytes, Barrier* barrier) {
    host::queue({to, from, bytes, (Phase*)barrier});
}
inline void copy_sixteen(void* to, const void* from) { host::queue({to, from, 16, nullptr}); }
inline void arrive_after_copies(Barrier* barrier) { host::queue({barrier, barrier, 0, (Phase*)barrier}); }
inline void prefetch(const void*) {}

inline unsigned long long factor(const void* shared, int leading, int stride) {
    const long start = (const unsigned char*)shared - memory;
    host::broken |= (start | leading | stride) % 16 != 0;
    return ((unsigned long long)stride >> 4) << 32 | ((unsigned long long)leading >> 4) << 16 | (start & 0x3ffff) >> 4;
}

inline void begin_products() {}
inline void commit_products() {}
inline void wait_products() {
    using namespace host;
    const int group = current / WARPGROUP;
    const long last = issued[current];
    // all threads of the warpgroup have issued the next product, or one of them has computed what this one waits for
    const auto ready = [](const void* last, long first) {
        const long done = finished[first / WARPGROUP];
        if (done >= (long)last) return true;
        return std::all_of(&issued[first], &issued[first] + WARPGROUP, [=](long number) { return number > done; });
    };
    while (finished[group] < last) {
        if (!ready((const void*)last, group * WARPGROUP)) {
            wait_until(ready, (const void*)last, group * WARPGROUP);
        } else {
            compute(products[group].front());
            products[group].pop_front();
            ++finished[group];
        }
    }
}
template <int COUNT>
void hold(float (&)[COUNT]) {}

template <int COUNT>
void multiply(float (&d)[COUNT], const unsigned (&a)[4], unsigned long long b, bool add) {
    host::issue(d, COUNT, a, 0, b, add);
}
inline void multiply_transposed(float (&d)[64], unsigned long long a, unsigned long long b, bool add) {
    host::issue(d, 64, nullptr, a, b, add);
}
