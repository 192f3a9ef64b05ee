"""Parts that mixers, MLPs and architectures are made of."""
