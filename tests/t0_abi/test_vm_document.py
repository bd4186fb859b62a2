"""What docs/vm.md tells people to type is what `coherency vm-args` prints, with which the machines of t5 are made."""

import re
import shlex

from coherency.vm_args import VirtualMachineOptions, qemu_text
from tests.documents import ROOT, Block, blocks

OPTIONS = VirtualMachineOptions(
    name="work", guest="vm1", runtime_root="/run/coherency", table_bytes=16777216, has_window=True,
    virtiofsd="/usr/lib/qemu/virtiofsd",
)  # fmt: skip


def commands(block: Block) -> list[list[str]]:
    """Each command of a block of shell, as words, without what sends it into the background."""
    lines = block.text.replace("\\\n", " ").splitlines()
    return [shlex.split(line.removesuffix(" &")) for line in lines if line and not line.startswith("#")]


def typed() -> list[list[str]]:
    return [words for block in blocks(ROOT / "docs/vm.md") if block.language == "sh" for words in commands(block)]


def test_the_options_of_qemu_are_those_that_are_printed() -> None:
    fences = re.findall(r"^```\n(# The machine.*?)^```$", (ROOT / "docs/vm.md").read_text(), re.MULTILINE | re.DOTALL)
    assert fences == [qemu_text(OPTIONS)]


def test_the_commands_are_those_that_the_tests_take_from_it() -> None:
    assert OPTIONS.virtiofsd_command in typed()
    assert shlex.split(OPTIONS.mount_command) in typed()
    assert ["mount", "-t", "virtiofs", OPTIONS.tag, "/mnt/share"] in typed()


def test_negative_control_another_command_would_be_noticed() -> None:
    assert [*shlex.split(OPTIONS.mount_command), "--cache", "auto"] not in typed()
