"""The two kinds of error that the command line shows as one line."""


class UserError(ValueError):
    """A mistake in what was given: says what was given, what was expected and what to do. Exit code 2."""


class StageError(RuntimeError):
    """A stage that could not finish through no mistake in its configuration. Exit code 1."""
