"""The one exception for a mistake that its user can mend."""


class UserError(Exception):
    """Bad input or a cluster that cannot run what was asked.

    The message says what is wrong, where, the value, and what to do. The entry points print it without a
    traceback and exit with code 2; every other exception is a defect of the program and keeps its traceback.
    """
