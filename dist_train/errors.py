"""The one error a user can cause: printed without a traceback, exit code 2."""


class UserError(ValueError):
    """Something the user can put right.

    The message says what was being done, what was found, what was expected, and what to do next; it names the file
    or the key. `cli.main` prints it without a traceback and exits with `exit_code`. Several faults are joined by newlines, so
    that all of them are seen at once.
    """

    exit_code = 2
