"""Workers of a sweep: which runs they claim, on which devices they train them, and the pool of those of one machine."""
