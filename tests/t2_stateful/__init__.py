"""t2: state machines and interleavings, generated or enumerated."""
