"""Settings: what wins over what, and that a refusal names the variable and never shows its value."""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from pydantic import SecretStr, ValidationError

from car_control_plane.errors import ConfigurationError
from car_control_plane.settings import PREFIX, ControlPlaneSettings, conceal, load_settings, unknown_environment
from tests.fixtures.leaks import failure_of_call, leaks

CANARY = "c4naryc4nary"


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No variable of ours, and a working directory without a `.env` file."""
    for name in list(os.environ):
        if name.upper().startswith(PREFIX) or name.upper() == "DATABASE_URL":
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def dotenv(text: str, encoding: str = "utf-8") -> None:
    Path(".env").write_bytes(text.encode(encoding))


@contextmanager
def not_root() -> Iterator[None]:
    """Root may read every file; be somebody else for a while."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def url() -> str:
    return load_settings().require_database_url()


# --- where values come from -------------------------------------------------------------------------------------------


def test_the_defaults_are_the_documented_ones() -> None:
    assert load_settings().model_dump() == {
        "database_url": None,
        "direct_database_url": None,
        "pooler": "detect",
        "application_name": "car-control-plane",
        "pool_size": 5,
        "max_overflow": 5,
        "pool_timeout_seconds": 5.0,
        "pool_recycle_seconds": 1800.0,
        "pool_ping_after_seconds": 0.5,
        "pool_ping_timeout_seconds": 1.0,
        "read_retry_seconds": 5.0,
        "unit_deadline_seconds": 30.0,
        "operation_retention_seconds": 604_800.0,
        "connect_timeout_seconds": 3.0,
        "command_timeout_seconds": 12.0,
        "statement_timeout_seconds": 10.0,
        "lock_timeout_seconds": 3.0,
        "idle_in_transaction_timeout_seconds": 30.0,
        "migration_lock_timeout_seconds": 600.0,
        "encryption_keys": None,
        "encryption_key_file": None,
        "encryption_key_wrapper": None,
        "encryption_outer_key_file": None,
        "encryption_kms_key_id": None,
        "encryption_vault_key": None,
        "encryption_vault_mount": "transit",
        "encryption_cache_seconds": 300.0,
        "encryption_outage_seconds": 3600.0,
        "tenant_connections_allow": frozenset(),
    }


_WORDS = {
    "encryption_key_wrapper": "local",
    "operation_retention_seconds": "7000",
    "pooler": "none",
    "tenant_connections_allow": "sockets",
}


@pytest.mark.parametrize("name", [name for name in ControlPlaneSettings.model_fields if name != "database_url"])
def test_every_setting_is_read_from_its_variable(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"{PREFIX}{name.upper()}", _WORDS.get(name, "7"))
    value = getattr(load_settings(), name)
    if isinstance(value, SecretStr):
        value = value.get_secret_value()
    assert str(value) in {"7", "7.0", "7000.0", "none", "local", "frozenset({'sockets'})"}


def test_a_setting_without_the_prefix_belongs_to_another_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POOL_SIZE", "77")
    dotenv("POOL_SIZE=78\n")
    assert load_settings().pool_size == 5


@pytest.mark.parametrize("name", ["DATABASE_URL", f"{PREFIX}DATABASE_URL", "database_url"])
def test_the_connection_string_has_two_names(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "postgresql://one/")
    assert url() == "postgresql://one/"


def test_our_own_name_wins_over_the_common_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://common/")
    monkeypatch.setenv(f"{PREFIX}DATABASE_URL", "postgresql://ours/")
    assert url() == "postgresql://ours/"


@pytest.mark.parametrize("in_environment", ["DATABASE_URL", f"{PREFIX}DATABASE_URL"])
@pytest.mark.parametrize("in_file", ["DATABASE_URL", f"{PREFIX}DATABASE_URL"])
def test_the_environment_wins_over_the_file(in_environment: str, in_file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(in_environment, "postgresql://environment/")
    dotenv(f"{in_file}=postgresql://file/\n")
    assert url() == "postgresql://environment/"


@pytest.mark.parametrize("name", ["DATABASE_URL", f"{PREFIX}DATABASE_URL"])
def test_an_argument_wins_over_everything(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "postgresql://environment/")
    monkeypatch.setenv(f"{PREFIX}POOL_SIZE", "6")
    dotenv(f"{name}=postgresql://file/\n{PREFIX}POOL_SIZE=7\n")
    settings = load_settings(database_url="postgresql://argument/", pool_size=8)
    assert (settings.require_database_url(), settings.pool_size) == ("postgresql://argument/", 8)


def test_none_as_an_argument_is_a_value_like_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://environment/")
    assert load_settings(database_url=None).database_url is None


def test_a_secret_is_taken_as_it_is() -> None:
    assert load_settings(database_url=SecretStr("postgresql://one/")).require_database_url() == "postgresql://one/"


# --- the .env file ----------------------------------------------------------------------------------------------------


def test_the_file_is_shared_with_other_programs() -> None:
    dotenv(f"DATABASE_URL=postgresql://file/\nDJANGO_SECRET=x\n{PREFIX}POOL_SIZ=9\nexport FOO=bar\n")
    assert url() == "postgresql://file/"


def test_the_file_may_refer_to_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PASSWORD_OF_DB", "geheim")
    dotenv("DATABASE_URL=postgresql://u:${PASSWORD_OF_DB}@h/d\n")
    assert url() == "postgresql://u:geheim@h/d"


def test_a_byte_order_mark_is_no_part_of_the_first_name() -> None:
    dotenv("DATABASE_URL=postgresql://file/\n", "utf-8-sig")
    assert url() == "postgresql://file/"


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_a_file_that_is_not_utf8_is_named_with_the_cure(encoding: str) -> None:
    dotenv(f"DATABASE_URL=postgresql://u:{CANARY}ü@h/d\n", encoding)
    error = failure_of_call(load_settings)
    assert isinstance(error, ConfigurationError)
    assert str(error) == (
        "the .env file is not UTF-8. PowerShell 5 writes UTF-16 with `>`: save it as UTF-8 (Set-Content -Encoding utf8 .env ...)."
    )
    assert list(leaks(error, CANARY)) == []


def test_a_directory_called_env_is_no_file() -> None:
    Path(".env").mkdir()
    assert load_settings().database_url is None


@pytest.mark.skipif(sys.platform == "win32", reason="file modes of POSIX")
def test_a_file_that_may_not_be_read_is_named(tmp_path: Path) -> None:
    dotenv(f"DATABASE_URL=postgresql://u:{CANARY}@h/d\n")
    Path(".env").chmod(0)
    tmp_path.chmod(0o755)
    with not_root():
        error = failure_of_call(load_settings)
    assert isinstance(error, ConfigurationError)
    assert str(error) == "the .env file cannot be read: Permission denied. Let this user read it, or remove it."


# --- refusals ---------------------------------------------------------------------------------------------------------

LIMIT = 2_147_483  # the server counts milliseconds in 32 bits

BAD = [
    ("application_name", ""),
    ("application_name", "x" * 64),
    ("application_name", "größe"),
    ("application_name", "a\nb"),
    *((name, value) for name in ("pool_size",) for value in ("", "0", "-1", "1001", "five", "1.5", CANARY)),
    *((name, value) for name in ("max_overflow",) for value in ("", "-1", "1001", "1.5", CANARY)),
    *(
        (name, value)
        for name in (
            *("pool_timeout_seconds", "connect_timeout_seconds", "pool_ping_timeout_seconds"),
            "unit_deadline_seconds",
        )
        for value in ("", "0", "-1", "3601", "nan", "inf", "5s", CANARY)
    ),
    *(
        (name, value)
        for name in ("pool_recycle_seconds", "command_timeout_seconds", "migration_lock_timeout_seconds")
        for value in ("", "0", "-1", "nan", "1m", CANARY)
    ),
    *(
        (name, value)
        for name in ("statement_timeout_seconds", "lock_timeout_seconds", "idle_in_transaction_timeout_seconds")
        for value in ("", "-0.001", "nan", "inf", str(LIMIT + 1), CANARY)
    ),
    *(("read_retry_seconds", value) for value in ("", "-1", "nan", "3601", CANARY)),
    *(("pool_ping_after_seconds", value) for value in ("", "-1", "nan", CANARY)),
    *(("operation_retention_seconds", value) for value in ("", "3599", "nan", CANARY)),
    *(("encryption_cache_seconds", value) for value in ("", "0", "nan", "86401", CANARY)),
    *(("encryption_outage_seconds", value) for value in ("", "-1", "nan", "604801", CANARY)),
    *(("pooler", value) for value in ("", "session", CANARY)),
    *(("encryption_key_wrapper", value) for value in ("", "vault", CANARY)),
    *(("tenant_connections_allow", value) for value in ("everything", "sockets;files", '["sockets"]', CANARY)),
]

# Any text will do: what it leads to is looked at by who uses it.
FREE = {
    *("database_url", "direct_database_url", "encryption_keys", "encryption_key_file", "encryption_outer_key_file"),
    *("encryption_kms_key_id", "encryption_vault_key", "encryption_vault_mount"),
}


@pytest.mark.parametrize(("name", "value"), BAD)
def test_a_bad_value_is_refused_by_the_name_of_its_variable(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    variable = f"{PREFIX}{name.upper()}"
    monkeypatch.setenv(variable, value)
    error = failure_of_call(load_settings)
    assert isinstance(error, ConfigurationError)
    assert error.message.startswith(f"{variable}: ")
    assert error.details == {"settings": [variable]}
    assert error.hint == "Correct the environment or the .env file."
    assert list(leaks(error, CANARY)) == []


@pytest.mark.parametrize(("name", "value"), BAD)
def test_a_bad_argument_is_refused_alike(name: str, value: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(f"{PREFIX}{name.upper()}: ")):
        load_settings(**{name: value})


def test_every_setting_has_a_bad_value_above() -> None:
    assert {name for name, _ in BAD} == ControlPlaneSettings.model_fields.keys() - FREE


@pytest.mark.parametrize("name", ["statement_timeout_seconds", "lock_timeout_seconds"])
def test_the_longest_time_limit_is_the_servers(name: str) -> None:
    assert getattr(load_settings(**{name: LIMIT}), name) == LIMIT


@pytest.mark.parametrize("bad", [5, b"\xff" + CANARY.encode(), [CANARY], {"a": CANARY}])
def test_a_connection_string_that_is_no_text_is_refused(bad: object) -> None:
    with pytest.raises(ConfigurationError, match=r"^DATABASE_URL: ") as caught:
        load_settings(database_url=bad)
    assert CANARY not in str(caught.value)


def test_several_bad_values_are_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"{PREFIX}POOL_SIZE", "many")
    monkeypatch.setenv(f"{PREFIX}LOCK_TIMEOUT_SECONDS", "long")
    with pytest.raises(ConfigurationError) as caught:
        load_settings()
    assert caught.value.details == {"settings": [f"{PREFIX}POOL_SIZE", f"{PREFIX}LOCK_TIMEOUT_SECONDS"]}
    assert f"; {PREFIX}LOCK_TIMEOUT_SECONDS: " in caught.value.message


def test_a_good_password_stays_out_of_the_refusal_of_another_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", f"postgresql://u:{CANARY}@h/d")
    monkeypatch.setenv(f"{PREFIX}POOL_SIZE", "0")
    assert list(leaks(failure_of_call(load_settings), CANARY)) == []
    as_argument = failure_of_call(lambda: load_settings(database_url=f"postgresql://u:{CANARY}@h/d"))
    assert isinstance(as_argument, ConfigurationError)
    assert list(leaks(as_argument, CANARY)) == []


def test_the_same_refusal_by_pydantic_would_show_it() -> None:
    """The proof that `leaks` sees: what the settings class raises by itself."""
    error = failure_of_call(lambda: ControlPlaneSettings(pool_size=CANARY))
    assert isinstance(error, ValidationError)
    assert list(leaks(error, CANARY))


@pytest.mark.parametrize(
    ("unknown", "meant"),
    [("pool_siz", "pool_size"), ("Pool_Size", "pool_size"), ("statement_timeout", "statement_timeout_seconds")],
)
def test_an_unknown_setting_is_refused_with_the_nearest_name(unknown: str, meant: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        load_settings(**{unknown: 1})
    assert str(caught.value) == f"there is no setting {unknown!r}. Did you mean {meant!r}?"


def test_a_setting_like_no_other_is_refused_with_the_page() -> None:
    with pytest.raises(ConfigurationError) as caught:
        load_settings(qqqq=1)
    assert str(caught.value) == "there is no setting 'qqqq'. See docs/reference/settings.md."


# --- the connection string --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [None, "", " ", "\n"])
def test_without_a_connection_string_it_says_what_the_seed_guide_says(
    value: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if value is not None:
        monkeypatch.setenv("DATABASE_URL", value)
    settings = load_settings()
    with pytest.raises(ConfigurationError) as caught:
        settings.require_database_url()
    assert caught.value.message == "DATABASE_URL environment variable is required"
    for cure in ("export DATABASE_URL=", "$env:DATABASE_URL=", ".env", "DATABASE_URL=embedded:"):
        assert cure in caught.value.hint


def test_blanks_around_a_connection_string_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", " postgresql://h/d\n")
    assert url() == "postgresql://h/d"


def test_the_connection_string_is_in_no_print_or_dump() -> None:
    settings = load_settings(database_url=f"postgresql://u:{CANARY}@h/d")
    for text in (repr(settings), str(settings), repr(settings.model_dump()), settings.model_dump_json()):
        assert CANARY not in text
    assert CANARY in settings.require_database_url()


@pytest.mark.parametrize("value", [None, 5, SecretStr("x")])
def test_only_text_is_concealed(value: object) -> None:
    assert conceal(value) is value
    assert conceal("x") == SecretStr("x")


def test_settings_are_frozen() -> None:
    settings = load_settings()
    with pytest.raises(ValidationError):
        settings.pool_size = 6  # type: ignore[misc]  # on purpose
    assert settings.pool_size == 5


# --- strangers --------------------------------------------------------------------------------------------------------


def test_variables_that_look_like_ours_are_found_with_the_nearest_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"{PREFIX}POOL_SIZ", "9")
    monkeypatch.setenv(f"{PREFIX.lower()}pool_timeout", "9")
    monkeypatch.setenv(f"{PREFIX}POOL_SIZE", "9")
    monkeypatch.setenv(f"{PREFIX}DATABASE_URL", "postgresql://h/d")
    monkeypatch.setenv("POOL_SIZ", "9")
    assert unknown_environment() == {
        f"{PREFIX}POOL_SIZ": f"{PREFIX}POOL_SIZE",
        f"{PREFIX.lower()}pool_timeout": f"{PREFIX}POOL_TIMEOUT_SECONDS",
    }


def test_no_variable_of_ours_no_stranger() -> None:
    assert unknown_environment() == {}
