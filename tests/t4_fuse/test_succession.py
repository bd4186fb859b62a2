"""What one daemon leaves to the next."""

import time
from pathlib import Path

from coherency.daemon.service import Service, ServiceOptions
from coherency.shm_table import TRUST_MARGIN_NS, TRUST_NS


def test_who_is_stopped_while_waiting_for_an_old_table_does_not_give_the_name_free(socket_dir: Path) -> None:
    """The next daemon would find a clean name, and change the share while the old table is still trusted.

    That it matters is shown by `ForgetfulSuccessor` of tests/t2_stateful/test_trust_machine.py.
    """
    (socket_dir / "share").mkdir()
    service = Service(ServiceOptions(socket_dir / "share", "test", socket_dir / "run"))
    service.directory.path.mkdir(parents=True)
    service.directory.lock.write_text("1\n")  # what a killed daemon leaves
    before_ns = time.monotonic_ns()
    service.start()
    service.close()
    assert time.monotonic_ns() - before_ns >= TRUST_NS + TRUST_MARGIN_NS
    assert not service.directory.path.exists()
