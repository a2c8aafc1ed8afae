"""The experiments of the lecture and the papers, with their recipes."""
