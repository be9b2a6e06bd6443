"""Samples that cannot be decoded: named, counted, limited, and who takes their place."""

import itertools
import threading
from pathlib import Path

import numpy as np

from dist_train.errors import UserError

_NAMED = 20  # in an error


class Undecodable(UserError):
    """Samples whose bytes are those of the index and are no picture, or not as far as it was needed.

    places: (n,) int64, where they stand among those that were to be decoded; reasons: shard, name and why, of each.
    """

    def __init__(self, places: np.ndarray, reasons: list[str]):
        super().__init__(reasons[0])
        self.places, self.reasons = places, reasons


class BadSamples:
    """The bad samples of a split so far, at most `limit` of them. Shared by the threads that decode.

    The place of a bad sample is taken by the next one of the split that can be decoded, each tried with the key, and so the
    crop, that it has in that epoch: what comes in its place depends on the data, the seed and the epoch alone, not on what
    another batch, rank or start has met.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self.reasons: dict[int, str] = {}  # number in the split -> shard, name and why
        self._told: dict[int, str] = {}  # of any rank, returned by `news`
        self._noted = 0  # of the reasons, handed out
        self._lock = threading.Lock()

    def suspects(self, samples: np.ndarray) -> np.ndarray:
        """(k,) int64, where samples stand that some crop of them could not be decoded of. samples: (n,) int64."""
        if not self.reasons:
            return np.zeros(0, np.int64)
        with self._lock:
            return np.flatnonzero(np.isin(samples, np.fromiter(self.reasons, np.int64)))

    def replaced(self, samples: np.ndarray, fault: Undecodable, num_samples: int) -> np.ndarray:
        """The samples with those of a fault noted, and the next one of the split in the place of each.

        samples: (n,) int64 numbers in the split. Raises UserError where the limit does not allow another.
        """
        for place, reason in zip(fault.places.tolist(), fault.reasons, strict=True):
            self._note(int(samples[place]), reason, num_samples)
        samples = samples.copy()
        samples[fault.places] = (samples[fault.places] + 1) % num_samples
        return samples

    def noted(self) -> dict[int, str]:
        """The reasons that were not handed out before."""
        with self._lock:
            fresh = dict(itertools.islice(self.reasons.items(), self._noted, None))
            self._noted += len(fresh)
            return fresh

    def _note(self, sample: int, reason: str, num_samples: int) -> None:
        with self._lock:
            if sample in self.reasons:
                return
            what = reason.partition("\n")[0]
            if len(self.reasons) >= min(self.limit, num_samples - 1):
                raise UserError(f"{what}\n  {self._advice()}")
            self.reasons[sample] = what.rstrip(".")

    def news(self, everyone: list[dict[int, str]]) -> list[str]:
        """The reasons of bad samples of any rank that were not returned before. everyone: `noted` of each rank.

        Raises UserError, naming them, where the ranks together have more than the limit.
        """
        together = {sample: reason for reasons in everyone for sample, reason in reasons.items()}
        new = sorted(together.keys() - self._told.keys())
        self._told |= together
        if len(self._told) > self.limit:
            names = [f"\n  {self._told[sample]}" for sample in sorted(self._told)]
            more = f"\n  and {len(names) - _NAMED:,} more" if len(names) > _NAMED else ""
            what = f"{len(names):,} pictures cannot be decoded; data.max_bad allows {self.limit:,}"
            raise UserError(f"{what}:{''.join(names[:_NAMED])}{more}")
        return [together[sample] for sample in new]

    def _advice(self) -> str:
        if not self.limit:
            return "To train without such samples, say how many there may be: data.max_bad; each is named."
        return f"It is one more than data.max_bad, {self.limit}, allows."


def record(path: Path, lines: list[str]) -> None:
    """Add lines to a text file, those that it has not got: a resumed run meets its bad samples again."""
    known = set(path.read_text().splitlines()) if path.exists() else set()
    with open(path, "a") as file:
        file.writelines(f"{line}\n" for line in lines if line not in known)
