"""The one exception for mistakes that a user can mend."""


class UserError(Exception):
  """A mistake in the user's configuration, files or environment.

  The message is one sentence: the field or file, what was found, what was expected.
  `main` prints it without a traceback and exits with code 2.
  """
