"""The reference RVM-Server: what the worker is tried, tested and integrated against.

It shares no code with the worker: each side has its own models of the wire, so that a field
renamed on both sides at once does not pass.
"""
