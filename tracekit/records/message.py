"""One message of a conversation, as records keep it."""

import msgspec

__all__ = ["Message"]


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """One message of a conversation."""

    role: str
    """`system` (a client's `developer` too), `user` or `assistant`."""
    content: str
    """Its text; several parts of text are joined."""
