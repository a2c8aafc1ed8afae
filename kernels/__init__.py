"""Device code: Triton for GPUs (gpu/), Numba for CPUs (cpu/). No autograd, no modules, no op registration; nothing of initperf is imported."""
