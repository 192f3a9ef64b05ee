"""One folder an op: `reference.py` is its definition, `_<backend>.py` an implementation."""
