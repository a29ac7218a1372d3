"""What the first call costs: compilation, and loading what an earlier process compiled."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile

CHILD = """
import json, time
import torch, lamkernels
x, codebook = torch.randn(256, 32, requires_grad=True), torch.randn(8, 32)
vq = lamkernels.VectorQuantize(32, 8)

def quantize():
    out = lamkernels.vector_quantize(x, codebook)
    (out.quantized.sum() + out.commitment_loss).backward()

def step():
    quantized, _, loss = vq(x)
    (quantized.sum() + loss).backward()

calls = {
    "nearest_code": lambda: lamkernels.nearest_code(x, codebook),
    "vector_quantize, forward and backward": quantize,
    "VectorQuantize, training step": step,
}
seconds = {}
for name, call in calls.items():
    start = time.perf_counter()
    call()
    seconds[name] = time.perf_counter() - start
print(json.dumps(seconds))
"""


def first_calls() -> dict[str, dict[str, float]]:
    """Seconds of the first float32 calls on the CPU, one after another, in a process with an empty cache and in one
    behind it: by "compiled" and "cached", then by call.
    """
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "NUMBA_CACHE_DIR": cache}

        def run() -> dict[str, float]:
            done = subprocess.run([sys.executable, "-c", CHILD], env=environment, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"the first calls failed: {done.stderr.strip().splitlines()[-1]}")
            seconds: dict[str, float] = json.loads(done.stdout)
            return seconds

        return {"compiled": run(), "cached": run()}
