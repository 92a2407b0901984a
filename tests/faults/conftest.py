"""What the long fault tests can ask for besides the shared server."""

from tests.fixtures.faults import _private_template, private_database, private_server

__all__ = ["_private_template", "private_database", "private_server"]
