// csrc/vector_quantize.cu as a library for the CPU: the two kernels behind one function.

#include "cuda_host.h"

#include "../../csrc/vector_quantize.cu"

alignas(16) unsigned char memory[1 << 18];

constexpr int GUARD = 256;

static Forward forward_arguments;
static Backward backward_arguments;

// Runs a kernel (0: forward, 1: backward) with its arguments, over `grid` blocks in the order of `blocks` and 256
// threads in that of `threads`. 0, or 1 where a block hangs.
extern "C" int run(int kernel, const void* arguments, int grid, int shared, const int* blocks, const int* threads) {
    if (kernel == 0) {
        std::memcpy(&forward_arguments, arguments, sizeof forward_arguments);
        host::entry = [] { vector_quantize_fwd(forward_arguments); };
    } else {
        std::memcpy(&backward_arguments, arguments, sizeof backward_arguments);
        host::entry = [] { vector_quantize_bwd(backward_arguments); };
    }
    gridDim.x = grid;
    for (int i = 0; i < grid; ++i) {
        blockIdx.x = blocks[i];
        std::memset(memory, 0xff, shared + GUARD);  // NaN, -1: nothing may be read before it is written
        if (!host::run_block(THREADS, threads)) return 1;
        for (int byte = shared; byte < shared + GUARD; ++byte)
            if (memory[byte] != 0xff) return 2;  // written past what the launch asks for
    }
    return 0;
}

extern "C" int argument_bytes(int kernel) { return kernel == 0 ? sizeof(Forward) : sizeof(Backward); }
