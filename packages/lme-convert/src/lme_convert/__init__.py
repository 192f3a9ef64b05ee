"""Model directories: read, write, translate to and from HuggingFace, prove the result."""

__version__ = "0.1.0"
