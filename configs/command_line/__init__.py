"""Words of a command line read as configs."""
