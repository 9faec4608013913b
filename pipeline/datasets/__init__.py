"""Importers: from the files people have to the canonical dataset."""
