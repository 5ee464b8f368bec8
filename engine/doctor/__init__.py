"""Whether this machine can train, told before anybody waits for it: what is there, what is missing, what to do.

Nothing here may fail because something is missing, so whatever is not in Python itself is imported where it is used.
"""
