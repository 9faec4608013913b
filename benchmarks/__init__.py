"""One command a figure; `results` keeps what was measured, and on what machine."""
