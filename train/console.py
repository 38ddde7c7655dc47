"""Where commands show what they found."""

from rich.console import Console

console = Console(soft_wrap=True)
