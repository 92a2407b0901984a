"""The validating SQLModel base, its registry, and the value types all models share.

A stock `SQLModel` table validates nothing when it is built and keeps a refused value when one is assigned. `Model` closes both holes: a table
built, assigned, passed to `model_validate`, `TypeAdapter` or FastAPI is validated first and reaches SQLAlchemy only when every value is good.
Rows loaded by the ORM are *not* validated again: the database is trusted, and loading stays as fast as SQLModel's.

A refusal names the field and the reason and never repeats the value: what does not fit may be a secret in the wrong place, and a value that is
not JSON (NaN, a lone surrogate) would turn the web framework's 422 into a 500.

The tables live on a registry of their own, so that a service which installs this library keeps its `SQLModel.metadata`, and its own class
named `Tenant`, to itself.

Sources: `docs/adr/0003-validating-models.md`; RFC 9562 section 5.7 (UUIDv7).
"""

import os
import time
import unicodedata
import uuid
from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import Annotated, Any, ClassVar, Self

import pydantic
import sqlalchemy
from pydantic import (
    MISSING,
    AfterValidator,
    AwareDatetime,
    BaseModel,
    ModelWrapValidatorHandler,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError
from sqlalchemy import (
    BigInteger,
    BindParameter,
    Column,
    ColumnClause,
    ColumnElement,
    CompoundSelect,
    Dialect,
    Enum,
    FetchedValue,
    Label,
    MetaData,
    Select,
    Table,
    TextClause,
    TypeDecorator,
    cast,
    event,
    func,
    type_coerce,
)
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import declared_attr, registry
from sqlalchemy.orm.attributes import get_history, instance_dict, set_attribute, set_committed_value
from sqlalchemy.sql import visitors
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.visitors import Visitable
from sqlalchemy.types import TypeEngine, UserDefinedType
from sqlmodel import Field, SQLModel
from sqlmodel._compat import finish_init  # private, guarded by a test: tells when an empty shell is being built

from car_control_plane.errors import SchemaOutdatedError

SCHEMA = "control_plane"
"""The PostgreSQL schema that holds every object of the control plane."""

REVISIONS = (
    "001_control_plane_schema",
    "002_seed_data",
    "003_sealed_connection_strings",
    "004_completed_operations",
)
"""The Alembic revisions this version of the library knows, oldest first; the last one is the head it needs."""

NAMING = {
    "ix": "idx_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
    "pk": "pk_%(table_name)s",
}

metadata = MetaData(schema=SCHEMA, naming_convention=NAMING)
"""The tables of the control plane, apart from the host application's `SQLModel.metadata`."""


def uuid7() -> uuid.UUID:
    """Make a UUID that sorts by the millisecond it was made in (RFC 9562, version 7).

    Time-ordered keys keep the primary-key index dense: inserting into a million rows is 1.6 times as fast as with random ones. Made here, not
    in the server, because PostgreSQL has a generator from version 18 only.
    """
    milliseconds, nanoseconds = divmod(time.time_ns(), 1_000_000)
    tail = int.from_bytes(os.urandom(8), "big") & (1 << 62) - 1
    return uuid.UUID(int=milliseconds << 80 | 7 << 76 | (nanoseconds << 12) // 1_000_000 << 64 | 2 << 62 | tail)


_BIDI_CONTROLS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def check_text(value: str) -> str:
    """Return the text in Unicode normal form C; refuse control characters.

    Raises:
        ValueError: The text holds a control character (NUL, a line break, a bidirectional override) or a lone surrogate. NUL and surrogates
            PostgreSQL cannot store; the others make two different names look alike in a log or a terminal.
        TypeError: It is no text.
    """
    if not isinstance(value, str):
        msg = "must be text"
        raise TypeError(msg)
    if value.isascii() and value.isprintable():  # most often, and forty times as fast
        return value
    for character in value:
        if unicodedata.category(character) in {"Cc", "Cs", "Zl", "Zp"} or character in _BIDI_CONTROLS:
            msg = f"must not contain control characters (found U+{ord(character):04X})"
            raise ValueError(msg)
    return unicodedata.normalize("NFC", value)


def check_name(value: str) -> str:
    """Return the name in Unicode normal form C; refuse control characters and blanks around it.

    Raises:
        ValueError: The name has blanks around it or control characters in it, is empty, or has more than 255 characters.
    """
    name = check_text(value)
    if name != name.strip():
        msg = "must not begin or end with blanks"
        raise ValueError(msg)
    if not 1 <= len(name) <= 255:  # noqa: PLR2004 -- VARCHAR(255) of the seed; counted after normalising, which may lengthen
        msg = "must have 1 to 255 characters"
        raise ValueError(msg)
    return name


Name = Annotated[str, pydantic.Field(min_length=1, max_length=255), AfterValidator(check_name)]
"""1 to 255 characters, as given and in Unicode NFC as stored; no control characters, no blanks around it. A VARCHAR(255) as a column."""

Text = Annotated[str, AfterValidator(check_text)]
"""Text without control characters, Unicode NFC."""


class _Label(UserDefinedType[Any]):
    """A label on its way to the server: `$1::TEXT::the_type`, which is text to the driver.

    Rendered as the parameter's own cast. Wrapped around the parameter, SQLAlchemy would break it where `IN` has no values.
    """

    cache_ok = True
    render_bind_cast = True

    def __init__(self, enum: Enum) -> None:
        self.enum = enum

    def get_col_spec(self, **_: Any) -> str:
        """Return what follows `$1::`."""
        return f"TEXT::{self.enum.schema}.{self.enum.name}"

    def bind_processor(self, dialect: Dialect) -> Any:
        return self.enum.bind_processor(dialect)  # type: ignore[no-untyped-call]  # SQLAlchemy leaves its types out here

    def literal_processor(self, dialect: Dialect) -> Any:
        return self.enum.literal_processor(dialect)  # type: ignore[no-untyped-call]  # as above


class _LabelOf(ColumnElement[Any]):
    """A column of an enum among those a statement returns."""

    inherit_cache = False  # made while a statement is compiled, never part of one

    def __init__(self, column: ColumnElement[Any], kind: TypeEngine[Any]) -> None:
        self.column = column
        self.type = kind


@compiles(_LabelOf)
def _compile_label_of(element: _LabelOf, compiler: SQLCompiler, **how: Any) -> str:
    """Read the column as text, unless what is returned decides the order of rows: labels sort as declared, text by the alphabet."""
    if _sorts_by_its_columns(compiler):
        return compiler.process(element.column, **how)
    return compiler.process(cast(element.column, sqlalchemy.Text()), **how)


def _sorts_by_its_columns(compiler: SQLCompiler) -> bool:
    if any(isinstance(entry.get("selectable"), CompoundSelect) for entry in compiler.stack):
        return True
    select = compiler.stack[-1].get("selectable")
    if not isinstance(select, Select):
        return False
    # Private, guarded by tests. SELECT DISTINCT sorts by nothing but what it returns.
    return select._distinct or any(map(_may_name_a_column, visitors.iterate(select._order_by_clause)))


def _may_name_a_column(element: Visitable) -> bool:
    """Tell whether a part of ORDER BY may mean a column of the result: a label, a name without a table, SQL as text."""
    if isinstance(element, ColumnClause):
        return element.table is None
    return isinstance(element, Label | TextClause) or element.__visit_name__ == "textual_label_reference"


class _Members(dict[str | None, StrEnum | None]):
    """The members of an enum by label."""

    def __init__(self, kind: "NativeEnum") -> None:
        self._kind = kind

    def __missing__(self, label: str | None) -> StrEnum:
        name = self._kind.name
        columns = [
            f"{table.name}.{column.name}"
            for table in metadata.tables.values()
            for column in table.columns
            if getattr(column.type, "name", None) == name
        ]
        column = " or ".join(columns) or f"of the type {name}"
        raise SchemaOutdatedError(
            f"the column {column} holds a label that this version of the library does not know",
            hint="The schema is newer than the code: upgrade the library.",
            details={"column": column},
        )


class NativeEnum(TypeDecorator[Any]):
    """A native PostgreSQL enum that holds the values of a `StrEnum`, and that the driver knows as text.

    Asyncpg does not know the types a database defines itself, and each new connection would ask the server about them before the first
    statement: four round trips. So they are read as `CAST(column AS text)` and sent as `$1::text::the_type`. Tables, filters,
    indexes and order are those of the enum.

    Source: `docs/adr/0021-enums-travel-as-text.md`.
    """

    impl = Enum
    cache_ok = True

    def __init__(self, kind: type[StrEnum], name: str) -> None:
        super().__init__(kind, name=name, schema=SCHEMA, metadata=metadata, values_callable=_values)
        self.kind = kind
        self.name = name

    @property
    def enum(self) -> Enum:
        """SQLAlchemy's own type: its labels, and its name in the database."""
        enum = self.impl_instance
        assert isinstance(enum, Enum)  # noqa: S101 -- what `impl` says
        return enum

    def bind_expression(self, bindparam: BindParameter[Any]) -> ColumnElement[Any]:
        """Send a label as text."""
        return type_coerce(bindparam, _Label(self.enum))

    def column_expression(self, column: ColumnElement[Any]) -> ColumnElement[Any]:
        """Read a label as text."""
        return _LabelOf(column, self)

    def result_processor(self, dialect: Dialect, coltype: Any) -> Any:
        """Return what finds the member of a label by one look-up, and refuses a label that is newer than the code."""
        members = _Members(self)
        members[None] = None
        members.update(zip(_values(self.kind), self.kind, strict=True))
        return members.__getitem__


def _values(kind: type[StrEnum]) -> list[str]:
    return [member.value for member in kind]


def enum_type(kind: type[StrEnum], name: str) -> NativeEnum:
    """Return the column type of a native PostgreSQL enum that stores values, not member names."""
    return NativeEnum(kind, name)


def native_enums(tables: Iterable[Table]) -> dict[str, Enum]:
    """Return the enum types the tables use, by name."""
    types = [column.type for table in tables for column in table.columns]
    enums = [kind.impl_instance if isinstance(kind, TypeDecorator) else kind for kind in types]
    return {str(enum.name): enum for enum in enums if isinstance(enum, Enum)}


_SERVER_FILLED = frozenset({"created_at", "updated_at", "version"})


def _is_table(cls: type[SQLModel]) -> bool:
    return cls.model_config.get("table") is True


class Model(SQLModel, registry=registry(metadata=metadata)):
    """A SQLModel whose tables validate like its schemas do.

    A refused value raises pydantic's `ValidationError`, which does not repeat it, and leaves no trace on the row. Unknown fields are refused.
    """

    __tablename__: ClassVar[str]  # pyright: ignore[reportIncompatibleVariableOverride]  # a string, as SQLAlchemy documents it
    # A literal: ConfigDict(...) fails both type checkers.
    model_config = {"extra": "forbid", "hide_input_in_errors": True}

    def __init__(self, /, **data: Any) -> None:
        if not _is_table(type(self)):
            super().__init__(**data)
        elif finish_init.get():  # False while SQLAlchemy or model_validate build an empty shell
            self._adopt(data)

    @classmethod
    def model_validate(cls, obj: Any, *, update: dict[str, Any] | None = None, **how: Any) -> Self:
        """Build an instance from a mapping or from another object's attributes; tables are validated like schemas.

        Args:
            obj: A mapping, or with `from_attributes` any object that has the fields.
            update: Values that win over those of `obj`.
            **how: pydantic's own options (`strict`, `from_attributes`, `context`).
        """
        if not _is_table(cls):
            return super().model_validate(obj, update=update, **how)
        obj = _values_of(obj, cls)
        if update and isinstance(obj, dict):
            obj = {**obj, **update}
        token = finish_init.set(False)
        try:
            row = cls()
        finally:
            finish_init.reset(token)
        row._adopt(obj, **how)
        return row

    @model_validator(mode="wrap")
    @classmethod
    def _without_input(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Validate; when refused, name the problems without the values.

        `hide_input_in_errors` alone cleans `str(error)`; `.errors()`, `.json()` and FastAPI's answer would still repeat them.

        Raises:
            ValidationError: As pydantic's own, with `input` None everywhere.
        """
        if _is_table(cls) and not isinstance(data, dict | cls):
            data = _values_of(data, cls)  # pydantic itself would fill a bare instance that SQLAlchemy has never seen
        try:
            return handler(data)
        except ValidationError as error:
            problems = error.errors(include_url=False, include_input=False)
        details = [InitErrorDetails(type=_kind_of(problem), loc=problem["loc"], input=None) for problem in problems]
        refusal = ValidationError.from_exception_data(cls.__name__, details, hide_input=True)
        raise refusal  # outside of the except block, so that the first error is no context of it

    def _adopt(self, obj: Any, **how: Any) -> None:
        """Validate, and only then let SQLAlchemy see the values."""
        shell = dict(self.__dict__)
        try:
            self.__pydantic_validator__.validate_python(obj, self_instance=self, **how)
            values = {key: value for key, value in self.__dict__.items() if key not in shell}
        finally:
            object.__setattr__(self, "__dict__", shell)
        for key, value in values.items():
            # None stands for "the server's default" in the columns the server fills; leaving them unset lets the INSERT say DEFAULT.
            if not (value is None and key in _SERVER_FILLED):
                set_attribute(self, key, value)

    def __setattr__(self, name: str, value: Any) -> None:
        if _is_table(type(self)) and name in type(self).model_fields:
            self._assign({name: value})
        else:
            super().__setattr__(name, value)

    def sqlmodel_update(self, obj: dict[str, Any] | BaseModel, *, update: dict[str, Any] | None = None) -> Self:
        """Change several fields at once: all of them, or none when one is refused.

        Args:
            obj: New values; of a PATCH schema, the fields that were sent.
            update: Values that win over those of `obj`.
        """
        if not _is_table(type(self)):
            return super().sqlmodel_update(obj, update=update)
        values = obj if isinstance(obj, dict) else {name: getattr(obj, name) for name in type(obj).model_fields}
        self._assign({name: value for name, value in {**values, **(update or {})}.items() if value is not MISSING})
        return self

    def _assign(self, values: Mapping[str, Any]) -> None:
        """Validate on a probe, and only then let SQLAlchemy see the values: a refused one must leave no trace on the tracked row."""
        cls = type(self)
        probe = cls.__new__(cls)
        state = {key: kept for key, kept in self.__dict__.items() if key != "_sa_instance_state"}
        object.__setattr__(probe, "__dict__", state)
        for name, value in values.items():
            cls.__pydantic_validator__.validate_assignment(probe, name, value)
        for name in values:
            set_attribute(self, name, probe.__dict__[name])
            self.__pydantic_fields_set__.add(name)

    def model_copy(self, **options: Any) -> Self:
        """Copy a schema. A table row is not copied: the stock method shares SQLAlchemy's state between both objects.

        Raises:
            TypeError: This is a table row; build a new one, or use its Public schema.
        """
        self._refuse_copy()
        return super().model_copy(**options)

    def __copy__(self) -> Self:
        self._refuse_copy()
        return super().__copy__()

    def _refuse_copy(self) -> None:
        if _is_table(type(self)):
            msg = "a table row cannot be copied: build a new one, or copy its Public schema"
            raise TypeError(msg)


def _kind_of(problem: ErrorDetails) -> PydanticCustomError:
    """Return the problem without `ctx["error"]`, an exception whose traceback holds the value."""
    context = {name: fact for name, fact in problem.get("ctx", {}).items() if name != "error"}
    kind, text = problem["type"], problem["msg"]
    return PydanticCustomError(kind, text, context or None)  # pyright: ignore[reportArgumentType]  # pydantic's own texts


def _values_of(obj: Any, table: type[Model]) -> Any:
    """Return the values an object has for a table; what has none comes back as it is, for pydantic to refuse."""
    if isinstance(obj, Mapping):
        return dict(obj)
    names = type(obj).model_fields if isinstance(obj, BaseModel) else table.model_fields
    values = {name: getattr(obj, name, MISSING) for name in names}
    absent = {name for name, value in values.items() if value is MISSING or (value is None and name in _SERVER_FILLED)}
    return {name: value for name, value in values.items() if name not in absent} or obj


@event.listens_for(Model, "load", propagate=True)
def _mark_loaded_fields(row: Model, _context: Any) -> None:
    """SQLModel leaves `model_fields_set` of a loaded row empty, and `model_dump(exclude_unset=True)` of it would be `{}`."""
    object.__setattr__(row, "__pydantic_fields_set__", set(type(row).model_fields))


class Stamps(Model):
    """When the row was made and when it last changed, both by the server's clock; a trigger keeps `updated_at`."""

    created_at: AwareDatetime = Field(default=None, sa_column_kwargs={"server_default": func.now()})
    updated_at: AwareDatetime = Field(
        default=None, sa_column_kwargs={"server_default": func.now(), "server_onupdate": FetchedValue()}
    )


class Versioned(Model):
    """The number of the row's last change, given by a trigger; the optimistic lock of every write."""

    version: int = Field(
        default=None,
        sa_type=BigInteger,
        sa_column_kwargs={"server_default": FetchedValue(), "server_onupdate": FetchedValue()},
    )

    @declared_attr.directive
    def __mapper_args__(cls) -> dict[str, Any]:  # noqa: N805 -- SQLAlchemy hands the class
        """Bring what triggers wrote back in the same round trip, and refuse a write to a row that has moved on."""
        version: Column[int] = cls.__table__.c.version  # type: ignore[attr-defined]  # every subclass is a table
        return {"eager_defaults": True, "version_id_col": version, "version_id_generator": False}


@event.listens_for(Versioned, "before_insert", propagate=True)
def _leave_version_to_the_server(_mapper: Any, _connection: Any, row: Versioned) -> None:
    """A trigger overwrites the version a client sends: send none, and RETURNING brings the true one."""
    instance_dict(row).pop("version", None)


@event.listens_for(Versioned, "before_update", propagate=True)
def _leave_stamps_to_the_server(_mapper: Any, _connection: Any, row: Versioned) -> None:
    """The same for an update, which must also compare with the version that was read, not with one assigned since."""
    for name in ("version", "updated_at"):
        if was := get_history(row, name).deleted:
            set_committed_value(row, name, was[0])
