"""What a worker does with jobs."""
