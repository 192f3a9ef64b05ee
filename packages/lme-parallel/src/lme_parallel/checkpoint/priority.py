"""Which threads run first where there are more of them than processors."""

import os
import sys
import threading

# Of -20 (first) to 19 (last); 0 is usual.
BEHIND = 10


def go_behind_training() -> None:
    """Let other threads of this process run before this one and those that it starts.

    A save in the background copies and sums up gigabytes on many threads; one that launches
    kernels must not wait for them. Linux keeps priorities by thread; elsewhere nothing happens.
    """
    if sys.platform != "linux":
        return
    thread = threading.get_native_id()
    # Later than it is already is always allowed; earlier is not.
    if os.getpriority(os.PRIO_PROCESS, thread) < BEHIND:
        os.setpriority(os.PRIO_PROCESS, thread, BEHIND)
