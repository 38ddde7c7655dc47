"""Channel mixers, one file each; see `base` for the contract."""
