"""The exceptions the demo turns into a single line on stderr."""


class DemoError(Exception):
    """Something the user can mend; its message is the whole report."""


class DivergedError(DemoError):
    """Training left the finite numbers; the other methods can go on."""
