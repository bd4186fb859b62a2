"""What all commands have in common: how errors become messages and exit codes, and the options that many have."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NoReturn

import click

from coherency.errors import CoherencyError, UsageError
from coherency.rendezvous import DEFAULT_RUNTIME_ROOT, RUNTIME_ROOT_VARIABLE

_MAX_SECONDS: Final = 10**9

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
runtime_dir_option = click.option(
    "--runtime-dir",
    type=click.Path(path_type=Path, file_okay=False),
    default=DEFAULT_RUNTIME_ROOT,
    envvar=RUNTIME_ROOT_VARIABLE,
    show_default=True,
    show_envvar=True,
    help="The parent of the daemons' directories.",
)


@contextmanager
def errors_as_messages() -> Iterator[None]:
    """One line on standard error instead of a traceback; exits with 2 for impossible options, 1 for all else."""
    try:
        yield
    except UsageError as error:
        fail(str(error), 2)
    except CoherencyError as error:
        fail(str(error), 1)
    except OSError as error:
        fail(f"{error.filename or 'system'}: {error.strerror}", 1)


def fail(message: str, code: int) -> NoReturn:
    click.echo(f"coherency: {message}", err=True)
    sys.exit(code)


def finite_seconds(_context: click.Context, _parameter: click.Parameter, value: float | None) -> float | None:
    """A callback for options: a time that ends."""
    if value is not None and not 0 <= value <= _MAX_SECONDS:  # which is also true of what is not a number
        raise click.BadParameter(f"{value} is not in the range 0 to {_MAX_SECONDS}")
    return value
