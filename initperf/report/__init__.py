"""The page of a run: numbers, words, pictures."""
