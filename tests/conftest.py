"""What every test can ask for."""

import signal

pytest_plugins = ("tests.fixtures.measured", "tests.fixtures.postgres")

# A shell that runs a job in the background has it ignore Ctrl-C, and so would every program the tests start to interrupt it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
