"""Virtual machines on the command line: what QEMU must be told, how the agent inside finds the daemon; and ``evict``."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Final

import click

from coherency.cli_messages import errors_as_messages, json_option, runtime_dir_option
from coherency.daemon.service import forget
from coherency.guest_agent.requests import fetch_status
from coherency.rendezvous import VIRTIO_PORT_NAME
from coherency.vm_args import (
    DEFAULT_MEMORY,
    FORMATS,
    OLDEST_QEMU,
    VirtualMachineOptions,
    libvirt_text,
    qemu_text,
    qemu_version,
)

_VIRTIOFSDS: Final = ("/usr/libexec/virtiofsd", "/usr/lib/qemu/virtiofsd")
"""Where distributions have it; the first one that is there, or the first."""


def _installed_virtiofsd() -> str:
    return next((each for each in _VIRTIOFSDS if Path(each).exists()), _VIRTIOFSDS[0])


_QEMU: Final = "qemu-system-x86_64"
_QEMU_ANSWERS_S: Final = 10


def _version_of(qemu: str) -> tuple[int, int]:
    """Where there is no QEMU, the oldest that we know is assumed."""
    try:
        answer = subprocess.run(
            [qemu, "--version"], check=False, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_QEMU_ANSWERS_S
        )
    except (OSError, subprocess.SubprocessError):
        return OLDEST_QEMU
    return qemu_version(answer.stdout)


@click.command("vm-args")
@click.argument("name")
@click.option("--guest", required=True, help="What the daemon calls the virtual machine.")
@click.option(
    "--format", "form", type=click.Choice(FORMATS), default=FORMATS[0], show_default=True,
    help="Options of QEMU, one with its value on each line, or elements of a libvirt domain.",
)  # fmt: skip
@click.option("--memory", default=DEFAULT_MEMORY, show_default=True, help="Of the machine: virtiofsd must be able to map it.")
@click.option("--port", default=VIRTIO_PORT_NAME, show_default=True, help="The name of the virtio-serial port: each share needs its own.")
@click.option("--virtiofsd", help="The program. [default: where distributions install it]")
@click.option("--qemu", default=_QEMU, show_default=True, help="The program, which is asked for its version.")
@runtime_dir_option
@json_option
def vm_args_command(
    name: str, guest: str, form: str, memory: str, port: str, virtiofsd: str | None, qemu: str, runtime_dir: Path, as_json: bool
) -> None:
    """Print how a virtual machine becomes a guest of NAME, which must be served now.

    The daemon should be started with --table posix: then the machine survives its restart.

    \b
    coherency vm-args work --guest vm1
    qemu-system-x86_64 ... $(coherency vm-args work --guest vm1 | grep -v '^#')
    coherency vm-args work --guest vm1 --format libvirt
    """
    with errors_as_messages():
        directory = runtime_dir.absolute()
        report = fetch_status(directory, name)
        options = VirtualMachineOptions(
            name, guest, str(directory), int(report["table_bytes"]), report["table_kind"] == "posix",
            virtiofsd or _installed_virtiofsd(), memory, port, _version_of(qemu),
        )  # fmt: skip
    if as_json:
        document = {
            "qemu": [each for pair in options.qemu() for each in pair],
            "virtiofsd": options.virtiofsd_command,
            "tag": options.tag,
            "mount": options.mount_command,
            "libvirt": libvirt_text(options),
        }
        click.echo(json.dumps(document, indent=2))
        return
    if report["table_kind"] == "memfd":
        click.echo("coherency: the machine will not survive a restart of the daemon: see serve --table posix", err=True)
    if form == "qemu":
        click.echo(qemu_text(options), nl=False)
    else:
        click.echo("\n".join(f"# {line}" for line in options.hints(starts_virtiofsd=False)), err=True)
        click.echo(libvirt_text(options), nl=False)


@click.command("forget")
@click.argument("name")
@runtime_dir_option
def forget_command(name: str, runtime_dir: Path) -> None:
    """Remove what a daemon with --table posix has kept for virtual machines when it ended: the table, and the window of virtiofsd.

    Machines that have them keep an old table, which nobody believes any more, and an empty directory: they must be restarted.

    \b
    coherency forget work
    """
    with errors_as_messages():
        found = forget(runtime_dir.absolute(), name)
    click.echo(f"forgot '{name}'" if found else f"there was nothing to forget of '{name}'")
