"""The three exceptions of the library."""


class HsrError(Exception):
    """Anything this library raises on purpose."""


class ArgumentError(HsrError, ValueError):
    """An argument is wrong; the message names it, what is wanted and what came."""


class BackendUnavailable(HsrError, RuntimeError):
    """No implementation can serve the call; the message has each one's reason."""


class StorageError(HsrError, ValueError):
    """A saved index cannot be read: truncated, altered, or of another format."""
