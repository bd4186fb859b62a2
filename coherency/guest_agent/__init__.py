"""The agent, one per guest mount: answers from its cache while the version table says that it may.

``client`` the guest's end of the control channel.
"""
