"""The formats that reading is compared with: each writes the same arrays and reads them back its own usual way.

    TraceStore   tracekit: shards, mapped
    pickle       one file with everything; reading anything loads all of it
    LMDB         one pickled dict a sample
    Zarr         one array a sample and site, default chunks and compression
    npy          one file a sample, site and layer
    tar + npy    one tar of npy members, as WebDataset has them; its list of members is read once

All of them store attention packed and hand it back so. `TracekitFormat.scan_unpacked` hands it back as (L, H, T, T).
"""

import io
import pickle
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import lmdb
import numpy as np
import zarr

from tests.datasets_for_tests import Made, write_dataset
from tracekit.read.store import TraceStore

__all__ = ["FORMATS", "Format", "TracekitFormat"]

_SAMPLES_PER_SHARD = 64
_SITE = "hidden_states"


class Format(Protocol):
    """One way to keep samples on disk."""

    name: ClassVar[str]

    def write(self, folder: Path, samples: Sequence[Made]) -> None:
        """Write all samples into an empty folder."""
        ...

    def open(self, folder: Path) -> None:
        """Open what was written."""
        ...

    def close(self) -> None:
        """Let go of it."""
        ...

    def layer(self, key: str, layer: int) -> np.ndarray:
        """Hidden states (T, D) of one layer of one sample."""
        ...

    def scan(self) -> Iterator[np.ndarray]:
        """Every tensor, in the order in which it is stored."""
        ...


class TracekitFormat:
    """A finished dataset folder and TraceStore."""

    name = "TraceStore"

    def write(self, folder: Path, samples: Sequence[Made]) -> None:
        starts = range(0, len(samples), _SAMPLES_PER_SHARD)
        shards = {f"train-{i:05d}": samples[s : s + _SAMPLES_PER_SHARD] for i, s in enumerate(starts)}
        write_dataset(folder, shards)

    def open(self, folder: Path) -> None:
        self._store = TraceStore(folder)

    def close(self) -> None:
        self._store.close()

    def layer(self, key: str, layer: int) -> np.ndarray:
        return self._store.hidden_states(key, layer=layer)

    def scan(self) -> Iterator[np.ndarray]:
        for sample in self._store:
            yield from sample.tensors().values()

    def scan_unpacked(self) -> Iterator[np.ndarray]:
        """Every tensor, attention as (L, H, T, T): more work than any of the others does."""
        for sample in self._store:
            yield sample.hidden_states()
            yield sample.attention()


class PickleFormat:
    """One pickle of everything."""

    name = "pickle"

    def write(self, folder: Path, samples: Sequence[Made]) -> None:
        with (folder / "all.pkl").open("wb") as file:
            pickle.dump({made.record.key: made.stored for made in samples}, file, protocol=5)

    def open(self, folder: Path) -> None:
        self._path = folder / "all.pkl"

    def close(self) -> None:
        pass

    def layer(self, key: str, layer: int) -> np.ndarray:
        return self._load()[key][_SITE][layer]

    def scan(self) -> Iterator[np.ndarray]:
        for tensors in self._load().values():
            yield from tensors.values()

    def _load(self) -> dict[str, Mapping[str, np.ndarray]]:
        with self._path.open("rb") as file:
            return pickle.load(file)  # our own, written a moment ago: a pickle from elsewhere could run any code


class LMDBFormat:
    """One pickled dict a sample."""

    name = "LMDB"

    def write(self, folder: Path, samples: Sequence[Made]) -> None:
        with lmdb.open(str(folder), map_size=1 << 34) as database:
            for made in samples:
                with database.begin(write=True) as transaction:
                    transaction.put(made.record.key.encode(), pickle.dumps(dict(made.stored), protocol=5))

    def open(self, folder: Path) -> None:
        self._database = lmdb.open(str(folder), readonly=True, lock=False)

    def close(self) -> None:
        self._database.close()

    def layer(self, key: str, layer: int) -> np.ndarray:
        with self._database.begin(buffers=True) as transaction:
            return _unpickle(transaction.get(key.encode()))[_SITE][layer]

    def scan(self) -> Iterator[np.ndarray]:
        with self._database.begin(buffers=True) as transaction:
            for _, value in transaction.cursor():
                yield from _unpickle(value).values()


class ZarrFormat:
    """One array a sample and site."""

    name = "Zarr"

    def write(self, folder: Path, samples: Sequence[Made]) -> None:
        root = zarr.open_group(str(folder), mode="w")
        for made in samples:
            for site, array in made.stored.items():
                root.create_array(f"{made.record.key}/{site}", data=array)

    def open(self, folder: Path) -> None:
        self._root: Any = zarr.open_group(str(folder), mode="r")
        self._keys = sorted(path.name for path in folder.iterdir() if path.is_dir())

    def close(self) -> None:
        pass

    def layer(self, key: str, layer: int) -> np.ndarray:
        return self._root[f"{key}/{_SITE}"][layer]

    def scan(self) -> Iterator[np.ndarray]:
        for key in self._keys:
            for site in (_SITE, "attentions"):
                yield self._root[f"{key}/{site}"][:]


class NpyFormat:
    """One .npy file a sample, site and layer."""

    name = "npy"

    def write(self, folder: Path, samples: Sequence[Made]) -> None:
        for made in samples:
            (folder / made.record.key).mkdir()
            for site, array in made.stored.items():
                for layer, value in enumerate(array):
                    np.save(folder / made.record.key / f"{site}.{layer}.npy", value)

    def open(self, folder: Path) -> None:
        self._folder = str(folder)
        self._paths = sorted(str(path) for path in folder.rglob("*.npy"))

    def close(self) -> None:
        pass

    def layer(self, key: str, layer: int) -> np.ndarray:
        return np.load(f"{self._folder}/{key}/{_SITE}.{layer}.npy")

    def scan(self) -> Iterator[np.ndarray]:
        return (np.load(path) for path in self._paths)


class TarFormat:
    """One tar of .npy members."""

    name = "tar + npy"

    def write(self, folder: Path, samples: Sequence[Made]) -> None:
        with tarfile.open(folder / "all.tar", "w") as tar:
            for made in samples:
                for site, array in made.stored.items():
                    buffer = io.BytesIO()
                    np.save(buffer, array)
                    member = tarfile.TarInfo(f"{made.record.key}.{site}.npy")
                    member.size = buffer.tell()
                    buffer.seek(0)
                    tar.addfile(member, buffer)

    def open(self, folder: Path) -> None:
        self._path = folder / "all.tar"
        self._indexed: tarfile.TarFile | None = None

    def close(self) -> None:
        if self._indexed is not None:
            self._indexed.close()

    def layer(self, key: str, layer: int) -> np.ndarray:
        if self._indexed is None:
            self._indexed = tarfile.open(self._path)  # noqa: SIM115 - stays open until `close`
        file = self._indexed.extractfile(f"{key}.{_SITE}.npy")
        assert file is not None
        return np.load(io.BytesIO(file.read()))[layer]

    def scan(self) -> Iterator[np.ndarray]:
        with tarfile.open(self._path, "r|") as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                yield np.load(io.BytesIO(file.read()))


def _unpickle(value: Any) -> dict[str, np.ndarray]:
    return pickle.loads(value)  # our own, written a moment ago: a pickle from elsewhere could run any code


FORMATS: tuple[type[Format], ...] = (TracekitFormat, PickleFormat, LMDBFormat, ZarrFormat, NpyFormat, TarFormat)
