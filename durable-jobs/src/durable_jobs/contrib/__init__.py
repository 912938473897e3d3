"""For other packages: Django's Tasks, Prometheus."""
