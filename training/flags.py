"""Command-line options made from settings: every field is a flag, and `--config` names a YAML file of them.

Knows pydantic models and typer; no particular setting.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from pydantic.fields import FieldInfo

from ..errors import SteerError
from .settings import Settings, read_settings

_CONFIG = Annotated[Path | None, typer.Option("--config", help="YAML file of settings; flags come before it")]


def with_settings(kind: type[Settings]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command whose parameter `settings` is a `kind` the options `--config` and one for each field.

    The command itself sees the settings that come of it. Errors of ours end it with one line and exit code 2.
    """

    def wrap(command: Callable[..., None]) -> Callable[..., None]:
        own = [
            parameter
            for parameter in inspect.signature(command, eval_str=True).parameters.values()
            if parameter.name != "settings"
        ]
        fields = [
            _option(name, field)
            for name, field in kind.model_fields.items()
            if name not in {parameter.name for parameter in own}
        ]
        config = inspect.Parameter("config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_CONFIG)

        def run(config: Path | None = None, **given: Any) -> None:
            flags = {name: given.pop(name) for name in list(given) if name in kind.model_fields}
            chosen = {name: value for name, value in flags.items() if value is not None}
            with_one_line(lambda: command(**given, settings=read_settings(kind, config, chosen)))

        return _named(run, command, [*own, config, *fields])

    return wrap


def plain(command: Callable[..., None]) -> Callable[..., None]:
    """A command without settings; errors end as in `with_settings`."""

    def run(**given: Any) -> None:
        with_one_line(lambda: command(**given))

    return _named(run, command, list(inspect.signature(command, eval_str=True).parameters.values()))


def with_one_line(work: Callable[[], None]) -> None:
    """Errors made on purpose become one line on stderr and exit code 2; bugs keep their traceback."""
    try:
        work()
    except SteerError as error:
        typer.echo(f"error: {error.message}", err=True)
        raise typer.Exit(2) from error


def _named(
    run: Callable[..., None], command: Callable[..., None], parameters: list[inspect.Parameter]
) -> Callable[..., None]:
    """`run` under the command's name and help, with these parameters."""
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    keywords = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
    run.__signature__ = inspect.Signature(keywords)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in keywords}
    return run


def _option(name: str, field: FieldInfo) -> inspect.Parameter:
    kinds = {kind for kind in (field.annotation, *get_args(field.annotation)) if isinstance(kind, type)}
    plain_kind = next((kind for kind in (bool, int, float) if kind in kinds), str)
    default = "" if field.default is None else f" (default {field.default!r})"
    option = typer.Option(
        f"--{name.replace('_', '-')}",
        help=f"{field.description}{default}",
        show_default=False,
        rich_help_panel="Settings",
    )
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[plain_kind | None, option]
    )
