"""Exceptions that the demo reports as a single line on stderr."""


class DemoError(Exception):
    """An error that the user can fix; the message is the whole report."""


class DivergedError(DemoError):
    """Training diverged: a number is not finite. Other methods can continue."""
