"""Recommenders: a file per paper."""
