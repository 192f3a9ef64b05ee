"""Architectures, losses, optimizers and the training loop."""

__version__ = "0.1.0"
