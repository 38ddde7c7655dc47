"""Options under which the contract also holds: each module has `CASES`, configs for width 64 by the name of the mixer and theirs."""
