#include "cuda_host.h"

#include "../../csrc/common.h"
#include "hopper.h"

#include "../../csrc/covariance_hopper.cu"

#include "library.h"

static Products products;
const std::vector<Kernel> kernels{KERNEL(pair_weights, products), KERNEL(column_products, products), KERNEL(cross_products, products)};
