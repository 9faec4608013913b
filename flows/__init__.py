"""Prefect flows: thin wrappers around the stages; the only package that imports Prefect."""
