"""Expert parallelism: each process has some of the experts, and tokens travel to them."""
