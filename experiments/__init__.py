"""One file per paper: a lab note above a composition of public functions."""
