"""How CPU kernels compile, run on torch's threads, get memory and speak LLVM vectors."""
