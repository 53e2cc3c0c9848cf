"""Publication: what a round sends down of the shared parameters, where they do not go down as they are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class Publication:
    """The messages that lead a device to the parameters of a round's plan, in fewer bytes than they have.

    Where they are ``differences``, each message leads from one publication to the next, and a device needs those since
    the last that it had. Else there is at most one, and it needs nothing before it. ``sizes`` are their bytes, newest
    last. Who needs more of them than there are takes the parameters as they are, which always lead there too.
    ``messages`` are the bytes; on a device they are empty, as it fetches what it needs.
    """

    round: int
    sizes: tuple[int, ...]
    differences: bool
    messages: tuple[bytes, ...] = ()

    def needed(self, held: int) -> int | None:
        """How many of the newest messages a device needs whose last publication is that of round ``held`` (0: it had
        none); ``None`` where it takes the parameters as they are.

        >>> publication = Publication(7, sizes=(10, 20), differences=True)
        >>> [publication.needed(held) for held in (0, 4, 5, 6, 7)]
        [None, None, 2, 1, 0]
        """
        if not self.differences:
            return 1 if self.sizes else None
        behind = self.round - held
        return behind if held > 0 and 0 <= behind <= len(self.sizes) else None

    def bytes_for(self, held: IntArray, whole: int) -> IntArray:
        """Bytes that devices need which had the publications of rounds ``held`` (C,) last, where the parameters as they
        are have ``whole``: (C,).
        """
        return np.array([self._bytes(self.needed(each), whole) for each in held.tolist()], dtype=np.int64)

    def _bytes(self, needed: int | None, whole: int) -> int:
        return whole if needed is None else sum(self.sizes[len(self.sizes) - needed :])
