"""What goes wrong with a checkpoint, in two types."""


class CheckpointError(ValueError):
    """A checkpoint cannot be written or read; the message names the file and the reason."""


class CheckpointMismatchError(CheckpointError):
    """A sound checkpoint does not belong to this model, optimizer or run."""
