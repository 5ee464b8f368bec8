"""The one error that a user's mistake raises, wherever it is first seen."""


class InputError(ValueError):
    """Something the user gave us is wrong: an option, a file, a record, a checkpoint.

    The message is one sentence (or two) that says what was found, where (file and line), and what to do.
    At the edge of the process it is printed without a traceback and the exit code is 2. Mistakes of ours
    are assertions, and end with a traceback and exit code 1.
    """
