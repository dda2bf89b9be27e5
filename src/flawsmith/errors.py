"""What can go wrong, sorted by whose fault it is: the exit status of the command follows from the class.

A message is one clear sentence that names the file or key and the remedy; the CLI prints it without a traceback.
"""


class FlawsmithError(Exception):
    """Something failed that is not the user's fault (exit status 1)."""

    exit_code = 1


class UserError(FlawsmithError):
    """The user's input cannot be used as it is (exit status 2)."""

    exit_code = 2


class QualityGateError(FlawsmithError):
    """A quality gate did its work: the pipeline must stop here (exit status 1), and its report says why."""
