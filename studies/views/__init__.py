"""A study as it is read: stored, in a few words, as tables, exported."""
