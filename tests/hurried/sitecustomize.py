"""On the path of processes that tests start against the small Hub: pauses are a hundredth as long."""

import time

_sleep = time.sleep
time.sleep = lambda seconds: _sleep(seconds / 100)
