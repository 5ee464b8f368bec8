"""Which documents of a run are chosen, in memory that grows with the shorter side of the choice."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np


@dataclass(frozen=True)
class Selection:
    """Some documents of a run [first, last): all but `listed`, or only those.

    Memory grows with the list alone, so it is the shorter one that is kept.

    listed: int64, ascending, within the run.
    """

    first: int
    last: int
    listed: np.ndarray
    is_listed_chosen: bool = False

    def __len__(self) -> int:
        return len(self.listed) if self.is_listed_chosen else self.last - self.first - len(self.listed)

    def __getitem__(self, positions: np.ndarray) -> np.ndarray:
        """Documents at these positions of the selection: int64 [N]."""
        if self.is_listed_chosen:
            return self.listed[positions]
        return self.first + positions + np.searchsorted(self._passed, positions, side="right")

    @cached_property
    def _passed(self) -> np.ndarray:
        """How many documents are chosen before each listed one."""
        return self.listed - self.first - np.arange(len(self.listed))

    def without(self, documents: np.ndarray) -> Selection:
        """The same without some others (ascending; those outside the run do not matter)."""
        begin, end = np.searchsorted(documents, [self.first, self.last])
        documents = documents[begin:end]
        if self.is_listed_chosen:
            return replace(self, listed=np.setdiff1d(self.listed, documents, assume_unique=True))
        return replace(self, listed=np.union1d(self.listed, documents))
