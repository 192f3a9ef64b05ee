"""Times, bytes, operations and memory of the kernels: `python -m lme_kernels.bench`."""
