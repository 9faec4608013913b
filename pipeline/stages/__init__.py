"""A file per stage: plain functions of a store, artefact keys and a configuration."""
