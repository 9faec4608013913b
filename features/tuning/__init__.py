"""Encoders seen as towers of blocks, and which of their parameters are trained."""
