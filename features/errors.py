"""Mistakes a user of ``features`` can fix; the command line prints them without a stack trace."""


class FeatureError(Exception):
    """What is wrong, with its value; what was expected; what to do next."""


class EncoderError(FeatureError):
    """An encoder cannot be what its specification says: unknown name, missing or wrong weights."""


class FeatureFileError(FeatureError):
    """A feature file is damaged, or holds what a feature file must not hold."""


class IndexingError(FeatureError):
    """An index cannot be built or searched as asked."""
