"""What the processes that tests start have loaded from the start: see `lme_parallel.testing`."""

import lme_cli.compose
import lme_cli.loading
import lme_cli.planning  # noqa: F401
