"""What every test can ask for."""

import signal

from hypothesis import HealthCheck, settings

pytest_plugins = ("tests.fixtures.measured", "tests.fixtures.postgres", "tests.fixtures.tidy")

# A shell that runs a job in the background has it ignore Ctrl-C, and so would every program the tests start to interrupt it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples in every run, however slow the machine is: a failure is then the change's, not the day's. Other examples, and the time limits
# that Hypothesis has by itself: `pytest --hypothesis-profile default`.
settings.register_profile("repeatable", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("repeatable")
