"""Background jobs whose rows in the database survive every crash. See README.md beside this file."""

__version__ = "1.0.0.dev"
