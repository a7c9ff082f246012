"""The fast path of a block on a CPU: when it applies, and its kernels."""
