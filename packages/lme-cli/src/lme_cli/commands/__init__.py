"""The commands, one module each; none imports more than typer before it runs."""
