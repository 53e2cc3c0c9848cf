"""Buckets: numbers in 8, 4, 2 or 1 bit, so many of them with one scale.

Alistarh et al., 2017, https://arxiv.org/abs/1610.02132 (QSGD), with the largest entry of a bucket as its scale, as in
their experiments, and codes of fixed width instead of Elias's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fedtower.core.errors import UpdateError
from fedtower.core.jagged import Bytes
from fedtower.core.packing import as_bytes, as_floats, pack, packed_bytes, unpack

FloatArray = NDArray[np.float32]
Lots = NDArray[np.float64] | float
BUCKET = 512
"""Entries that share a scale: QSGD's experiments have 512, which is 1/16 of a bit an entry."""


@dataclass(frozen=True)
class Buckets:
    r"""Each entry as :math:`s\,q / L` with a whole :math:`|q| \le L = 2^{b-1} - 1`, where :math:`s` is the largest of
    its bucket without signs; with one bit it is :math:`\pm s`.

    ``lots`` decide how an entry is rounded: draws from [0, 1), one an entry, make it right on average, and 0.5 makes it
    nearest. ``nearest`` also says which scale of one bit is: the mean without signs (Seide et al., 2014).
    """

    bits: Literal[8, 4, 2, 1]
    nearest: bool

    def encode(self, flat: FloatArray, lots: Lots) -> Bytes:
        """Scales and codes of each line.

        Shape:
            ``flat`` (C, n), ``lots`` (C, n) or one number -> (C, :meth:`length`) uint8.
        """
        count, size = flat.shape
        buckets = -(-size // BUCKET)
        padded = np.pad(flat, ((0, 0), (0, buckets * BUCKET - size))).reshape(count, buckets, BUCKET)
        fill = np.full(buckets, BUCKET)
        fill[-1:] = size - (buckets - 1) * BUCKET
        scales = self.scales(padded, fill)
        codes = self.codes(flat, np.repeat(scales, BUCKET, axis=1)[:, :size], lots)
        return np.concatenate([as_bytes(scales), pack(codes, self.bits)], axis=1)

    def decode(self, data: Bytes, size: int) -> FloatArray:
        """What :meth:`encode` was given, as far as the bits go: (C, :meth:`length`) -> (C, ``size``).

        Raises:
            UpdateError: a code that there is not.
        """
        heads = 4 * -(-size // BUCKET)
        scales = np.repeat(as_floats(data[:, :heads]), BUCKET, axis=1)[:, :size]
        return self.values(unpack(data[:, heads:], self.bits, size), scales)

    def length(self, size: int) -> int:
        """Bytes of ``size`` entries, their scales among them."""
        return 4 * -(-size // BUCKET) + packed_bytes(size, self.bits)

    def scales(self, buckets: FloatArray, fill: NDArray[np.int64] | int) -> FloatArray:
        """The scale of each bucket, the last axis, of which ``fill`` entries are meant; that of a bucket that is not
        finite is not either.
        """
        sizes = np.abs(buckets)
        if self.bits == 1 and self.nearest:
            return np.asarray(sizes.sum(axis=-1, dtype=np.float64) / fill, dtype=np.float32)
        return np.asarray(sizes.max(axis=-1), dtype=np.float32)

    def codes(self, flat: FloatArray, scales: FloatArray, lots: Lots) -> Bytes:
        """Whole numbers below 2^bits, one an entry; ``scales`` has one an entry, too."""
        usable = np.isfinite(scales) & (scales > 0)
        share = np.where(usable, flat, 0.0) / np.where(usable, scales, 1.0).astype(np.float64)
        if self.bits == 1:
            if self.nearest:
                return (share >= 0).astype(np.uint8)
            return ((share + 1) / 2 > lots).astype(np.uint8)
        levels = 2 ** (self.bits - 1) - 1
        whole = np.floor(np.clip(share, -1.0, 1.0) * levels + lots)
        return np.asarray(np.clip(whole, -levels, levels) + levels, dtype=np.uint8)

    def values(self, codes: Bytes, scales: FloatArray) -> FloatArray:
        """The numbers that codes mean.

        Raises:
            UpdateError: a code that there is not.
        """
        if self.bits == 1:
            return np.where(codes == 1, scales, -scales).astype(np.float32)
        levels = 2 ** (self.bits - 1) - 1
        if np.any(codes > 2 * levels):
            raise UpdateError(f"a code of {self.bits} bits is at most {2 * levels}, and {int(codes.max())} came")
        shares = (codes.astype(np.float64) - levels) / levels
        with np.errstate(invalid="ignore"):  # a scale that is not finite is for the server to refuse
            return np.asarray(scales * shares, dtype=np.float32)
