"""The error of a run that began and cannot go on."""


class TrainingFailed(RuntimeError):
    """A run that cannot go on: no input is bad, and what was saved before stays."""
