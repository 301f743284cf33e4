"""The exception for requests that cannot be served."""


class UserError(ValueError):
    """A request that cannot be served; the message is one line that names what was given and what to give.

    The command line prints the line and exits with code 2.
    """
