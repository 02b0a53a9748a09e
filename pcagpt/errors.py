"""Errors that end a command with one line instead of a traceback."""


class UserError(Exception):
    """A mistake in the command or its inputs; exit code 2.

    The message is printed as it is. It names what was wrong, the value seen, what would
    be right, and the knob or command that corrects it.
    """


class Interrupted(Exception):
    """A signal asked to stop, and everything done so far is saved; exit code 1."""
