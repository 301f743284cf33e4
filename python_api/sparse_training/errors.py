"""The one exception that means "the request is wrong", as opposed to "the program is"."""


class UserError(ValueError):
    """A request that cannot be served: one line that names what was given and what is wanted.

    The command line prints the line and exits with code 2.
    """
