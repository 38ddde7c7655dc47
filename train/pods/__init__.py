"""Training on many hosts: what holds a run's hosts together, plans for machines that are not at hand, files that start a run on them."""
