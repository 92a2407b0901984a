"""The two forms of a connection string: the opened one stays where it is, the sealed one is all that goes anywhere."""

import copy
import dataclasses
import json
import logging
import pickle
import pprint
import subprocess
import sys
import traceback
from typing import Any, Never

import pytest
from fastapi import FastAPI
from fastapi.encoders import jsonable_encoder
from pydantic import BaseModel, ConfigDict, SecretStr, TypeAdapter, ValidationError, create_model

from car_control_plane import encryption
from car_control_plane.encryption import ConnectionString, SealedConnectionString
from car_control_plane.encryption.values import is_kid
from car_control_plane.errors import ConfigurationError, DecryptionError
from tests.fixtures.leaks import failure_of_call, leaks, shows
from tests.quality.programs import ROOT

CANARY = "c4naryc4nary"
TEXT = f"postgresql://app:{CANARY}@db.example.com:5432/tenant_0001?sslmode=verify-full"
SEALED = "ccp1:2026-11:" + "Ab-_" * 60


class Loose(BaseModel):
    anything: Any


@dataclasses.dataclass
class Holder:
    secret: object


# --- opened -----------------------------------------------------------------------------------------------------------------


def test_an_opened_connection_string_is_revealed_on_request_only() -> None:
    opened = ConnectionString(TEXT)
    assert opened.reveal() == TEXT
    assert opened.dsn.password == CANARY
    assert opened.dsn.hosts[0].name == "db.example.com"
    assert (repr(opened), str(opened)) == ("ConnectionString('***')", "***")


@pytest.mark.parametrize("spec", ["", "s", ">10", "*^9", "_<5", ".1"])
def test_it_is_formatted_masked(spec: str) -> None:
    assert format(ConnectionString(TEXT), spec) == format("***", spec)


def test_a_spec_that_text_does_not_take_is_refused_masked() -> None:
    error = failure_of_call(lambda: format(ConnectionString(TEXT), "d"))
    assert isinstance(error, ValueError)
    assert list(leaks(error, CANARY)) == []


def test_no_way_of_writing_it_shows_it() -> None:
    opened = ConnectionString(TEXT)
    for thing in (opened, [opened], {"x": (opened,)}, Holder(opened), Loose(anything=opened), opened.dsn):
        assert list(shows(thing, CANARY)) == []
    assert CANARY not in f"{opened} {opened!r} {opened!s} {opened:>99}" + "%s %r" % (opened, opened)  # noqa: UP031 -- as logging does
    assert CANARY not in pprint.pformat([opened])


def test_what_is_looked_for_would_be_found() -> None:
    assert list(shows(TEXT, CANARY))
    assert list(shows(Holder(TEXT), CANARY))
    assert list(shows(Loose(anything=TEXT), CANARY))


def test_it_is_neither_copied_nor_written_out() -> None:
    opened = ConnectionString(TEXT)
    refusals: list[Any] = [
        *(lambda protocol=protocol: pickle.dumps(opened, protocol) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)),
        lambda: copy.copy(opened),
        lambda: copy.deepcopy(opened),
        lambda: copy.deepcopy({"x": [opened]}),
        lambda: pickle.dumps({"x": [opened]}),
        lambda: json.dumps(opened),
        lambda: json.dumps({"x": opened}),
        lambda: vars(opened),
        lambda: dict(opened),  # type: ignore[call-overload]  # what is refused
        lambda: dataclasses.asdict(Holder(opened)),
        opened.__getstate__,
        opened.__reduce__,
    ]
    for refused in refusals:
        error = failure_of_call(refused)
        assert isinstance(error, TypeError)
        assert list(leaks(error, CANARY)) == []


def test_it_is_no_field_of_a_model() -> None:
    for config in (ConfigDict(), ConfigDict(arbitrary_types_allowed=True)):
        with pytest.raises(TypeError, match="SecretStr"):
            create_model("Model", secret=(ConnectionString, ...), __config__=config)
        with pytest.raises(TypeError, match="SecretStr"):
            create_model("Model", secrets=(dict[str, list[ConnectionString | None]], ...), __config__=config)
    with pytest.raises(TypeError, match="SecretStr"):
        TypeAdapter(ConnectionString)


def test_a_model_that_takes_anything_keeps_it_masked() -> None:
    model = Loose(anything=ConnectionString(TEXT))
    assert CANARY not in f"{model!r} {model.model_dump()!r}"
    error = failure_of_call(model.model_dump_json)
    assert "serialize" in str(error)
    assert list(leaks(error, CANARY)) == []
    with pytest.raises(TypeError):
        model.model_copy(deep=True)


def test_a_validation_error_about_it_is_masked() -> None:
    class Strict(BaseModel):
        number: int

    error = failure_of_call(lambda: Strict.model_validate({"number": ConnectionString(TEXT)}))
    assert isinstance(error, ValidationError)
    assert CANARY not in f"{error} {error.errors()!r}"
    # SecretStr does not take it either: its text has to be revealed for that.
    with pytest.raises(ValidationError):
        TypeAdapter(SecretStr).validate_python(ConnectionString(TEXT))


def test_fastapi_neither_sends_nor_takes_it() -> None:
    app = FastAPI()

    def route() -> Never:
        raise AssertionError

    with pytest.raises(TypeError, match="SecretStr"):
        app.get("/", response_model=ConnectionString)(route)
    route.__annotations__["return"] = ConnectionString
    with pytest.raises(TypeError, match="SecretStr"):
        app.get("/")(route)
    with pytest.raises(ValueError, match="vars") as refused:
        jsonable_encoder(ConnectionString(TEXT))
    assert list(leaks(refused.value, CANARY)) == []


def test_a_log_has_it_masked(caplog: pytest.LogCaptureFixture) -> None:
    log = logging.getLogger("tests")
    opened = ConnectionString(TEXT)

    def fail() -> Never:
        raise ValueError(opened)

    log.error("%s %r %s", opened, opened, {"dsn": opened}, extra={"dsn": opened})
    try:
        fail()
    except ValueError as error:
        log.exception("with %s", opened, stack_info=True)
        trace = "".join(traceback.TracebackException.from_exception(error, capture_locals=True).format())
    assert "*** ConnectionString('***')" in caplog.text
    assert "ValueError: ***" in caplog.text
    assert "opened = ConnectionString('***')" in trace
    assert CANARY not in caplog.text + trace + repr([vars(record) for record in caplog.records])


def test_it_is_equal_and_hashed_by_its_text_and_cannot_be_changed() -> None:
    opened = ConnectionString(TEXT)
    assert opened == ConnectionString(TEXT) != ConnectionString(TEXT + "x")
    assert hash(opened) == hash(ConnectionString(TEXT))
    assert opened != TEXT
    for name in ("_text", "text"):
        with pytest.raises(AttributeError):
            setattr(opened, name, lambda: "other")


def test_what_is_no_connection_string_is_not_shown_when_taken_apart() -> None:
    error = failure_of_call(lambda: ConnectionString(f"{CANARY}@@").dsn)
    assert isinstance(error, ConfigurationError)
    assert list(leaks(error, CANARY)) == []


# --- sealed -----------------------------------------------------------------------------------------------------------------


def test_a_sealed_one_is_its_text_and_its_key_id() -> None:
    sealed = SealedConnectionString.parse(SEALED)
    assert (sealed.text, sealed.kid) == (SEALED, "2026-11")
    assert repr(sealed) == str(sealed) == "<SealedConnectionString key 2026-11>"


DAMAGED = (
    "",
    TEXT,
    CANARY,
    "ccp1",
    "ccp1:",
    "ccp1:k",
    "ccp1:k:",
    "ccp1::Ab",
    "ccp2:k:Ab",
    "ccp1:K:Ab",
    f"ccp1:{'k' * 33}:Ab",
    "ccp1:k:Ab=",
    "ccp1:k:A+b/",
    "ccp1:k:Ab\n",
    " ccp1:k:Ab",
    "ccp1:k:Ab:cd",
    "ccp1:k:\u0661",
    f"ccp1:k:{CANARY}!",
)


@pytest.mark.parametrize("text", DAMAGED)
def test_a_damaged_one_is_loaded_but_neither_shown_nor_parsed(text: str) -> None:
    damaged = SealedConnectionString(text)
    assert (damaged.kid, damaged.text) == (None, text)
    assert repr(damaged) == "<SealedConnectionString damaged>"
    assert list(shows(damaged, CANARY)) == []
    error = failure_of_call(lambda: SealedConnectionString.parse(text))
    assert isinstance(error, DecryptionError)
    assert list(leaks(error, CANARY)) == []


def test_a_sealed_one_is_copied_and_pickled() -> None:
    sealed = SealedConnectionString(SEALED)
    assert copy.copy(sealed) is sealed
    assert copy.deepcopy([sealed])[0] is sealed
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert pickle.loads(pickle.dumps(sealed, protocol)) == sealed


def test_a_damaged_one_is_pickled_without_its_text() -> None:
    damaged = SealedConnectionString(TEXT)
    assert copy.deepcopy(damaged) == damaged
    assert pickle.loads(pickle.dumps(damaged)) == SealedConnectionString("")


def test_a_sealed_one_is_equal_and_hashed_by_its_text_and_cannot_be_changed() -> None:
    sealed = SealedConnectionString(SEALED)
    assert sealed == SealedConnectionString(SEALED) != SealedConnectionString(SEALED + "A")
    assert hash(sealed) == hash(SealedConnectionString(SEALED))
    assert sealed != SEALED
    for name in ("_text", "text", "kid"):
        with pytest.raises(AttributeError):
            setattr(sealed, name, "other")


def test_a_model_takes_a_sealed_one_and_no_text() -> None:
    model = create_model("Model", sealed=(SealedConnectionString, ...), __config__={"hide_input_in_errors": True})
    sealed = SealedConnectionString(SEALED)
    assert model(sealed=sealed).model_dump() == {"sealed": sealed}
    for text in (TEXT, SEALED, TEXT.encode(), None, ConnectionString(TEXT), SecretStr(TEXT)):
        with pytest.raises(ValidationError) as refused:
            model(sealed=text)
        assert CANARY not in str(refused.value)


# --- names and imports ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "is_one"),
    [("a", True), ("2026-11", True), ("-" * 32, True), ("", False), ("a" * 33, False), ("A", False), ("a\n", False), (None, False), (b"a", False)],
)  # fmt: skip
def test_names_of_keys(text: object, is_one: bool) -> None:
    assert is_kid(text) is is_one


def loaded_after(code: str) -> set[str]:
    program = f"import sys; {code}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


HEAVY = {"cryptography", "boto3", "botocore", "hvac", "requests", "sqlalchemy", "sqlmodel", "asyncpg"}


def test_importing_the_package_and_both_forms_costs_no_cryptography() -> None:
    loaded = loaded_after(
        "import car_control_plane.encryption as e; e.SealedConnectionString('x').kid; e.ConnectionString('x')"
    )
    assert "car_control_plane.encryption.values" in loaded
    assert loaded & HEAVY == set()


def test_using_the_keyring_costs_no_outer_service() -> None:
    loaded = loaded_after("from car_control_plane.encryption import Keyring, StaticKeys, WrappedKeys")
    assert "cryptography" in loaded
    assert loaded & (HEAVY - {"cryptography"}) == set()


def test_every_name_of_the_package_is_there_and_no_other() -> None:
    for name in encryption.__all__:
        assert getattr(encryption, name).__name__ == name
    with pytest.raises(AttributeError, match="Nonsense"):
        _ = encryption.Nonsense  # type: ignore[attr-defined]  # what is refused
