#include "cuda_host.h"

#include "../../csrc/common.h"

#include "../../csrc/vector_quantize.cu"

#include "library.h"

static Forward forward_arguments;
static Backward backward_arguments;
const std::vector<Kernel> kernels{KERNEL(vector_quantize_fwd, forward_arguments),
                                  KERNEL(vector_quantize_bwd, backward_arguments)};
