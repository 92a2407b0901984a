"""System configuration: named JSON values."""

import json
import math
import re
from datetime import datetime
from typing import Annotated, Any, ClassVar

from pydantic import AwareDatetime, JsonValue, ValidationError, ValidatorFunctionWrapHandler, WrapValidator
from sqlalchemy import FetchedValue, func
from sqlalchemy.dialects.postgresql import JSONB
from sqlmodel import Field

from car_control_plane.models.base import Model, Name, Versioned

MAX_VALUE_BYTES = 1024 * 1024
"""The largest configuration value, as compact UTF-8 JSON."""

MAX_VALUE_DEPTH = 200
"""The deepest nesting of lists and objects in a configuration value; pydantic's serialiser stops at 255."""

MAX_INTEGER_DIGITS = 4300
"""The longest integer in a configuration value: Python reads no longer one back from text (`sys.set_int_max_str_digits`)."""


def check_json(value: JsonValue) -> JsonValue:
    """Return the value when PostgreSQL can store it as JSONB and Python can read it back.

    Any JSON value passes: null, integers of up to 4300 digits, nesting up to 200 levels. A number comes back with the value it has in decimal:
    `1e+23` as the integer 10**23.

    Raises:
        ValueError: It holds NaN or an infinity (not JSON), a NUL character or a lone surrogate (not storable), an integer of more than 4300
            digits, is nested more than 200 levels deep, or is larger than 1 MiB as JSON.
    """
    level: list[Any] = [value]
    nodes = depth = 0
    while level:
        nodes += len(level)
        depth += any(isinstance(item, dict | list) for item in level)
        if depth > MAX_VALUE_DEPTH:
            raise ValueError(_TOO_DEEP)
        if nodes > MAX_VALUE_BYTES:  # every node takes a byte at least: no need to walk on
            msg = "must not be larger than 1 MiB as JSON"
            raise ValueError(msg)
        level = [part for item in level for part in _parts(item)]
    size = len(json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode())
    if size > MAX_VALUE_BYTES:
        msg = f"must not be larger than 1 MiB as JSON (it has {size} bytes)"
        raise ValueError(msg)
    return value


_TOO_DEEP = f"must not be nested more than {MAX_VALUE_DEPTH} levels deep"
_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")
_INTEGER_LIMIT = 10**MAX_INTEGER_DIGITS


def _parts(item: Any) -> list[Any]:
    """Check one node of the tree and return the nodes below it."""
    if isinstance(item, dict):
        return [*item, *item.values()]
    if isinstance(item, list):
        return item
    if isinstance(item, float) and not math.isfinite(item):
        msg = "must not contain NaN or infinity: they are not JSON"
        raise ValueError(msg)
    if isinstance(item, int) and abs(item) >= _INTEGER_LIMIT:
        msg = f"must not contain integers of more than {MAX_INTEGER_DIGITS} digits"
        raise ValueError(msg)
    if isinstance(item, str) and _UNSTORABLE.search(item):
        msg = "must not contain NUL characters or lone surrogates: PostgreSQL cannot store them"
        raise ValueError(msg)
    return []


def _validate_json(value: Any, handler: ValidatorFunctionWrapHandler) -> JsonValue:
    """Let pydantic say whether this is JSON at all, and `check_json` whether it can be stored."""
    try:
        known: JsonValue = handler(value)
    except ValidationError as error:
        # Pydantic names the whole path to what is too deep, hundreds of keys long.
        if not any(problem["type"].startswith("recursion") for problem in error.errors(include_input=False)):
            raise
    else:
        return check_json(known)
    raise ValueError(_TOO_DEEP)


Json = Annotated[JsonValue, WrapValidator(_validate_json)]
"""Any JSON value PostgreSQL can store, up to 1 MiB and 200 levels deep."""


class SystemConfigBase(Model):
    """The seed's columns, in the seed's order."""

    key: Name = Field(primary_key=True)
    value: Json = Field(sa_type=JSONB, nullable=False)
    updated_at: AwareDatetime = Field(
        default=None, sa_column_kwargs={"server_default": func.now(), "server_onupdate": FetchedValue()}
    )


class SystemConfig(Versioned, SystemConfigBase, table=True):
    """A configuration value; a row of `control_plane.system_config`.

    Changing a list or dictionary *inside* `value` is not noticed by SQLAlchemy: assign a new value.
    """

    __tablename__: ClassVar[str] = "system_config"


class SystemConfigCreate(Model):
    """A key and its value."""

    key: Name
    value: Json


class SystemConfigUpdate(Model):
    """A new value; `null` is a value like any other."""

    value: Json


class SystemConfigPublic(Model):
    """A configuration value as an API shows it."""

    model_config = {"extra": "ignore", "from_attributes": True}  # noqa: RUF012 -- forbid would break clients when a field is added

    key: str
    value: JsonValue
    updated_at: datetime
    version: int
