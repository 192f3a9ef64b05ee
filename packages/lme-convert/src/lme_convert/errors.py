"""What can go wrong, by who can act on it."""


class ConversionError(ValueError):
    """Tensors or settings that do not fit the family's rules; the message names them."""


class ModelDirectoryError(ConversionError):
    """A model directory that cannot be read or trusted; the message names the file."""


class UnsupportedModelError(ConversionError):
    """A family, or a variant of one, that has no exact counterpart on the other side."""


class CertificateError(ConversionError):
    """The two sides of a conversion do not compute the same logits."""


class HubError(RuntimeError):
    """A model could not be fetched by name."""
