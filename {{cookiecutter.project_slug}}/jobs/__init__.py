"""Background work whose row in the database survives every crash: see README.md beside this file."""

__version__ = "1.0.0.dev"
