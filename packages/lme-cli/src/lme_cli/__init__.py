"""The run file and the `lme` command."""

__version__ = "0.1.0"
