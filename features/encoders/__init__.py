"""Encoders: a file per family, one registry."""
