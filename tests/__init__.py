"""Tests of coherency: `tests/README.md` says how they are ordered and how to run one."""
