// The kernels of a source as a library, which cuda_cases.py calls.

#pragma once

#include <cstring>

#include "cuda_host.h"

alignas(128) unsigned char memory[1 << 18];

constexpr int GUARD = 256;

struct Kernel {
    const char* name;
    void (*entry)();
    void* arguments;
    int bytes;
};
extern const std::vector<Kernel> kernels;

// Runs a kernel over `grid` blocks in the order of `blocks` and `count` threads in that of `threads`. 0, or: 1, its threads
// wait for each other for ever; 2, it wrote past its shared memory; 3, it did what a GPU forbids; 4, there is no such
// kernel, or these are not its arguments.
extern "C" int run(const char* name, const void* arguments, int bytes, int grid, int count, int shared, const int* blocks,
                   const int* threads, int eager) {
    const auto kernel =
        std::find_if(kernels.begin(), kernels.end(), [=](const Kernel& k) { return !std::strcmp(k.name, name); });
    if (kernel == kernels.end() || kernel->bytes != bytes) return 4;
    std::memcpy(kernel->arguments, arguments, bytes);
    host::entry = kernel->entry;
    host::eager = eager;
    host::broken = false;
    gridDim.x = grid;
    for (int i = 0; i < grid; ++i) {
        blockIdx.x = blocks[i];
        std::memset(memory, 0xff, shared + GUARD);  // NaN, -1: nothing may be read before it is written
        if (!host::run_block(count, threads)) return 1;
        for (int byte = shared; byte < shared + GUARD; ++byte)
            if (memory[byte] != 0xff) return 2;
        if (host::broken || !host::unit.idle()) return 3;
    }
    return 0;
}

#define KERNEL(name, arguments) \
    Kernel { #name, [] { name(arguments); }, &arguments, sizeof arguments }
