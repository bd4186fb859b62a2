"""One directory shared by several guests: cached as fast as `cache=always`, as right as `cache=none`.

The daemon (`coherency serve`) keeps version numbers of all metadata in shared memory; an agent in each guest
(`coherency mount`) compares them on each access and fetches only what has changed. `docs/architecture.md` names the
parts.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from coherency.guest_agent.api import GuestAgent as GuestAgent

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """``from coherency import GuestAgent``, without loading the agent for those who do not want it."""
    if name == "GuestAgent":
        from coherency.guest_agent.api import GuestAgent

        return GuestAgent
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
