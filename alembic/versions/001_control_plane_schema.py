"""The schema: three tables of the seed, their versions, their rules, and the change log.

Every row carries `version`, drawn from one sequence by a trigger on every insert and every real change. A statement trigger then writes
one row per changed row to `change_log` and sends one NOTIFY on the channel `control_plane`. Rules that hold for every client (the life
cycle of a tenant, the protected tenant, keys that never change) are triggers too. PostgreSQL fires the triggers of a table in the order
of their names, hence the numbers in them: first the rules, then the stamp, then the log.

What it needs: CREATE on the database (or on an existing schema `control_plane`), and nothing else: no extension, no superuser.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision: str = "001_control_plane_schema"
down_revision: str | None = None
branch_labels: None = None
depends_on: None = None

SCHEMA = "control_plane"

# The seed promises that this tenant exists (revision 002); a trigger below keeps it.
SYSTEM_ADMIN_ID = "00000000-0000-7000-8000-000000000001"

ENUMS = {
    "tenant_environment": ("development", "staging", "production"),
    "tenant_status": ("active", "inactive", "suspended", "pending"),
    "tenant_database_status": ("active", "inactive", "migrating", "error"),
}

# Table, its primary key, and the expression of a row `r` that says which tenant a change concerns.
LOGGED = (
    ("tenants", "tenant_id", "r.tenant_id"),
    ("tenant_databases", "id", "r.tenant_id"),
    ("system_config", "key", "NULL::uuid"),
)


def upgrade() -> None:
    """Create everything."""
    for name, labels in ENUMS.items():
        quoted = ", ".join(f"'{label}'" for label in labels)
        op.execute(f"CREATE TYPE {SCHEMA}.{name} AS ENUM ({quoted})")
    # No CACHE: the order of the numbers is the order in which rows were changed.
    op.execute(f"CREATE SEQUENCE {SCHEMA}.version_seq AS bigint")
    _create_tables()
    _create_rules()
    _create_stamps()
    _create_log()


def downgrade() -> None:
    """Drop everything, the data with it."""
    for table in ("tenant_databases", "tenants", "system_config", "change_log"):
        op.drop_table(table, schema=SCHEMA)
    for function in (
        *(f"log_{table}" for table, _, _ in LOGGED),
        "stamp_version",
        "refuse_truncate",
        "refuse_protected",
        "refuse_transition",
        "refuse_identity",
    ):
        op.execute(f"DROP FUNCTION {SCHEMA}.{function}()")
    op.execute(f"DROP SEQUENCE {SCHEMA}.version_seq")
    for name in ENUMS:
        op.execute(f"DROP TYPE {SCHEMA}.{name}")


def _enum(name: str) -> postgresql.ENUM:
    return postgresql.ENUM(*ENUMS[name], name=name, schema=SCHEMA, create_type=False)


def _create_tables() -> None:
    # op.f: the name as it is, whatever naming convention the models have one day.
    op.create_table(
        "tenants",
        sa.Column("tenant_id", sa.Uuid(), nullable=False),
        sa.Column("name", sa.String(length=255), nullable=False),
        sa.Column("environment", _enum("tenant_environment"), nullable=False),
        sa.Column("status", _enum("tenant_status"), server_default=sa.text("'pending'"), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.func.now(), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), server_default=sa.func.now(), nullable=False),
        sa.Column("labels", postgresql.JSONB(), server_default=sa.text("'{}'::jsonb"), nullable=False),
        sa.Column("status_reason", sa.Text(), nullable=True),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("tenant_id", name=op.f("pk_tenants")),
        sa.UniqueConstraint("name", name=op.f("uq_tenants_name")),
        sa.CheckConstraint(
            r"name <> '' AND name = btrim(name) AND name !~ '[\x01-\x1f\x7f]'", name=op.f("ck_tenants_name")
        ),
        sa.CheckConstraint("jsonb_typeof(labels) = 'object'", name=op.f("ck_tenants_labels")),
        schema=SCHEMA,
    )
    op.create_index("idx_tenants_status", "tenants", ["status"], schema=SCHEMA)
    op.create_index("idx_tenants_created_at_tenant_id", "tenants", ["created_at", "tenant_id"], schema=SCHEMA)
    op.create_index(
        "idx_tenants_name_prefix",
        "tenants",
        ["name"],
        schema=SCHEMA,
        postgresql_ops={"name": "varchar_pattern_ops"},
    )
    op.create_index(
        "idx_tenants_labels",
        "tenants",
        ["labels"],
        schema=SCHEMA,
        postgresql_using="gin",
        postgresql_ops={"labels": "jsonb_path_ops"},
    )

    op.create_table(
        "tenant_databases",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("tenant_id", sa.Uuid(), nullable=False),
        sa.Column("connection_string_encrypted", sa.Text(), nullable=False),
        sa.Column("database_name", sa.String(length=255), nullable=False),
        sa.Column("host", sa.String(length=255), nullable=False),
        sa.Column("port", sa.Integer(), server_default=sa.text("5432"), nullable=False),
        sa.Column("status", _enum("tenant_database_status"), server_default=sa.text("'active'"), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.func.now(), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), server_default=sa.func.now(), nullable=False),
        sa.Column("purpose", sa.String(length=63), server_default=sa.text("'primary'"), nullable=False),
        sa.Column("revision", sa.String(length=255), nullable=True),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_tenant_databases")),
        sa.UniqueConstraint("tenant_id", "purpose", name=op.f("uq_tenant_databases_tenant_id_purpose")),
        sa.ForeignKeyConstraint(
            ["tenant_id"],
            [f"{SCHEMA}.tenants.tenant_id"],
            name=op.f("fk_tenant_databases_tenant_id_tenants"),
            ondelete="RESTRICT",
        ),
        sa.CheckConstraint("port BETWEEN 1 AND 65535", name=op.f("ck_tenant_databases_port")),
        sa.CheckConstraint("purpose ~ '^[a-z][a-z0-9_-]{0,62}$'", name=op.f("ck_tenant_databases_purpose")),
        schema=SCHEMA,
    )
    op.create_index("idx_tenant_databases_tenant_id", "tenant_databases", ["tenant_id"], schema=SCHEMA)
    op.create_index("idx_tenant_databases_status", "tenant_databases", ["status"], schema=SCHEMA)

    op.create_table(
        "system_config",
        sa.Column("key", sa.String(length=255), nullable=False),
        sa.Column("value", postgresql.JSONB(), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), server_default=sa.func.now(), nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("key", name=op.f("pk_system_config")),
        schema=SCHEMA,
    )

    op.create_table(
        "change_log",
        sa.Column("version", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("table_name", sa.Text(), nullable=False),
        sa.Column("row_id", sa.Text(), nullable=False),
        sa.Column("tenant_id", sa.Uuid(), nullable=True),
        sa.Column("operation", sa.Text(), nullable=False),
        sa.Column("transaction_id", sa.BigInteger(), nullable=False),
        sa.Column("changed_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("version", name=op.f("pk_change_log")),
        sa.CheckConstraint("operation IN ('insert', 'update', 'delete')", name=op.f("ck_change_log_operation")),
        schema=SCHEMA,
    )


def _create_function(name: str, body: str, *, attributes: str = "SET search_path = pg_catalog, pg_temp") -> None:
    """Create a trigger function that runs as its owner, so that whoever may write a table needs no rights beyond that.

    Nobody may attach it to a table of their own: a trigger checks EXECUTE when it is made, not when it fires.
    """
    op.execute(
        f"CREATE FUNCTION {SCHEMA}.{name}() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER {attributes} "
        f"AS $function$\n{body.strip()}\n$function$"
    )
    op.execute(f"REVOKE ALL ON FUNCTION {SCHEMA}.{name}() FROM PUBLIC")


def _create_rules() -> None:
    """Refuse, for every client, what must not happen. A rule is the trigger's condition: a change within the rules costs no call.

    The errors carry a constraint's name, by which clients tell them apart; and never a row's values.
    """
    _create_function(
        "refuse_identity",
        """
BEGIN
    RAISE EXCEPTION 'the identity of a row of % cannot be changed', TG_TABLE_NAME USING
        ERRCODE = 'check_violation', CONSTRAINT = 'ck_control_plane_identity',
        SCHEMA = TG_TABLE_SCHEMA, TABLE = TG_TABLE_NAME,
        HINT = 'Insert a new row, and delete the old one.';
END
""",
    )
    _create_function(
        "refuse_transition",
        """
BEGIN
    RAISE EXCEPTION 'a tenant cannot change from % to %', OLD.status, NEW.status USING
        ERRCODE = 'check_violation', CONSTRAINT = 'ck_tenants_status_transition',
        SCHEMA = TG_TABLE_SCHEMA, TABLE = TG_TABLE_NAME, COLUMN = 'status',
        DETAIL = json_build_object('from', OLD.status, 'to', NEW.status)::text,
        HINT = 'pending to active; active to suspended and back; active, suspended or pending to inactive; inactive to active.';
END
""",
    )
    _create_function(
        "refuse_protected",
        """
BEGIN
    RAISE EXCEPTION 'the tenant system_admin is protected' USING
        ERRCODE = 'check_violation', CONSTRAINT = 'ck_tenants_system_admin',
        SCHEMA = TG_TABLE_SCHEMA, TABLE = TG_TABLE_NAME,
        HINT = 'It cannot be renamed, suspended, deactivated or deleted.';
END
""",
    )
    _create_function(
        "refuse_truncate",
        """
BEGIN
    RAISE EXCEPTION 'table % cannot be truncated', TG_TABLE_NAME USING
        ERRCODE = 'check_violation', CONSTRAINT = 'ck_control_plane_truncate',
        SCHEMA = TG_TABLE_SCHEMA, TABLE = TG_TABLE_NAME,
        HINT = 'Use DELETE: the change log sees no TRUNCATE.';
END
""",
    )
    # Which database belongs to which tenant never changes either: its connection string is sealed for both, and whoever follows the
    # changes of the former tenant would not see it go.
    for table, identity in (
        ("tenants", "OLD.tenant_id IS DISTINCT FROM NEW.tenant_id"),
        ("tenant_databases", "(OLD.id, OLD.tenant_id) IS DISTINCT FROM (NEW.id, NEW.tenant_id)"),
        ("system_config", "OLD.key IS DISTINCT FROM NEW.key"),
    ):
        op.execute(
            f"CREATE TRIGGER {table}_00_truncate BEFORE TRUNCATE ON {SCHEMA}.{table} "
            f"FOR EACH STATEMENT EXECUTE FUNCTION {SCHEMA}.refuse_truncate()"
        )
        op.execute(
            f"CREATE TRIGGER {table}_10_identity BEFORE UPDATE ON {SCHEMA}.{table} FOR EACH ROW "
            f"WHEN ({identity}) EXECUTE FUNCTION {SCHEMA}.refuse_identity()"
        )
    op.execute(
        f"CREATE TRIGGER tenants_20_life_cycle BEFORE UPDATE ON {SCHEMA}.tenants FOR EACH ROW "
        "WHEN (OLD.status IS DISTINCT FROM NEW.status AND NOT ("
        "OLD.status = 'pending' AND NEW.status IN ('active', 'inactive')"
        " OR OLD.status = 'active' AND NEW.status IN ('suspended', 'inactive')"
        " OR OLD.status = 'suspended' AND NEW.status IN ('active', 'inactive')"
        " OR OLD.status = 'inactive' AND NEW.status = 'active'"
        f")) EXECUTE FUNCTION {SCHEMA}.refuse_transition()"
    )
    op.execute(
        f"CREATE TRIGGER tenants_30_protect_update BEFORE UPDATE ON {SCHEMA}.tenants FOR EACH ROW "
        f"WHEN (OLD.tenant_id = '{SYSTEM_ADMIN_ID}' AND (NEW.name <> OLD.name OR NEW.status <> OLD.status AND NEW.status <> 'active')) "
        f"EXECUTE FUNCTION {SCHEMA}.refuse_protected()"
    )
    op.execute(
        f"CREATE TRIGGER tenants_30_protect_delete BEFORE DELETE ON {SCHEMA}.tenants FOR EACH ROW "
        f"WHEN (OLD.tenant_id = '{SYSTEM_ADMIN_ID}') EXECUTE FUNCTION {SCHEMA}.refuse_protected()"
    )


def _create_stamps() -> None:
    """Give every new and every changed row its version, whatever the client wrote there.

    This one runs for every row, and pinning its search_path would add a tenth to the cost of an insert. It needs none: everything in it,
    the operator too, is named with its schema.
    """
    _create_function(
        "stamp_version",
        f"""
BEGIN
    IF TG_OP OPERATOR(pg_catalog.=) 'UPDATE' THEN
        NEW.updated_at := pg_catalog.clock_timestamp();
    END IF;
    NEW.version := pg_catalog.nextval('{SCHEMA}.version_seq'::pg_catalog.regclass);
    RETURN NEW;
END
""",
        attributes="",
    )
    for table, _, _ in LOGGED:
        op.execute(
            f"CREATE TRIGGER {table}_90_stamp_insert BEFORE INSERT ON {SCHEMA}.{table} "
            f"FOR EACH ROW EXECUTE FUNCTION {SCHEMA}.stamp_version()"
        )
        # *<> compares what is stored. IS DISTINCT FROM asks each type, and jsonb says that 1 and 1.0 are equal: a change nobody would see.
        op.execute(
            f"CREATE TRIGGER {table}_90_stamp_update BEFORE UPDATE ON {SCHEMA}.{table} "
            f"FOR EACH ROW WHEN (OLD.* *<> NEW.*) EXECUTE FUNCTION {SCHEMA}.stamp_version()"
        )


def _create_log() -> None:
    """Log every statement as a whole: one INSERT and one NOTIFY, however many rows it changed.

    Each table has a function with its statements written out, so that PL/pgSQL keeps their plans: built at run time they cost a single-row
    insert four times as much. But a kept plan was made for the first statement of a session, of one row perhaps, and must do for a hundred
    thousand as well, where a nested loop of old and new rows takes hours. Hence enable_nestloop = off.
    """
    for table, key, tenant in LOGGED:
        changed_rows = f"new_rows r JOIN old_rows o ON o.{key} = r.{key} WHERE o.version <> r.version"
        inserts = _log(table, key, tenant, "insert", version="r.version", rows="new_rows r")
        updates = _log(table, key, tenant, "update", version="r.version", rows=changed_rows)
        deletes = _log(table, key, tenant, "delete", version=f"nextval('{SCHEMA}.version_seq')", rows="old_rows r")
        _create_function(
            f"log_{table}",
            f"""
DECLARE
    logged bigint;
    highest bigint;
BEGIN
    IF TG_OP = 'INSERT' THEN
        {inserts}
    ELSIF TG_OP = 'UPDATE' THEN
        {updates}
    ELSE
        {deletes}
    END IF;
    IF logged > 0 THEN
        PERFORM pg_notify(
            'control_plane', json_build_object('table', '{table}', 'version', highest, 'rows', logged)::text
        );
    END IF;
    RETURN NULL;
END
""",
            attributes="SET search_path = pg_catalog, pg_temp SET enable_nestloop = off",
        )
        for operation, transition in (
            ("insert", "NEW TABLE AS new_rows"),
            ("update", "OLD TABLE AS old_rows NEW TABLE AS new_rows"),
            ("delete", "OLD TABLE AS old_rows"),
        ):
            op.execute(
                f"CREATE TRIGGER {table}_95_log_{operation} AFTER {operation.upper()} ON {SCHEMA}.{table} "
                f"REFERENCING {transition} FOR EACH STATEMENT EXECUTE FUNCTION {SCHEMA}.log_{table}()"
            )


def _log(table: str, key: str, tenant: str, operation: str, *, version: str, rows: str) -> str:
    """Write the statement that logs one entry per row."""
    return f"""WITH entries AS (
            INSERT INTO {SCHEMA}.change_log
                (version, table_name, row_id, tenant_id, operation, transaction_id, changed_at)
            SELECT {version}, '{table}', r.{key}::text, {tenant}, '{operation}', txid_current(), clock_timestamp()
            FROM {rows}
            RETURNING version
        )
        SELECT count(*), max(version) INTO logged, highest FROM entries;"""  # noqa: S608 -- constants of this file
