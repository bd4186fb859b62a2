"""One directory shared by several guests: cached as fast as `cache=always`, as right as `cache=none`.

The daemon (`coherency serve`) keeps version numbers of all metadata in shared memory; an agent in each guest
(`coherency mount`) compares them on each access and fetches only what has changed. `docs/architecture.md` names the
parts.
"""

__version__ = "0.1.0"
