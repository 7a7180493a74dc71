"""The `maia` command line."""
