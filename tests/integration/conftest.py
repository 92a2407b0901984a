"""What the tests against a database can ask for besides the shared server."""

from tests.fixtures.doors import where
from tests.fixtures.faults import _private_template, private_database, private_server
from tests.fixtures.servers import certificates, cluster

__all__ = ["_private_template", "certificates", "cluster", "private_database", "private_server", "where"]
