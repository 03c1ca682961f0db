"""Hold the ``args`` table of a class against its constructor, before it is called."""

from __future__ import annotations

import collections.abc
import inspect
import sys
import typing
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, create_model

from holdfast.training.configuration.loading import validated

VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
NOT_CONFIGURED = {"last_epoch"}  # what the state of a checkpoint says


def check_arguments(key: str, factory: type, args: Mapping[str, Any]) -> None:
    """Names and types are the constructor's own; its first argument is not configured.

    Args:
        key: of the table in the configuration.
        factory: a class; arguments that its constructor does not annotate may be anything.
        args: the table.

    Raises:
        ConfigError: an argument is unknown, missing, or of another type.
    """
    validated(_model_of(factory), args, prefix=f"{key}.")


def _model_of(factory: type) -> type[BaseModel]:
    _, *parameters = inspect.signature(factory).parameters.values()
    takes_others = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    fields: dict[str, Any] = {
        parameter.name: (
            _hint(factory, parameter.annotation),
            Field(... if parameter.default is parameter.empty else parameter.default),
        )
        for parameter in parameters
        if parameter.name not in NOT_CONFIGURED and parameter.kind not in VARIADIC
    }
    extra: Literal["allow", "forbid"] = "allow" if takes_others else "forbid"
    settings = ConfigDict(strict=True, extra=extra, arbitrary_types_allowed=True)
    return create_model(factory.__name__, __config__=settings, **fields)


def _hint(factory: type, annotation: Any) -> Any:
    """The type of an argument; anything, where there is none or its text cannot be read."""
    if annotation is inspect.Parameter.empty:
        return Any
    if not isinstance(annotation, str):
        return annotation
    module = vars(sys.modules[factory.__module__])
    try:
        return eval(annotation, {**vars(typing), **vars(collections.abc), **module})
    except (NameError, AttributeError, TypeError):
        return Any
