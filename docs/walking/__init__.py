"""What docs/walk.py needs around its numbers: blocks of a page, figures, and the three pages themselves."""
