"""A mount that is being made while the daemon is restarted."""

from pathlib import Path
from typing import Any

import pytest

from coherency.daemon.service import Service, ServiceOptions
from coherency.fuse.session import Session
from coherency.guest_agent.mount import GuestMount, MountOptions
from tests.waiting import until


@pytest.mark.expected_logs("lost the daemon of 'test'", "hung up without a goodbye")
def test_it_works_with_the_new_daemon(socket_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    share, mountpoint = socket_dir / "share", socket_dir / "guest"
    share.mkdir()
    mountpoint.mkdir()
    (share / "file").write_text("here")
    options = ServiceOptions(share, "test", socket_dir / "run")
    services = [Service(options)]
    services[0].start()
    guest = GuestMount(MountOptions("test", mountpoint, socket_dir / "run", "access"))
    mount = Session.mount.__func__  # type: ignore[attr-defined]

    def mount_after_a_restart(cls: type[Session], *arguments: Any, **named: Any) -> Session:
        if named["name"] == "mount" and len(services) == 1:
            reader = guest.client.reader
            services[0].close()
            services.append(Service(options))
            services[1].start()
            until(lambda: guest.client.reader is not reader)
        session: Session = mount(cls, *arguments, **named)
        return session

    monkeypatch.setattr(Session, "mount", classmethod(mount_after_a_restart))

    def answers() -> bool:
        try:
            return (mountpoint / "file").read_text() == "here"
        except OSError:
            return False

    try:
        guest.start()
        until(answers)
        guest.close()
    finally:
        for service in services:
            service.close()
