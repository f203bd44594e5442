"""Linear formats, one a file."""
