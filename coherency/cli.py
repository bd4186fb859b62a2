"""The command line: arguments, output, exit codes. What is decided is decided elsewhere.

Exit codes: 0 done (also after SIGTERM or Ctrl-C), 1 something is wrong that the message tells, 2 impossible options.

Each command has a module, which is loaded when the command is used: an agent need not load what a daemon does.
"""

from __future__ import annotations

from typing import Final

import click

from coherency import __version__

COMMANDS: Final = ("serve", "mount", "status", "invalidate", "evict", "vm-args", "forget", "check", "simulate", "demo")


class _Commands(click.Group):
    def list_commands(self, _context: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, _context: click.Context, name: str) -> click.Command | None:
        match name:
            case "serve":
                from coherency.cli_serve import serve_command as command
            case "mount":
                from coherency.cli_mount import mount_command as command
            case "status":
                from coherency.cli_status import status_command as command
            case "invalidate":
                from coherency.cli_orders import invalidate_command as command
            case "evict":
                from coherency.cli_orders import evict_command as command
            case "vm-args":
                from coherency.cli_vm import vm_args_command as command
            case "forget":
                from coherency.cli_vm import forget_command as command
            case "check":
                from coherency.cli_check import check_command as command
            case "simulate":
                from coherency.cli_simulate import simulate_command as command
            case "demo":
                from coherency.cli_demo import demo_command as command
            case _:
                return None
        return command


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="coherency")
def main() -> None:
    """Share one directory with several guests: never stale, and without asking the host for what did not change.

    \b
    coherency serve /srv/share --name work         # on the host: the daemon
    coherency mount work /mnt/a                    # a guest on the same machine
    coherency vm-args work --guest vm1             # a virtual machine as a guest: QEMU's options
    coherency status work                          # who is there, hits and refreshes
    coherency demo                                 # see it at work, nothing to prepare
    """
