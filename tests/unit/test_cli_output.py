"""The forms of output, and the table of exit codes."""

import json
import uuid
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given, strategies as st

from car_control_plane import errors
from car_control_plane.cli.output import FIRST_ROWS, Column, Format, Json, Output, as_json, visible
from car_control_plane.cli.program import EXIT_CODES, exit_code
from car_control_plane.errors import ControlPlaneError, FleetMigrationError

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda parts: st.lists(parts, max_size=4) | st.dictionaries(st.text(), parts, max_size=4),
)
NAMES = (Column("name"), Column("note", optional=True, widest=10), Column("size", optional=True))


def printed(capsys: pytest.CaptureFixture[str], records: Iterable[Mapping[str, Any]], form: Format) -> list[str]:
    with Output(form).rows(NAMES, nothing="Nothing.") as rows:
        for record in records:
            rows.add(record)
    return capsys.readouterr().out.splitlines()


# --- texts ------------------------------------------------------------------------------------------------------------


@given(st.text())
def test_what_is_visible_is_one_line_that_steers_nothing(text: str) -> None:
    shown = visible(text)
    assert len(shown.splitlines()) <= 1
    assert not any(character < " " or "\x7f" <= character <= "\x9f" for character in shown)
    assert not set(shown) & set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def test_other_scripts_and_emoji_stay_as_they_are() -> None:
    text = "Größe 京都 ‍ 👩‍🚀 עברית"  # a zero-width joiner makes one astronaut of two signs
    assert visible(text) == text


@given(JSON_VALUES)
def test_json_is_one_visible_line_that_reads_back(value: Any) -> None:
    line = as_json(value)
    assert json.loads(line) == value
    assert visible(line) == line


def test_json_of_what_a_record_holds() -> None:
    key = uuid.UUID(int=7)
    at = datetime(2026, 1, 2, 4, 4, 5, 60, tzinfo=timezone(timedelta(hours=1)))
    assert as_json({"id": key, "at": at, "value": Json([None])}) == (
        '{"id":"00000000-0000-0000-0000-000000000007","at":"2026-01-02T03:04:05.000060Z","value":[null]}'
    )
    with pytest.raises(TypeError, match="object has no JSON form here"):
        as_json(object())


# --- rows -------------------------------------------------------------------------------------------------------------


def test_a_table_aligns_by_cells_and_leaves_out_empty_columns(capsys: pytest.CaptureFixture[str]) -> None:
    records = [{"name": "京", "note": None, "size": 1}, {"name": "abc", "note": None, "size": 22}]
    assert printed(capsys, records, Format.TABLE) == ["NAME  SIZE", "京    1", "abc   22"]


def test_only_columns_that_may_be_cut_are_cut(capsys: pytest.CaptureFixture[str]) -> None:
    records = [{"name": "n" * 60, "note": "0123456789", "size": 1}, {"name": "n", "note": "0123456789A", "size": 2}]
    assert printed(capsys, records, Format.TABLE) == [
        f"NAME{' ' * 44}  NOTE        SIZE",
        f"{'n' * 60}  0123456789  1",
        f"n{' ' * 47}  012345678…  2",
    ]


@pytest.mark.parametrize(
    ("columns", "head"), [(100, "NAME  NOTE  SIZE"), (16, "NAME  NOTE  SIZE"), (15, "NAME  NOTE"), (1, "NAME")]
)
def test_a_table_leaves_out_what_does_not_fit(
    columns: int, head: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert printed(capsys, [{"name": "abcd", "note": "abcd", "size": "abcd"}], Format.TABLE)[0] == head


def test_a_long_table_is_printed_as_it_comes(capsys: pytest.CaptureFixture[str]) -> None:
    with Output(Format.TABLE).rows(NAMES, nothing="") as rows:
        for number in range(FIRST_ROWS - 1):
            rows.add({"name": number, "note": None, "size": number})
        assert capsys.readouterr().out == ""  # the widths are not settled yet
        rows.add({"name": 1, "note": None, "size": 1})
        assert len(capsys.readouterr().out.splitlines()) == FIRST_ROWS + 1
        rows.add({"name": "longer than all before", "note": "late", "size": 5})
        assert capsys.readouterr().out == "longer than all before  5\n"


def test_a_failure_prints_no_half_table(capsys: pytest.CaptureFixture[str]) -> None:
    def failing() -> Iterator[dict[str, Any]]:
        yield {"name": "a", "note": None, "size": 1}
        raise ControlPlaneError

    with pytest.raises(ControlPlaneError):
        printed(capsys, failing(), Format.TABLE)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("form", [Format.TABLE, Format.JSON, Format.TSV])
def test_that_there_is_nothing_is_said_on_standard_error(form: Format, capsys: pytest.CaptureFixture[str]) -> None:
    with Output(form).rows(NAMES, nothing="Nothing."):
        pass
    assert capsys.readouterr() == ("", "Nothing.\n")


def test_tab_separated_values_hold_no_other_tab_or_line_end(capsys: pytest.CaptureFixture[str]) -> None:
    records: list[dict[str, Any]] = [
        {"name": "a\tb\\t\n\r", "note": None, "size": {"x": "\t"}},
        {"name": "\x1b", "note": datetime(2026, 1, 2, tzinfo=UTC), "size": Json("text")},
    ]
    assert printed(capsys, records, Format.TSV) == [
        "name\tnote\tsize",
        'a\\tb\\\\t\\n\\r\t\t{"x":"\\\\t"}',
        '\\u001b\t2026-01-02T00:00:00Z\t"text"',
    ]


def test_a_record_is_a_line_for_each_field_that_has_a_value(capsys: pytest.CaptureFixture[str]) -> None:
    at = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    record = {"name": "a", "labels": {"x": "1", "y": "2"}, "more": {}, "on": True, "at": at, "none": None}
    Output(Format.TABLE).record(record)
    assert capsys.readouterr().out == ("name    a\nlabels  x=1 y=2\non      yes\nat      2026-01-02 03:04:05Z\n")


def test_a_value_is_indented_for_a_person_only(capsys: pytest.CaptureFixture[str]) -> None:
    Output(Format.TABLE).value({"a": ["ü", "\x9b"]})
    Output(Format.AUTO).value({"a": ["ü", "\x9b"]})
    assert capsys.readouterr().out == ('{\n  "a": [\n    "ü",\n    "\\u009b"\n  ]\n}\n{"a":["ü","\\u009b"]}\n')


def test_errors_are_never_wrapped(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Who pastes the GRANT of a hint gets all of it, and `[x]` is text."""
    monkeypatch.setenv("COLUMNS", "20")
    Output.error("no [bold]rights[/bold]\x1b", f"GRANT {'x' * 100} TO y;")
    assert capsys.readouterr().err == f"Error: no [bold]rights[/bold]\\u001b\nHint: GRANT {'x' * 100} TO y;\n"


# --- exit codes -------------------------------------------------------------------------------------------------------

PROMISED = {
    "ControlPlaneError": 1,
    "ConfigurationError": 3,
    "DirectConnectionRequiredError": 3,
    "MissingExtraError": 3,
    "ConnectionUnavailableError": 4,
    "PoolTimeoutError": 4,
    "StatementTimeoutError": 1,
    "OutcomeUnknownError": 1,
    "ClosedError": 1,
    "WrongEventLoopError": 1,
    "SchemaError": 5,
    "SchemaMissingError": 5,
    "SchemaOutdatedError": 5,
    "PermissionDeniedError": 6,
    "NotFoundError": 7,
    "TenantNotFoundError": 7,
    "TenantDatabaseNotFoundError": 7,
    "ConfigKeyNotFoundError": 7,
    "ConflictError": 8,
    "AlreadyExistsError": 8,
    "StillReferencedError": 8,
    "StaleWriteError": 8,
    "ProtectedError": 8,
    "InvalidDataError": 2,
    "InvalidTransitionError": 8,
    "AccessDeniedError": 6,
    "TenantUnavailableError": 6,
    "EncryptionError": 1,
    "KeyUnavailableError": 4,
    "UnknownKeyError": 1,
    "DecryptionError": 1,
    "ProvisioningError": 1,
    "MigrationError": 1,
    "FleetMigrationError": 1,
    "ChangeFeedError": 1,
}


def test_every_error_has_the_exit_code_that_was_promised() -> None:
    classes = [getattr(errors, name) for name in errors.__all__ if name.endswith("Error")]
    assert {cls.__name__: exit_code(cls) for cls in classes} == PROMISED


def test_a_class_that_is_not_in_the_table_has_the_code_of_the_nearest_above() -> None:
    assert FleetMigrationError not in EXIT_CODES
    assert exit_code(FleetMigrationError) == EXIT_CODES[ControlPlaneError]
