"""The one exception that a user can cause."""


class UserError(ValueError):
    """What a user can cause and fix: printed as one sentence, exit status 2, no traceback."""
