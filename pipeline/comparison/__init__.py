"""Runs x feature sets, with intervals, paired tests and floors."""
