"""GuestAgent and a daemon that comes, goes, or asks at an awkward moment."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from coherency import GuestAgent
from coherency.guest_agent.client import Client
from coherency.protocol import Welcome
from coherency.shm_table import TableReader
from tests.guests import Host
from tests.passthrough import eventually


@pytest.mark.expected_logs("the daemon is back, its export is not")
@pytest.mark.expected_logs("lost the daemon", "is back, but of no use: cannot open /nowhere")
def test_an_export_that_cannot_be_opened_is_tried_again(socket_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The daemon may be killed again between its welcome and the opening."""
    with Host(socket_dir) as host, host.agent() as agent:
        (host.share / "file").write_text("x")
        assert agent.stat("file").st_size == 1
        use, tries = agent._use, iter([True])

        def misled_once(reader: TableReader, welcome: Welcome) -> None:
            use(reader, dataclasses.replace(welcome, export="/nowhere") if next(tries, False) else welcome)

        monkeypatch.setattr(agent, "_use", misled_once)
        before = agent._paths
        host.daemon.kill()
        host.serve()
        eventually(lambda: agent._paths is not before)
        assert next(tries, None) is None  # it was misled
        assert agent.stat("file").st_size == 1


def test_counters_may_be_asked_for_before_the_export_is_open(socket_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    connect = Client.connect

    def asked_at_once(*arguments: Any, **options: Any) -> Client:
        assert options["statistics"]().entries == 0
        return connect(*arguments, **options)

    monkeypatch.setattr(Client, "connect", asked_at_once)
    with Host(socket_dir) as host, GuestAgent.connect("test", runtime_dir=host.runtime_dir) as agent:
        assert agent.listdir() == []
