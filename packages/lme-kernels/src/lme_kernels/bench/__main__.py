"""Run the benchmark as a program."""

import sys

from lme_kernels.bench.command import main

if __name__ == "__main__":
    sys.exit(main())
