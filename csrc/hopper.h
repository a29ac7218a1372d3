// Hopper's asynchronous instructions (PTX, sm_90a), one function each: barriers in shared memory that count threads and
// bytes, bulk copies, and products of warpgroups (WGMMA). tests/cuda_host/hopper.h has the same functions for a CPU.

using Barrier = unsigned long long;  // in shared memory

__device__ inline unsigned shared_address(const void* shared) { return (unsigned)__cvta_generic_to_shared(shared); }

// A phase of the barrier ends when `arrivals` threads have arrived, and with them all bytes that they expect.
__device__ inline void init_barrier(Barrier* barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// After all init_barrier of a block, and before __syncthreads.
__device__ inline void publish_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ inline void arrive(Barrier* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

__device__ inline void arrive_expecting(Barrier* barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}

// Waits for the end of the phase of this parity: the first one has 0. Waiting for 1 on a new barrier returns at once.
__device__ inline void wait(Barrier* barrier, int parity) {
    asm volatile(
        "{\n.reg .pred done;\n"
        "AGAIN:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra AGAIN;\n}" ::"r"(
            shared_address(barrier)),
        "r"(parity)
        : "memory");
}

// Bytes from global to shared memory, both in multiples of 16 bytes; the barrier counts them as they are there.
__device__ inline void copy_async(void* to, const void* from, int bytes, Barrier* barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(to)),
                 "l"(from), "r"(bytes), "r"(shared_address(barrier))
                 : "memory");
}

// Sixteen bytes, and an arrival once all of this thread's before it are there.
__device__ inline void copy_sixteen(void* to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
__device__ inline void arrive_after_copies(Barrier* barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Brings the 32 bytes around an address near.
__device__ inline void prefetch(const void* global) { asm volatile("prefetch.global.L2 [%0];" ::"l"(global)); }

// What this thread has stored in shared memory is there for products and bulk copies that follow.
__device__ inline void publish_stores() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// For all threads of a warpgroup: how many registers each may use from here on.
template <int COUNT>
__device__ inline void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT>
__device__ inline void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// A factor in shared memory, made of 8 × 8 halves that lie side by side (128 bytes): `along` and `across` are the bytes from
// one to the next, along the sum and across it. The eight of 16 bytes run along the sum, in a transposed factor across.
__device__ inline unsigned long long factor(const void* shared, int along, int across) {
    return ((unsigned long long)across >> 4) << 32 | ((unsigned long long)along >> 4) << 16 |
           (shared_address(shared) & 0x3ffff) >> 4;
}

// Between what a thread did to registers and products that use them; between products and commit_products.
__device__ inline void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until all are done. Their registers must not be touched before.
__device__ inline void wait_products() { asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory"); }

// Keeps the compiler from moving what it does to these registers across this point.
template <int COUNT>
__device__ inline void hold(float (&registers)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}

#define TEXT_OF(x) #x
#define NAME_OF(x) TEXT_OF(x)
#define UP_TO_32 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define UP_TO_64 \
    UP_TO_32 ", " \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define FOUR(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define SIXTEEN(d, i) FOUR(d, i), FOUR(d, i + 4), FOUR(d, i + 8), FOUR(d, i + 12)

// d (64, 2 · COUNT) = a (64, 16) · bᵀ, or added to it; COUNT entries of d a thread, halves of PRODUCT_TYPE. Thread t of the
// warpgroup has rows t / 4 % 8 + 16 · (t / 32) + {0, 8} and columns t % 4 · 2 + {0, 1} of every 8: of `d` two columns
// of a row after another, of `a` two entries of both rows, then those 8 columns on.
__device__ inline void multiply(float (&d)[32], const unsigned (&a)[4], unsigned long long b, bool add) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32." NAME_OF(PRODUCT_TYPE) "." NAME_OF(PRODUCT_TYPE) " {" UP_TO_32
        "}, {%32, %33, %34, %35}, %36, p, 1, 1, 0;\n}"
        : SIXTEEN(d, 0), SIXTEEN(d, 16)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)add));
}
__device__ inline void multiply(float (&d)[64], const unsigned (&a)[4], unsigned long long b, bool add) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32." NAME_OF(PRODUCT_TYPE) "." NAME_OF(PRODUCT_TYPE) " {" UP_TO_64
        "}, {%64, %65, %66, %67}, %68, p, 1, 1, 0;\n}"
        : SIXTEEN(d, 0), SIXTEEN(d, 16), SIXTEEN(d, 32), SIXTEEN(d, 48)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)add));
}
// d (64, 128) = aᵀ · b, both factors (16, ...) transposed in shared memory.
__device__ inline void multiply_transposed(float (&d)[64], unsigned long long a, unsigned long long b, bool add) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32." NAME_OF(PRODUCT_TYPE) "." NAME_OF(PRODUCT_TYPE) " {" UP_TO_64
        "}, %64, %65, p, 1, 1, 1, 1;\n}"
        : SIXTEEN(d, 0), SIXTEEN(d, 16), SIXTEEN(d, 32), SIXTEEN(d, 48)
        : "l"(a), "l"(b), "r"((int)add));
}
