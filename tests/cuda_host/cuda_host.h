// Enough of CUDA C++ to run a kernel of csrc/ on a CPU, bit for bit: the threads of a block are fibers of one thread of
// the operating system, which take turns at barriers and warp operations. Blocks run one after another.
//
// The order of threads and of blocks is the caller's, so that a result that depends on either shows. Threads that wait
// for each other at different places end the run with an error, where a GPU would hang.

#pragma once

#include <algorithm>
#include <cmath>
#include <csetjmp>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include <ucontext.h>

#define __device__
#define __global__
#define __shared__
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(...)

struct Index {
    unsigned x;
};
extern "C" alignas(16) unsigned char memory[];  // dynamic shared memory, under the name that the kernels give it

inline Index threadIdx, blockIdx, gridDim;

namespace host {

constexpr int LANES = 32, STACK = 1 << 16;

struct Group {  // threads that wait for each other
    int expected = 0, arrived = 0, generation = 0, any = 0, result = 0;
};

struct Fiber {
    ucontext_t start;
    jmp_buf resume;
    bool started = false, done = false;
    bool (*ready)(const void* what, long value) = nullptr;  // what it waits for
    const void* what = nullptr;
    long value = 0;
    std::unique_ptr<char[]> stack{new char[STACK]};
};

inline std::vector<Fiber> fibers;
inline std::vector<Group> warps;
inline std::vector<unsigned char> slots;  // eight bytes a thread, for what warps exchange
inline Group block;
inline jmp_buf scheduler;
inline ucontext_t origin;
inline int current;
inline void (*entry)();

// Goes on with the other threads until `ready` says so.
inline void wait_until(bool (*ready)(const void*, long), const void* what, long value) {
    Fiber& fiber = fibers[current];
    fiber.ready = ready;
    fiber.what = what;
    fiber.value = value;
    if (_setjmp(fiber.resume) == 0) _longjmp(scheduler, 1);
}

inline void pass(Group& group) {
    group.arrived = 0;
    group.result = group.any;
    group.any = 0;
    ++group.generation;
}

inline void wait(Group& group) {
    if (++group.arrived == group.expected) return pass(group);
    wait_until([](const void* what, long value) { return ((const Group*)what)->generation != value; }, &group,
               group.generation);
}

inline void leave(Group& group) {  // a thread that has ended is waited for no more
    if (--group.expected > 0 && group.arrived == group.expected) pass(group);
}

inline void run_fiber() {
    entry();
    fibers[current].done = true;
    leave(block);
    leave(warps[current / LANES]);
    _longjmp(scheduler, 1);
}

// What a multiprocessor does beside its threads: cuda_host/hopper.h has it.
struct Unit {
    void (*start)(int threads) = [](int) {};      // with a block
    bool (*proceed)() = [] { return false; };     // when no thread can go on; false where there is nothing to do
    bool (*idle)() = [] { return true; };
};
inline Unit unit;
inline bool eager = false;   // do at once what may be done late
inline bool broken = false;  // something that a GPU forbids

// Runs one block; false where its threads wait for each other for ever.
inline bool run_block(int threads, const int* order) {
    fibers.resize(threads);
    warps.assign((threads + LANES - 1) / LANES, Group{});
    slots.assign(8 * threads, 0);
    block = Group{threads};
    for (int t = 0; t < threads; ++t) {
        ++warps[t / LANES].expected;
        fibers[t].started = fibers[t].done = false;
        fibers[t].ready = nullptr;
    }
    unit.start(threads);
    for (volatile int left = threads; left > 0;) {
        volatile bool progress = false;
        for (volatile int i = 0; i < threads; ++i) {
            Fiber& fiber = fibers[order[i]];
            if (fiber.done || (fiber.ready && !fiber.ready(fiber.what, fiber.value))) continue;
            fiber.ready = nullptr;
            progress = true;
            current = order[i];
            threadIdx.x = current;
            if (_setjmp(scheduler) == 0) {
                if (fiber.started) _longjmp(fiber.resume, 1);
                fiber.started = true;
                getcontext(&fiber.start);
                fiber.start.uc_stack.ss_sp = fiber.stack.get();
                fiber.start.uc_stack.ss_size = STACK;
                fiber.start.uc_link = nullptr;
                makecontext(&fiber.start, run_fiber, 0);
                swapcontext(&origin, &fiber.start);
            }
            if (fibers[current].done) left = left - 1;
        }
        if (!progress && !unit.proceed()) return false;
    }
    return true;
}

inline Group& warp() { return warps[current / LANES]; }

template <class T>
T* slot(int thread) {
    return (T*)(slots.data() + 8 * thread);
}

}  // namespace host

inline void __syncwarp() { host::wait(host::warp()); }
inline void __syncthreads() { host::wait(host::block); }
inline int __syncthreads_or(int predicate) {
    host::block.any |= predicate != 0;
    host::wait(host::block);
    return host::block.result;
}

template <class T>
T __shfl_xor_sync(unsigned, T value, int lanes) {
    const int self = host::current;
    std::memcpy(host::slot<T>(self), &value, sizeof(T));
    host::wait(host::warp());
    std::memcpy(&value, host::slot<T>(self ^ lanes), sizeof(T));
    host::wait(host::warp());
    return value;
}

template <class T>
T __shfl_sync(unsigned, T value, int lane) {
    const int self = host::current;
    std::memcpy(host::slot<T>(self), &value, sizeof(T));
    host::wait(host::warp());
    std::memcpy(&value, host::slot<T>(self - self % host::LANES + lane), sizeof(T));
    host::wait(host::warp());
    return value;
}

inline unsigned __ballot_sync(unsigned, int predicate) {
    const int self = host::current, first = self - self % host::LANES;
    *host::slot<int>(self) = predicate != 0;
    host::wait(host::warp());
    unsigned bits = 0;
    for (int lane = 0; lane < host::LANES; ++lane) bits |= (unsigned)*host::slot<int>(first + lane) << lane;
    host::wait(host::warp());
    return bits;
}

inline unsigned atomicInc(unsigned* address, unsigned last) {
    const unsigned old = *address;
    *address = old >= last ? 0 : old + 1;
    return old;
}

inline void atomicAdd(double* address, double value) { *address += value; }
inline void __threadfence() {}
inline int __ffs(unsigned bits) { return __builtin_ffs((int)bits); }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }

template <class T>
T __ldcg(const T* address) {
    return *address;
}

inline float __uint_as_float(unsigned bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline unsigned __float_as_uint(float value) {
    unsigned bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

inline float single_of_half(unsigned short half) {
    const unsigned sign = (half & 0x8000u) << 16, size = half & 0x7fff;
    if (size >= 0x7c00) return __uint_as_float(sign | 0x7f800000 | (size & 1023) << 13);
    const float value = __uint_as_float(size << 13) * 0x1p112f;  // the bias is 112 less, subnormal numbers too
    return sign ? -value : value;
}

inline unsigned short half_of_single(float value) {
    const unsigned sign = __float_as_uint(value) >> 16 & 0x8000;
    const float size = std::fabs(value);
    if (std::isnan(value)) return 0x7e00;
    if (size >= 65520.0f) return sign | 0x7c00;  // rounds to infinity
    int exponent = -13;
    if (size >= 0x1p-14f) std::frexp(size, &exponent);
    const int unit = exponent - 11;  // of the last place; below 2^-14 it stays the same
    const int steps = (int)std::nearbyint(std::ldexp(size, -unit));  // to nearest even
    return sign | (steps + ((unit + 24) << 10));
}

using std::max;
using std::min;
