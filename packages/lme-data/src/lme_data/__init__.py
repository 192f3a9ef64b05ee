"""Tokenised text on disk, mixtures and resumable loaders."""

__version__ = "0.1.0"
