"""Every op in three implementations: Numba (cpu/), Triton (gpu/) and plain torch, the definition (reference/).

No autograd, no modules, no op registration; nothing of initperf is imported.
"""
