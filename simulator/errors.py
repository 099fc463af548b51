"""The one exception a user is meant to read."""


class UsageError(ValueError):
    """What was asked cannot be done; the message is one clear sentence for the user."""
