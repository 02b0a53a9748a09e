"""The one error that is the person's to mend."""


class UserError(Exception):
    """A mistake in what was asked for: one line, printed as it is, exit code 2.

    The message says what was wrong, the value seen, what would be right and the knob
    or command that mends it.
    """


class Interrupted(Exception):
    """The person (or the cluster) asked to stop; all that was done is saved."""
