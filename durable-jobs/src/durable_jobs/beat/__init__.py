"""What Beat does: the schedule, and the sweeper."""
