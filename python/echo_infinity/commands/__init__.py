"""What each command of ``echo-infinity`` does; the parser is in :mod:`echo_infinity.cli`."""


class UserError(Exception):
    """A request that can't be served: one line that says why, and no traceback."""
