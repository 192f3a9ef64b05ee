"""Pipeline parallelism: each process has some of the layers, micro batches travel between them."""
