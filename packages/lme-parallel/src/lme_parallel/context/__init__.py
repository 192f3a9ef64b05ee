"""Context parallelism: each sequence is cut over processes, which exchange what mixers need."""
