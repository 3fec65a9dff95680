"""What is measured, and against whom; `make bench` runs it all. None of these is a timed test."""
