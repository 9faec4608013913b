"""Encoding of single items while something else trains: what joint training needs of an encoder."""
