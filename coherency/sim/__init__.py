"""Simulated guests, the faults that befall them, the history of what they did and saw, and its checker.

``names``, ``calls``, ``workload``, ``faults``, ``history``, ``checker``, ``search``, ``race``, ``waits`` and ``verdict`` are pure
(but for the Random that two of them are handed); ``actions``, ``plots``, ``worker``, ``relay``, ``metronome``, ``machine`` and
``run`` have the processes. ``litmus`` is the check of any two directories, which needs none of the others.
"""
