"""What docs/simulator.md says of faults, calls, promises and options is so."""

import re
from pathlib import Path

from coherency.cli_check import check_command
from coherency.cli_simulate import simulate_command
from coherency.sim.calls import ANSWERS
from coherency.sim.faults import DEFAULT_LEASE_NS, FAULTS, GROUPS
from coherency.sim.litmus import DEFAULT_BOUND_S, TRIALS
from coherency.sim.machine import ENDLESS_S, MOUNT_DANGEROUSLY, RECOVERY_TIMEOUT_S, SERVE_DANGEROUSLY
from coherency.sim.verdict import AUTO_TIMEOUT_NS, PROMISES
from coherency.sim.waits import LONGEST_CALL_NS

TEXT = (Path(__file__).resolve().parents[2] / "docs/simulator.md").read_text()


def rows(section: str) -> list[list[str]]:
    """The cells of the table below a heading."""
    text = TEXT.partition(f"\n### {section}\n")[2].partition("\n#")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| `")]


def test_faults() -> None:
    assert rows("Faults") == [[f"`{name}`", kind.what] for name, kind in FAULTS.items()]
    section = TEXT.partition("### Faults")[2].partition("| fault")[0]
    assert re.findall(r"`(\w+)`", section) == list(GROUPS)
    assert f"(`--lease`, {DEFAULT_LEASE_NS // 10**9} s here" in TEXT


def test_promises() -> None:
    modes = [mode for row in rows("What is checked") for mode in re.findall(r"`(\w+)`", row[0])]
    assert sorted(modes) == sorted(PROMISES)
    assert f"the timeout ({AUTO_TIMEOUT_NS // 10**9} s)" in TEXT
    assert f"may take longer than {LONGEST_CALL_NS // 10**9} s" in TEXT
    assert f"anything within {RECOVERY_TIMEOUT_S:g} s and two leases" in TEXT
    assert f"has not returned {ENDLESS_S:g} s and two leases after" in TEXT


def test_calls() -> None:
    section = TEXT.partition("### What the workers do")[2].partition("\n#")[0]
    for op in ANSWERS:
        spelled = {"create": "O_CREAT", "rename-noreplace": "RENAME_NOREPLACE", "rename-exchange": "RENAME_EXCHANGE"}.get(op, op)
        assert spelled in section, op


def test_options() -> None:
    known = {option for command in (simulate_command, check_command) for each in command.params for option in each.opts}
    used = {word for line in re.findall(r"^    coherency .*|`--[a-z-]+", TEXT, re.MULTILINE) for word in re.findall(r"--[a-z-]+", line)}
    assert used <= known | {"--timeout"}
    dangers = re.findall(r"`([\w-]+)`", TEXT.partition("`--live-dangerously` leaves")[2].partition("\n#")[0])
    assert set(dangers) == {*SERVE_DANGEROUSLY, *MOUNT_DANGEROUSLY}
    assert f"`--bound` ({DEFAULT_BOUND_S:g} s)" in TEXT


def test_trials() -> None:
    kinds = TEXT.partition("Kinds of change: ")[2].partition(".\n")[0]
    assert re.findall(r"\*([^*]+)\*", kinds.replace("\n", " ")) == [trial.name for trial in TRIALS]
