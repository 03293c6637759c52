"""The two ways a run may end that are not a bug: the user can fix it, or a proof failed."""


class UserError(Exception):
    """Something the user can fix; one line that says what, where, and which values would work.

    The command exits with 2 and prints this line without a traceback.
    """


class ProofError(Exception):
    """A written checkpoint failed verification, or a quality gate was missed; exit code 3."""
