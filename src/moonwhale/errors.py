"""The one exception that means "the input is at fault, not the program"."""


class UserError(ValueError):
    """Bad input. The message is one line that says what is wrong, where, and what to do; the command line prints it bare."""
