"""The tables and towers that stay in the cloud, TorchRec underneath: in one process, or spread over many."""

from fedtower.recsys.tables.cloud import CloudTables, RowOutOfRange
from fedtower.recsys.tables.states import optimizer_arrays, restore_optimizer

__all__ = ["CloudTables", "RowOutOfRange", "optimizer_arrays", "restore_optimizer"]
