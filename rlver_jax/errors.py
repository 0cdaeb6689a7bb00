"""What ends a run with one sentence instead of a traceback."""


class UserError(Exception):
  """A mistake in the user's configuration, files or environment.

  The message is one sentence: the field or file, what was found, what was expected.
  `cli.run` prints it without a traceback and exits with code 2.
  """

  def _render_traceback_(self) -> list[str]:
    """What IPython shows in place of a traceback, so that a notebook says no more than `main`."""
    return [f"{type(self).__name__}: {self}"]


class BudgetSpent(Exception):
  """A budget of the configuration is spent; the run saves its state and ends.

  The message is one sentence: the field, its value, what was spent. `cli.run` prints it and exits
  with code 1.
  """


class Diverged(Exception):
  """Too many updates in a row were not finite; the last finite state has been saved.

  The message is one sentence. `cli.run` prints it and exits with code 1.
  """

  @classmethod
  def after(cls, updates: int, step: int) -> "Diverged":
    """So many updates were not finite, the last of them that of `step`."""
    return cls(
      f"{updates} updates in a row had a loss or gradient that is not finite "
      f"(training.max_nonfinite); the state before them is saved as step {step}."
    )
