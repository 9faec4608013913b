"""What happens, in which order, and where it is kept: stages, store, datasets, comparison, command line."""
