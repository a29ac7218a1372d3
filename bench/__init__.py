"""Microbenchmarks: workloads, providers, runner and report. Installed as ``lamkernels.bench``."""
