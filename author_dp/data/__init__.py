"""Read author-labelled text, split it by author, and tokenize it."""
