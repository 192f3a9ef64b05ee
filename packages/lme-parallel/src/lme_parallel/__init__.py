"""Mesh, parallel layouts over plain modules, sharded checkpoints."""

__version__ = "0.1.0"
