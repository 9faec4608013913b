"""Mistakes a user of ``recommenders`` can fix; the command line prints them without a stack trace."""


class RecommenderError(Exception):
    """What is wrong, with its value; what was expected; what to do next."""


class SplitError(RecommenderError):
    """The interactions cannot be split as asked."""


class TrainingError(RecommenderError):
    """Training cannot start or go on: missing features, a loss that is not a number, a foreign checkpoint."""


class SearchError(RecommenderError):
    """Settings cannot be searched as asked: a range of nothing, or no trial that could be finished."""
