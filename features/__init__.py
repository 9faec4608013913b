"""From pictures and texts to vectors one can search."""
