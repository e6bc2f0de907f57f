"""Errors that a person can cause."""

__all__ = ["UserError"]


class UserError(Exception):
    """Something that the person at the keyboard can put right.

    The message is one line that says what is wrong and what to do. The command line prints it without a
    traceback and exits with code 2.
    """
