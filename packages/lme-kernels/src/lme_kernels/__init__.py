"""Fused operations for language models, each with a plain torch reference."""

__version__ = "0.1.0"
