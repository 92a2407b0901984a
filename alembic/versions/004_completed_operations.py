"""Completed operations: the ids of units of work that were committed, each stored in the unit's own transaction.

When the connection breaks between COMMIT and its answer, the id tells whether the work was done: it is there exactly if the work is. `outcome` is
what the unit returned, for whoever asks with the same id again. Rows are not logged as changes, for they change no answer, and old ones are deleted.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision: str = "004_completed_operations"
down_revision: str | None = "003_sealed_connection_strings"
branch_labels: None = None
depends_on: None = None

SCHEMA = "control_plane"


def upgrade() -> None:
    op.create_table(
        "completed_operations",
        sa.Column("operation_id", sa.Uuid(), nullable=False),
        sa.Column("outcome", postgresql.JSONB(), nullable=True),
        sa.Column("completed_at", sa.DateTime(timezone=True), server_default=sa.func.now(), nullable=False),
        sa.PrimaryKeyConstraint("operation_id", name="pk_completed_operations"),
        schema=SCHEMA,
    )
    op.create_index("idx_completed_operations_completed_at", "completed_operations", ["completed_at"], schema=SCHEMA)


def downgrade() -> None:
    op.drop_table("completed_operations", schema=SCHEMA)
