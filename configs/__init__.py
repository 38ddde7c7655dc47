"""The experiment's config tree, its presets, its command line and its JSON form."""
