"""What Celery's workers lack, by Celery's own settings. README.md says which setting brings what."""

__version__ = "1.0.0.dev"
