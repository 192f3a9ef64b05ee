"""Tensor parallelism: each process of a group holds some rows or columns of every matrix."""
