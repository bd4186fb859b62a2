"""t1: pure code: no descriptors, threads or processes."""
