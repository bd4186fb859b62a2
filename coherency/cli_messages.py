"""What all commands have in common: how errors become messages and exit codes, and the option ``--json``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import click

from coherency.errors import CoherencyError, UsageError

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")


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
