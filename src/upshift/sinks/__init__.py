"""What goes on beside a run: the companion process, and the trackers that tail the run's record in it."""
