"""On the path of processes that tests start against the small Hub: pauses are a hundredth as long.

With TEST_PUSH_UNLOADED in the environment, a push leaves out the process that loads the model, which takes seconds.
"""

import os
import time

_sleep = time.sleep
time.sleep = lambda seconds: _sleep(seconds / 100)

if os.environ.get("TEST_PUSH_UNLOADED"):
    from btx_merge.publishing import checks as publish_checks

    publish_checks._load = lambda folder: {"problems": [], "tensors": None}
