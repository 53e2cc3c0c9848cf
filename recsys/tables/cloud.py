"""CloudTables: the tables and towers that stay in the cloud, TorchRec underneath, seen by everyone else as rows by
id.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedtower.core.checkpoint import grouped
from fedtower.core.errors import RecipeError, UpdateError
from fedtower.core.plan import RowSettings
from fedtower.recsys.models import Declared, Table
from fedtower.recsys.processes import ALONE, Processes
from fedtower.recsys.tables.fused import Fused
from fedtower.recsys.tables.states import Arrays, copied, optimizer_arrays, restore_optimizer, taken

if TYPE_CHECKING:
    from fedtower.recsys.tables.sharded import Sharded

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float32]
Features = Callable[[IntArray], FloatArray]

_FETCH = 1 << 18  # rows at a time, so that fetching a whole catalogue needs no second copy of it
_DRAWN = 1 << 16  # rows at a time, so that a table never lies in one process whole before it is spread over many


class RowOutOfRange(UpdateError):
    """An id that a table does not have. The kernels would silently train row 0 instead."""


class CloudTables:
    """The :class:`~fedtower.core.rows.RowStore` of one source of rows: tables, the tower on them, and their
    optimisers.

    The tables are stepped inside the backward pass (fused rowwise Adagrad or SGD, explicit epsilon), the tower by Adam.
    Under torchrun the tables are spread over the processes, and each has the tower. There :meth:`fetch`, :meth:`apply`
    and the saving of a checkpoint are the leading process's, while the others :meth:`help`; everything else is called
    by all of them in step, each with rows of its own.
    """

    def __init__(
        self,
        declared: Declared,
        features: Features,
        settings: RowSettings,
        generator: torch.Generator,
        *,
        device: str = "cpu",
        row_lr: float | None = None,
        tower_lr: float | None = None,
        processes: Processes = ALONE,
    ) -> None:
        self._num_bytes = declared.table_bytes
        self._source = declared.source
        self._features = features
        self._device = torch.device(device)
        self._num_rows = declared.tables[0].num_rows
        self._row_lr = settings.lr if row_lr is None else row_lr
        self._tower_lr = settings.tower_lr if tower_lr is None else tower_lr
        self._generation = 0
        self._processes = processes
        self._tables = _rows_of(declared.tables, settings, self._row_lr, self._device, self._processes)
        for table in declared.tables:
            for start, values in drawn(table, generator):
                self._tables.fill(table.name, start, values)
        self.tower = declared.cloud.to(self._device)
        parameters = [value for value in self.tower.parameters() if value.numel()]
        self._adam = torch.optim.Adam(parameters, lr=self._tower_lr) if parameters else None

    @property
    def generation(self) -> int:
        """How many times the tables have been stepped."""
        return self._generation

    @property
    def device(self) -> torch.device:
        """Where the tables are."""
        return self._device

    @property
    def num_bytes(self) -> int:
        """The size of all tables: what shipping them to a device would cost."""
        return self._num_bytes

    def fetch(self, source: str, ids: IntArray) -> FloatArray:
        """The rows of ``ids`` as the tower computes them, (n, W)."""
        self._check(source, ids)
        out = np.empty((len(ids), self.tower.width), dtype=np.float32)
        at_once = _FETCH * self._processes.count
        for start in range(0, len(ids), at_once):
            part = ids[start : start + at_once]
            self._processes.order("fetch", len(part))
            fetched = self._fetch(len(part), part)
            assert fetched is not None
            out[start : start + at_once] = fetched.cpu().numpy()
        return out

    def rows(self, source: str, ids: IntArray) -> Tensor:
        """The rows of ``ids`` with their history of computation, (n, W): going backward through them steps the tables.

        Raises:
            RowOutOfRange: an id below 0 or beyond the table.
        """
        self._check(source, ids)
        out: Tensor = self.tower(self._tables.lookup(ids), torch.from_numpy(self._features(ids)).to(self._device))
        return out

    def apply(self, deltas: Mapping[str, tuple[IntArray, FloatArray]], lr_scale: float) -> None:
        """Step tables and tower along row deltas: minus a delta is the gradient of the row, and goes back through the
        tower.
        """
        for source, (ids, _) in deltas.items():
            self._check(source, ids)
        self._processes.order("apply", lr_scale, [len(ids) for ids, _ in deltas.values()])
        self._apply(lr_scale, [len(ids) for ids, _ in deltas.values()], list(deltas.values()))

    def begin(self, lr_scale: float) -> None:
        """Set the learning rates of the step to come, before its :meth:`rows`: they take the tables' rate along."""
        self._tables.set_lr(self._row_lr * lr_scale)
        if self._adam is not None:
            for group in self._adam.param_groups:
                group["lr"] = self._tower_lr * lr_scale
            self._adam.zero_grad(set_to_none=True)

    def finish(self) -> None:
        """Step the tower; the tables were stepped on the way back."""
        if self._adam is not None:
            self._processes.sum([value.grad for value in self.tower.parameters() if value.grad is not None])
            self._adam.step()
        self._generation += 1

    @property
    def attachments(self) -> Mapping[str, Callable[[Path], None]]:
        """What of the tables is no array of :meth:`snapshot`: those that are spread over processes write a folder."""
        return {} if self._processes.is_alone else {"tables": self._save}

    @property
    def help(self) -> Mapping[str, Callable[..., object]]:
        """The part of a process that does not lead in what the leading one orders."""
        return {"fetch": self._fetch, "apply": self._apply, "save": self._save_part}

    def snapshot(self) -> dict[str, NDArray[Any]]:
        """Tables, tower, and the state of both optimisers; of tables that are spread over processes, :meth:`save` takes
        care.
        """
        arrays: dict[str, NDArray[Any]] = {"generation": np.asarray(self._generation, dtype=np.int64)}
        arrays |= self._tables.snapshot()
        arrays |= {f"tower/{name}": copied(value) for name, value in self.tower.state_dict().items()}
        if self._adam is not None:
            arrays |= {f"adam/{name}": value for name, value in optimizer_arrays(self._adam).items()}
        return arrays

    def restore(self, arrays: Arrays, folder: Path | None = None) -> None:
        """Continue from a snapshot, bit for bit; with the ``folder`` that :meth:`save` wrote, if it did. Both ways at
        any number of processes, each of which calls it.
        """
        self._generation = int(taken(arrays, "generation").item())
        self._tables.restore(arrays, folder)
        with torch.no_grad():
            for name, value in self.tower.state_dict().items():
                value.copy_(torch.from_numpy(np.array(taken(arrays, f"tower/{name}", value.shape))))
        if self._adam is not None:
            restore_optimizer(self._adam, grouped(arrays, "adam"))

    def _check(self, source: str, ids: IntArray) -> None:
        """Refuse ids before they reach a kernel, or another process."""
        if source != self._source:
            raise RowOutOfRange(f"there are no rows of {source!r} here; this model keeps rows of {self._source!r}")
        if len(ids) and (ids.min() < 0 or ids.max() >= self._num_rows):
            wrong = int(ids.min()) if ids.min() < 0 else int(ids.max())
            raise RowOutOfRange(f"row ids of {source!r} go from 0 to {self._num_rows - 1}, but {wrong} was asked for")

    def _fetch(self, count: int, ids: IntArray | None = None) -> Tensor | None:
        """Every process looks up an equal part of the leading one's ``ids``, and gives its rows back to it."""
        with torch.no_grad():
            mine, real = self._part(count, None if ids is None else torch.from_numpy(ids))
            rows = self.rows(self._source, mine.numpy()[:real])
            if self._processes.is_alone:
                return rows
            padded = torch.zeros(len(mine), self.tower.width)
            padded[:real] = rows
            gathered = self._processes.gather(padded)
        return None if gathered is None else gathered[:count]

    def _apply(
        self, lr_scale: float, counts: Sequence[int], deltas: Sequence[tuple[IntArray, FloatArray]] | None = None
    ) -> None:
        """Every process steps along an equal part of the leading one's ``deltas``."""
        self.begin(lr_scale)
        for place, count in enumerate(counts):
            if count:
                ids, delta = (None, None) if deltas is None else map(torch.from_numpy, deltas[place])
                mine, real = self._part(count, ids)
                down, _ = self._part(count, delta, self.tower.width)
                rows = self.rows(self._source, mine.numpy()[:real])
                rows.backward(-down[:real].to(self._device))  # type: ignore[no-untyped-call]
        self.finish()

    def _part(self, count: int, values: Tensor | None, width: int | None = None) -> tuple[Tensor, int]:
        """This process's part of ``count`` ids, or deltas ``width`` wide, and how much of it is no padding."""
        if self._processes.is_alone:
            assert values is not None
            return values, count
        positions, real = self._processes.share(count)
        room = torch.empty(len(positions), *([] if width is None else [width]), dtype=None if width else torch.int64)
        if values is not None:
            padding = len(positions) * self._processes.count - count
            values = torch.cat([values, values[:1].expand(padding, *values.shape[1:])])
        return self._processes.scatter(values, room), int(real.sum())

    def _save(self, folder: Path) -> None:
        self._processes.order("save", folder)
        self._save_part(folder)

    def _save_part(self, folder: Path) -> None:
        assert not isinstance(self._tables, Fused)
        self._tables.save(folder)


def drawn(table: Table, generator: torch.Generator) -> Iterator[tuple[int, Tensor]]:
    """The first values of a table, some rows at a time, each with the first row's number: the same bits as drawn at
    once.
    """
    # torch draws normals by sixteens, and the last sixteen of a tensor anew: so the last part is never a small one.
    starts = [*range(0, max(table.num_rows - _DRAWN, 1), _DRAWN), table.num_rows]
    for start, end in pairwise(starts):
        yield start, torch.empty(end - start, table.dim).normal_(0.0, table.scale, generator=generator)


def _rows_of(
    tables: tuple[Table, ...], settings: RowSettings, lr: float, device: torch.device, processes: Processes
) -> Fused | Sharded:
    """The tables, here or spread over the processes."""
    if processes.is_alone:
        return Fused(tables, settings, lr, device)
    if device.type != "cpu":
        raise RecipeError(
            f'device = "{device}": tables are spread over processes on their CPUs; set device = "cpu", or train in one '
            f"process, without torchrun"
        )
    from fedtower.recsys.tables.sharded import Sharded  # its imports take seconds that one process need not spend

    return Sharded(tables, settings, lr, processes)
