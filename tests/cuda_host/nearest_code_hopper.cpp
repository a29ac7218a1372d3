#include "cuda_host.h"

#include "../../csrc/common.h"
#include "hopper.h"

#include "../../csrc/nearest_code_hopper.cu"

#include "library.h"

static Lookup lookup;
const std::vector<Kernel> kernels{KERNEL(ready_codes, lookup), KERNEL(ready_norms, lookup), KERNEL(nearest_code, lookup),
                                  KERNEL(finish_rows, lookup)};
