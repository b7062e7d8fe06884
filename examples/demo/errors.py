"""The one exception the demo turns into a single line on stderr."""


class DemoError(Exception):
    """Something the user can mend; its message is the whole report."""
