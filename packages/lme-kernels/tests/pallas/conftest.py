"""Calls are compiled to be run once, so that jax had better compile fast than well.

The variable is read when jax is imported, so it is set before any test module is.
"""

import os

os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
