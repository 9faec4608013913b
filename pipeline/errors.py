"""Mistakes a user can fix. The command line prints them as one message and exits with status 2."""

from features.errors import FeatureError
from recommenders.errors import RecommenderError


class PipelineError(Exception):
    """What is wrong, with its value; what was expected; what to do next."""


class ConfigError(PipelineError):
    """A configuration or a command's argument is not valid."""


class DatasetError(PipelineError):
    """The files of a dataset are not what the importer was told."""


class StoreError(PipelineError):
    """The store cannot be read or written, or holds a damaged artefact."""


USER_ERRORS: tuple[type[Exception], ...] = (PipelineError, FeatureError, RecommenderError)
"""All of them, for the one place that turns them into a message."""
