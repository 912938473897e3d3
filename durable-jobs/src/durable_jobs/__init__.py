"""Background jobs whose rows in the database survive every crash."""

__version__ = "1.0.0.dev"
