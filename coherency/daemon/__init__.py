"""The daemon, one per share: owns the version table, serves the export and the control channel.

``runtime`` the directory that makes a name its own, ``switchboard`` the conversations with all peers (pure),
``deadlines`` what is due when, ``server`` the sockets around them.
"""
