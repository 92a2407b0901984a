"""The tenant every control plane begins with: `system_admin`, production, active.

Its id is the same in every control plane, and published as `car_control_plane.models.SYSTEM_ADMIN_ID`.
"""

from alembic import op

revision: str = "002_seed_data"
down_revision: str | None = "001_control_plane_schema"
branch_labels: None = None
depends_on: None = None


def upgrade() -> None:
    """Add the tenant, unless it is there."""
    op.execute("""
        INSERT INTO control_plane.tenants (tenant_id, name, environment, status)
        VALUES ('00000000-0000-7000-8000-000000000001', 'system_admin', 'production', 'active')
        ON CONFLICT (tenant_id) DO NOTHING
    """)


def downgrade() -> None:
    """Remove the tenant, unless it owns databases. It is protected, so its guard stands aside for this one statement."""
    op.execute("ALTER TABLE control_plane.tenants DISABLE TRIGGER tenants_30_protect_delete")
    op.execute("""
        DELETE FROM control_plane.tenants t
        WHERE t.tenant_id = '00000000-0000-7000-8000-000000000001'
          AND NOT EXISTS (SELECT FROM control_plane.tenant_databases d WHERE d.tenant_id = t.tenant_id)
    """)
    op.execute("ALTER TABLE control_plane.tenants ENABLE TRIGGER tenants_30_protect_delete")
