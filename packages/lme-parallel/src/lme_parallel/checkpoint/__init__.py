"""Sharded training checkpoints: zarr v3 arrays and JSON, committed by one file."""
