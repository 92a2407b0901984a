"""What the tests against a database can ask for besides the shared server."""

from tests.fixtures.servers import certificates, cluster

__all__ = ["certificates", "cluster"]
