"""A package, so that tests/unit and tests/real may use the same file names."""
