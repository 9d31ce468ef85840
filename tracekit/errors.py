"""The errors tracekit raises, and nothing else.

    TracekitError
    ├── ConfigError (ValueError)            a setting is wrong; the message holds its path
    │   └── PlanMismatchError               the folder was begun with another configuration
    ├── SourceError (ValueError)            the data to run over is missing, empty or malformed
    ├── ModelError (ValueError)             a model cannot be found, loaded or used
    │   └── UnsupportedSiteError            an architecture cannot give a requested site
    ├── CaptureError (RuntimeError)         captured numbers failed a proof; nothing of them was written
    │   └── DtypeOverflowError              a value does not fit the dtype it is to be stored in
    ├── DatasetError (ValueError)           a folder is no dataset, or a dataset contradicts itself
    │   └── CorruptShardError               a shard's bytes are not what its manifest says
    ├── SampleNotFoundError (KeyError)      no such key, prompt, site or layer in a dataset
    ├── ShardLockedError (RuntimeError)     another process is writing this shard
    ├── ClientError (RuntimeError)          a model that is asked (endpoint, local) cannot be asked
    ├── ClusterError (RuntimeError)         workers cannot be had, or die again and again
    ├── HubError (RuntimeError)             the Hub cannot be reached, or refuses
    │   └── HubAccessError                  not logged in, or no right to do this
    ├── VersionError (ValueError)           a version is taken, malformed or too small a step
    ├── MemoryPressureError (RuntimeError)  memory is nearly full; what is finished is saved
    └── NoSpaceError (OSError)              the disk is, or would be, full

Every message says what was wrong, the value, what was expected, where, and what to do next.
"""

import msgspec

__all__ = [
    "UNREADABLE",
    "CaptureError",
    "ClientError",
    "ClusterError",
    "ConfigError",
    "CorruptShardError",
    "DatasetError",
    "DtypeOverflowError",
    "HubAccessError",
    "HubError",
    "MemoryPressureError",
    "ModelError",
    "NoSpaceError",
    "PlanMismatchError",
    "SampleNotFoundError",
    "ShardLockedError",
    "SourceError",
    "TracekitError",
    "UnsupportedSiteError",
    "VersionError",
]


UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What msgspec raises for a stranger's JSON: no JSON, other types, no UTF-8, a number out of range, lists too deep."""


class TracekitError(Exception):
    """Base of every error that tracekit raises on purpose."""


class ConfigError(TracekitError, ValueError):
    """A setting is wrong; the message holds its path and what is accepted."""


class PlanMismatchError(ConfigError):
    """The output folder was begun with another configuration, model, source or set of versions."""


class SourceError(TracekitError, ValueError):
    """The data to run over is missing, empty or malformed; the message names file and row."""


class ModelError(TracekitError, ValueError):
    """A model, adapter or tokenizer cannot be found, loaded or used as asked."""


class UnsupportedSiteError(ModelError):
    """An architecture cannot give a requested site; the message lists what it can give."""


class CaptureError(TracekitError, RuntimeError):
    """Captured numbers failed a proof; none of them was written."""


class DtypeOverflowError(CaptureError):
    """A finite value does not fit the dtype that it is to be stored in."""


class DatasetError(TracekitError, ValueError):
    """A folder is not a dataset, or a dataset contradicts itself."""


class CorruptShardError(DatasetError):
    """A shard's bytes are not what its manifest says."""


class SampleNotFoundError(TracekitError, KeyError):
    """No such key, prompt, site or layer in a dataset."""

    def __str__(self) -> str:  # KeyError would print the repr
        return str(self.args[0]) if self.args else ""


class ShardLockedError(TracekitError, RuntimeError):
    """Another process is writing this shard."""


class ClientError(TracekitError, RuntimeError):
    """A model that writes questions or judges answers cannot be asked; the message says what to check."""


class ClusterError(TracekitError, RuntimeError):
    """A cluster cannot be reached, or its workers die again and again; every finished batch is kept."""


class HubError(TracekitError, RuntimeError):
    """The Hub cannot be reached, does not have what was asked for, or refuses; nothing published is changed by it."""


class HubAccessError(HubError):
    """The Hub does not know the user, or the user may not do this."""


class VersionError(TracekitError, ValueError):
    """A version is malformed, taken by other content, or too small a step; the message names the next free one."""


class MemoryPressureError(TracekitError, RuntimeError):
    """The memory of the device is nearly full: a run saves what is finished and stops."""


class NoSpaceError(TracekitError, OSError):
    """The disk is full, or a run would not fit on it."""
