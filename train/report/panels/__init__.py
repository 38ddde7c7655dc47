"""What the pages show, a kind of picture a file."""
