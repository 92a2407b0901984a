"""Sealed connection strings: the form the column takes, the keys, and rotation that is no change.

The column takes sealed text only. Rows of an earlier installation may hold anything, a plain connection string for example. They are neither
sealed here, for a migration has no key, nor left where they are under a constraint that is NOT VALID, for such a row could be read but never
changed again, not even by a rotation. So the migration refuses to run as long as there are any, and says how many and how to find them, not what
is in them.

The table `encryption_keys` names every key that has sealed something. Of a key that is kept outside of the database (environment, file) it has
the check value only, which tells a wrong key at start; of one that is kept here also the key itself, wrapped by an outer key, and its state.

A key that rows use is neither deleted nor destroyed, and no row is stored that names a destroyed one: what it seals could not be opened. Whoever
destroys one waits for all who are writing `tenant_databases`, so that no row slips past while both look.

Rotation seals a value anew without changing what it says. In a transaction that has said `set_config('control_plane.resealing', 'on', true)`, an
UPDATE that changes nothing but `connection_string_encrypted`, and there at least the key id, is no change: no version, no updated_at, no entry in
the log, no NOTIFY. Any other change is one, marker or not.

Locks: `tenant_databases` is closed to readers and writers from the first statement to the end, 10 to 40 seconds for a million rows on a small
machine: every row is read, matched, and put into two indexes. The lock is taken once and whole: taken step by step it would deadlock with a
transaction that reads first and writes then. Building the indexes CONCURRENTLY would take the migration's transaction away, and with it the
promise that a failed one leaves nothing behind.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision: str = "003_sealed_connection_strings"
down_revision: str | None = "002_seed_data"
branch_labels: None = None
depends_on: None = None

SCHEMA = "control_plane"
DATABASES = f"{SCHEMA}.tenant_databases"
KEYS = f"{SCHEMA}.encryption_keys"

STATES = ("pending", "current", "retired", "destroyed")

SEALED = "connection_string_encrypted ~ '^ccp1:[a-z0-9-]{1,32}:[A-Za-z0-9_-]+$'"


def upgrade() -> None:
    """Close the column to all but sealed text, and make the table of keys."""
    op.execute(f"LOCK TABLE {DATABASES} IN ACCESS EXCLUSIVE MODE")
    _require_sealed_text()
    for name, kind in (
        ("verified_at", sa.DateTime(timezone=True)),
        ("server_version", sa.String(length=63)),
        ("tls_version", sa.String(length=63)),
        ("verification_error", sa.Text()),
    ):
        op.add_column("tenant_databases", sa.Column(name, kind, nullable=True), schema=SCHEMA)
    op.create_index("idx_tenant_databases_created_at_id", "tenant_databases", ["created_at", "id"], schema=SCHEMA)
    op.create_index(
        "idx_tenant_databases_kid_id",
        "tenant_databases",
        [sa.text("split_part(connection_string_encrypted, ':', 2)"), "id"],
        schema=SCHEMA,
    )
    _create_keys()
    _create_rules()
    _create_stamps()
    _create_log()


def downgrade() -> None:
    """Take it all back, unless rows would lose their keys: those are nowhere else."""
    op.execute(f"""
DO $migration$
DECLARE
    closed bigint := (
        SELECT count(*)
        FROM {DATABASES} d JOIN {KEYS} k ON k.kid = split_part(d.connection_string_encrypted, ':', 2)
        WHERE k.wrapped IS NOT NULL
    );
BEGIN
    IF closed > 0 THEN
        RAISE EXCEPTION
            'table {KEYS} holds the keys of % rows of {DATABASES}, which could not be opened without it; delete those rows first',
            closed USING ERRCODE = 'dependent_objects_still_exist';
    END IF;
END
$migration$
""")  # noqa: S608 -- constants of this file
    op.execute(f"LOCK TABLE {DATABASES} IN ACCESS EXCLUSIVE MODE")
    op.execute(f"DROP TRIGGER tenant_databases_92_key_insert ON {DATABASES}")
    op.execute(f"DROP TRIGGER tenant_databases_92_key_update ON {DATABASES}")
    _stamp_databases_with("stamp_version")
    op.drop_table("encryption_keys", schema=SCHEMA)
    for function in (
        "log_encryption_keys",
        "stamp_unless_resealed",
        "refuse_destroyed_key",
        "refuse_key_in_use",
        "refuse_key_transition",
    ):
        op.execute(f"DROP FUNCTION {SCHEMA}.{function}()")
    op.execute(f"DROP TYPE {SCHEMA}.encryption_key_state")
    op.drop_index("idx_tenant_databases_kid_id", "tenant_databases", schema=SCHEMA)
    op.drop_index("idx_tenant_databases_created_at_id", "tenant_databases", schema=SCHEMA)
    for column in ("verification_error", "tls_version", "server_version", "verified_at"):
        op.drop_column("tenant_databases", column, schema=SCHEMA)
    op.drop_constraint(op.f("ck_tenant_databases_sealed"), "tenant_databases", schema=SCHEMA)


def _require_sealed_text() -> None:
    """Add the constraint; where rows are in its way, say what to do about them.

    The library passes a server's message on only when its SQLSTATE says that it speaks of the schema, not of a row's values: hence that code.
    """
    op.execute(f"""
DO $migration$
BEGIN
    ALTER TABLE {DATABASES} ADD CONSTRAINT ck_tenant_databases_sealed CHECK ({SEALED});
EXCEPTION WHEN check_violation THEN
    RAISE EXCEPTION
        '% rows of {DATABASES} hold text that is no sealed connection string. Note where these databases are and delete the rows; migrate; '
        'register the databases again, which seals them. To find the rows: SELECT id, tenant_id, purpose FROM {DATABASES} WHERE NOT (%);',
        (SELECT count(*) FROM {DATABASES} WHERE NOT ({SEALED})), $condition${SEALED}$condition$
        USING ERRCODE = 'invalid_table_definition';
END
$migration$
""")  # noqa: S608 -- constants of this file


def _create_keys() -> None:
    labels = ", ".join(f"'{state}'" for state in STATES)
    op.execute(f"CREATE TYPE {SCHEMA}.encryption_key_state AS ENUM ({labels})")
    op.create_table(
        "encryption_keys",
        sa.Column("kid", sa.String(length=32), nullable=False),
        sa.Column("provider", sa.String(length=63), nullable=False),
        sa.Column("kek_ref", sa.Text(), nullable=True),
        sa.Column("wrapped", sa.Text(), nullable=True),
        sa.Column(
            "state",
            postgresql.ENUM(*STATES, name="encryption_key_state", schema=SCHEMA, create_type=False),
            nullable=True,
        ),
        sa.Column("check_value", sa.String(length=32), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.func.now(), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), server_default=sa.func.now(), nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("kid", name=op.f("pk_encryption_keys")),
        sa.CheckConstraint("kid ~ '^[a-z0-9-]{1,32}$'", name=op.f("ck_encryption_keys_kid")),
        sa.CheckConstraint("provider <> ''", name=op.f("ck_encryption_keys_provider")),
        sa.CheckConstraint("check_value ~ '^[0-9a-f]{32}$'", name=op.f("ck_encryption_keys_check_value")),
        sa.CheckConstraint(
            "CASE WHEN state IS NULL THEN kek_ref IS NULL AND wrapped IS NULL"
            " ELSE kek_ref IS NOT NULL AND (wrapped IS NULL) = (state = 'destroyed') END",
            name=op.f("ck_encryption_keys_wrapped"),
        ),
        schema=SCHEMA,
    )
    op.create_index(
        "uq_encryption_keys_current",
        "encryption_keys",
        ["state"],
        unique=True,
        schema=SCHEMA,
        postgresql_where=sa.text("state = 'current'"),
    )


def _create_function(name: str, body: str, *, attributes: str = "SET search_path = pg_catalog, pg_temp") -> None:
    """Create a trigger function that runs as its owner, as the first revision does."""
    op.execute(
        f"CREATE FUNCTION {SCHEMA}.{name}() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER {attributes} "
        f"AS $function$\n{body.strip()}\n$function$"
    )
    op.execute(f"REVOKE ALL ON FUNCTION {SCHEMA}.{name}() FROM PUBLIC")


def _create_rules() -> None:
    _create_function(
        "refuse_key_transition",
        """
BEGIN
    RAISE EXCEPTION 'an encryption key cannot change from % to %', coalesce(OLD.state::text, 'outside'), coalesce(NEW.state::text, 'outside') USING
        ERRCODE = 'check_violation', CONSTRAINT = 'ck_encryption_keys_state_transition',
        SCHEMA = TG_TABLE_SCHEMA, TABLE = TG_TABLE_NAME, COLUMN = 'state',
        HINT = 'pending to current; current to retired and back; pending or retired to destroyed, from which nothing leads back.';
END
""",
    )
    # The lock ends all writing of the table, and the question after it is asked with a snapshot that sees what was written.
    _create_function(
        "refuse_key_in_use",
        f"""
BEGIN
    IF current_setting('transaction_isolation') NOT IN ('read committed', 'read uncommitted') THEN
        RAISE EXCEPTION 'a key is deleted or destroyed in a READ COMMITTED transaction only' USING
            ERRCODE = 'check_violation', CONSTRAINT = 'ck_encryption_keys_isolation',
            SCHEMA = TG_TABLE_SCHEMA, TABLE = TG_TABLE_NAME,
            HINT = 'Others do not see the rows that were written since they began.';
    END IF;
    LOCK TABLE {DATABASES} IN SHARE MODE;
    IF EXISTS (SELECT FROM {DATABASES} WHERE split_part(connection_string_encrypted, ':', 2) = OLD.kid) THEN
        RAISE EXCEPTION 'rows of tenant_databases are sealed with this key' USING
            ERRCODE = 'check_violation', CONSTRAINT = 'ck_encryption_keys_in_use',
            SCHEMA = TG_TABLE_SCHEMA, TABLE = TG_TABLE_NAME,
            HINT = 'Rotate to another key first.';
    END IF;
    IF TG_OP = 'DELETE' THEN
        RETURN OLD;
    END IF;
    RETURN NEW;
END
""",
    )
    # Once for a statement: asked for each row, a rotation would take a quarter longer. A row that was so before may change in other respects.
    _create_function(
        "refuse_destroyed_key",
        f"""
DECLARE
    refused boolean;
BEGIN
    IF TG_OP = 'INSERT' THEN
        refused := EXISTS (
            SELECT FROM {KEYS} k JOIN new_rows r ON split_part(r.connection_string_encrypted, ':', 2) = k.kid
            WHERE k.state = 'destroyed'
        );
    ELSE
        refused := EXISTS (
            SELECT FROM {KEYS} k JOIN new_rows r ON split_part(r.connection_string_encrypted, ':', 2) = k.kid
            WHERE k.state = 'destroyed' AND NOT EXISTS (
                SELECT FROM old_rows o WHERE o.id = r.id AND split_part(o.connection_string_encrypted, ':', 2) = k.kid
            )
        );
    END IF;
    IF refused THEN
        RAISE EXCEPTION 'the connection string is sealed with a key that was destroyed' USING
            ERRCODE = 'check_violation', CONSTRAINT = 'ck_tenant_databases_destroyed_key',
            SCHEMA = TG_TABLE_SCHEMA, TABLE = TG_TABLE_NAME, COLUMN = 'connection_string_encrypted',
            HINT = 'Seal it with the current key.';
    END IF;
    RETURN NULL;
END
""",  # noqa: S608 -- constants of this file
    )
    for name, when, function in (
        (
            "10_identity",
            "(OLD.kid, OLD.check_value) IS DISTINCT FROM (NEW.kid, NEW.check_value)",
            "refuse_identity",
        ),
        (
            "20_life_cycle",
            # A key that was kept outside may be taken in, in any state but the last.
            "OLD.state IS DISTINCT FROM NEW.state AND NOT coalesce("
            "OLD.state IS NULL AND NEW.state <> 'destroyed'"
            " OR OLD.state = 'pending' AND NEW.state IN ('current', 'destroyed')"
            " OR OLD.state = 'current' AND NEW.state = 'retired'"
            " OR OLD.state = 'retired' AND NEW.state IN ('current', 'destroyed'), false)",
            "refuse_key_transition",
        ),
        (
            "30_in_use_update",
            "NEW.state = 'destroyed' AND OLD.state IS DISTINCT FROM NEW.state",
            "refuse_key_in_use",
        ),
    ):
        op.execute(
            f"CREATE TRIGGER encryption_keys_{name} BEFORE UPDATE ON {KEYS} "
            f"FOR EACH ROW WHEN ({when}) EXECUTE FUNCTION {SCHEMA}.{function}()"
        )
    op.execute(
        f"CREATE TRIGGER encryption_keys_00_truncate BEFORE TRUNCATE ON {KEYS} "
        f"FOR EACH STATEMENT EXECUTE FUNCTION {SCHEMA}.refuse_truncate()"
    )
    op.execute(
        f"CREATE TRIGGER encryption_keys_30_in_use_delete BEFORE DELETE ON {KEYS} "
        f"FOR EACH ROW EXECUTE FUNCTION {SCHEMA}.refuse_key_in_use()"
    )
    for operation, transition in (
        ("insert", "NEW TABLE AS new_rows"),
        ("update", "OLD TABLE AS old_rows NEW TABLE AS new_rows"),
    ):
        op.execute(
            f"CREATE TRIGGER tenant_databases_92_key_{operation} AFTER {operation.upper()} ON {DATABASES} "
            f"REFERENCING {transition} FOR EACH STATEMENT EXECUTE FUNCTION {SCHEMA}.refuse_destroyed_key()"
        )


def _create_stamps() -> None:
    op.execute(
        f"CREATE TRIGGER encryption_keys_90_stamp_insert BEFORE INSERT ON {KEYS} "
        f"FOR EACH ROW EXECUTE FUNCTION {SCHEMA}.stamp_version()"
    )
    op.execute(
        f"CREATE TRIGGER encryption_keys_90_stamp_update BEFORE UPDATE ON {KEYS} "
        f"FOR EACH ROW WHEN (OLD.* *<> NEW.*) EXECUTE FUNCTION {SCHEMA}.stamp_version()"
    )
    # The rows are compared whole, so that a column added one day is looked at as well. Columns named in the trigger's condition could be
    # forgotten there, and none of them could change its type as long as the trigger is there.
    _create_function(
        "stamp_unless_resealed",
        f"""
DECLARE
    resealed record;
BEGIN
    IF current_setting('control_plane.resealing', true) = 'on' THEN
        resealed := OLD;
        resealed.connection_string_encrypted := NEW.connection_string_encrypted;
        IF resealed *= NEW
            AND split_part(OLD.connection_string_encrypted, ':', 2) <> split_part(NEW.connection_string_encrypted, ':', 2)
        THEN
            RETURN NEW;
        END IF;
    END IF;
    NEW.updated_at := clock_timestamp();
    NEW.version := nextval('{SCHEMA}.version_seq');
    RETURN NEW;
END
""",
    )
    _stamp_databases_with("stamp_unless_resealed")


def _stamp_databases_with(function: str) -> None:
    op.execute(f"DROP TRIGGER tenant_databases_90_stamp_update ON {DATABASES}")
    op.execute(
        f"CREATE TRIGGER tenant_databases_90_stamp_update BEFORE UPDATE ON {DATABASES} "
        f"FOR EACH ROW WHEN (OLD.* *<> NEW.*) EXECUTE FUNCTION {SCHEMA}.{function}()"
    )


def _create_log() -> None:
    """Log statements like the first revision does for its tables."""
    changed_rows = "new_rows r JOIN old_rows o ON o.kid = r.kid WHERE o.version <> r.version"
    _create_function(
        "log_encryption_keys",
        f"""
DECLARE
    logged bigint;
    highest bigint;
BEGIN
    IF TG_OP = 'INSERT' THEN
        {_log("insert", version="r.version", rows="new_rows r")}
    ELSIF TG_OP = 'UPDATE' THEN
        {_log("update", version="r.version", rows=changed_rows)}
    ELSE
        {_log("delete", version=f"nextval('{SCHEMA}.version_seq')", rows="old_rows r")}
    END IF;
    IF logged > 0 THEN
        PERFORM pg_notify(
            'control_plane', json_build_object('table', 'encryption_keys', 'version', highest, 'rows', logged)::text
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
            f"CREATE TRIGGER encryption_keys_95_log_{operation} AFTER {operation.upper()} ON {KEYS} "
            f"REFERENCING {transition} FOR EACH STATEMENT EXECUTE FUNCTION {SCHEMA}.log_encryption_keys()"
        )


def _log(operation: str, *, version: str, rows: str) -> str:
    """Write the statement that logs one entry per row."""
    return f"""WITH entries AS (
            INSERT INTO {SCHEMA}.change_log
                (version, table_name, row_id, tenant_id, operation, transaction_id, changed_at)
            SELECT {version}, 'encryption_keys', r.kid, NULL::uuid, '{operation}', txid_current(), clock_timestamp()
            FROM {rows}
            RETURNING version
        )
        SELECT count(*), max(version) INTO logged, highest FROM entries;"""  # noqa: S608 -- constants of this file
