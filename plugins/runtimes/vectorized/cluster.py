"""A crew's workers as actors of a Ray cluster (https://docs.ray.io), of one machine or of many.

What goes over the wire: model and data once, as one object of Ray's store, which a node fetches once and its workers
read in place; the shared parameters once a round; then, for each block, who is to be visited, the rows they need, and
their updates.
"""

from __future__ import annotations

import logging
import os
import pickle
import sys
from contextlib import suppress
from typing import Any

import torch

from fedtower.core.client import ClientData
from fedtower.core.discovery import LOCAL_FILE
from fedtower.core.errors import FedtowerError, MissingDependency
from fedtower.core.offers import HOST, how_to_install, reason
from fedtower.core.plan import LocalSettings, Plan
from fedtower.core.runtime import RuntimeFactory
from fedtower.plugins.runtimes.vectorized.crew import Bench, Message, Worker, WorkerDied, WorkerFailed, unsendable
from fedtower.recsys.models import Declared

# A worker begins within seconds where there is a core for it; a cluster that grows on demand takes its time.
PATIENCE_SECONDS = 180.0


class ClusterError(FedtowerError):
    """The Ray cluster of a recipe cannot be reached, or has no room for the workers."""


class Cluster:
    """Hires workers on the cluster at ``address``; nothing is connected before the first one."""

    def __init__(
        self, address: str, workers: int, factory: RuntimeFactory, model: Declared, local: LocalSettings
    ) -> None:
        self._address, self._workers = address, workers
        self._runtime = (factory, model, local)
        self._ray: Any = None
        self._handed: Any = None
        self._plan: Plan | None = None
        self._sent: Any = None

    def hire(self, data: ClientData | None, number: int) -> Worker:
        """A worker on one core somewhere in the cluster."""
        if self._handed is None:
            self._ray = connect(self._address, self._workers)
            self._handed = self._hand_over(data)
        return Remote(self, number, self._ray.remote(num_cpus=1)(Actor).remote(self._handed, number))

    def sent(self, plan: Plan) -> Any:
        """The plan in Ray's store: put there once, however many blocks and workers it is for."""
        if plan is not self._plan:
            self._plan, self._sent = plan, self.ray.put(pickle.dumps(plan, protocol=5))
        return self._sent

    @property
    def ray(self) -> Any:
        """Ray, connected."""
        return self._ray

    def _hand_over(self, data: ClientData | None) -> Any:
        # No other machine can import a project's own plugins: their code travels with the model.
        mine = sys.modules.get(LOCAL_FILE.removesuffix(".py"))
        if mine is not None:
            self._ray.cloudpickle.register_pickle_by_value(mine)
        try:
            return self._ray.put((*self._runtime, data))
        except (TypeError, pickle.PicklingError) as error:
            raise ClusterError(
                f"the model or the data cannot be sent to workers on a cluster: {reason(error)}; what a plugin makes "
                f"must survive pickle, or leave runtime.cluster empty, and the workers are processes of this machine"
            ) from error


class Actor:
    """What becomes an actor: a :class:`Bench` that takes and gives bytes.

    Arrays that Ray itself carries come out read-only, which torch does not like; those in bytes are the reader's own.
    """

    def __init__(self, handed: tuple[RuntimeFactory, Declared, LocalSettings, ClientData | None], number: int) -> None:
        torch.set_num_threads(1)
        factory, model, local, data = handed
        self._bench = Bench(factory.open(model, local), data, f"worker {number} of a Ray cluster")

    def ready(self) -> int:
        """The number of its process."""
        return os.getpid()

    def answer(self, told: str, plan: bytes, given: bytes) -> bytes:
        """The answer to a message."""
        answer = self._bench.answer(told, pickle.loads(plan), pickle.loads(given))
        try:
            return pickle.dumps(answer, protocol=5)
        except (pickle.PicklingError, TypeError, AttributeError):  # an exception that does not travel
            return pickle.dumps(unsendable(answer), protocol=5)


class Remote:
    """A worker on a cluster, as the crew sees it."""

    def __init__(self, cluster: Cluster, number: int, actor: Any) -> None:
        self._cluster, self._number, self._actor = cluster, number, actor
        self._beginning: Any = actor.ready.remote()
        self._answer: Any = None
        self.pid = 0

    def send(self, message: Message) -> None:
        """Let it work."""
        told, plan, given = message
        self._answer = self._actor.answer.remote(told, self._cluster.sent(plan), pickle.dumps(given, protocol=5))

    def receive(self) -> Any:
        """Its answer, or the exception it ran into."""
        ray = self._cluster.ray
        self._begin()
        try:
            return pickle.loads(ray.get(self._answer))
        except ray.exceptions.RayTaskError as error:
            raise WorkerFailed(f"worker {self._number} on the cluster failed: {reason(error)}") from error
        except ray.exceptions.RayError as error:
            raise WorkerDied(
                f"worker {self._number} on the cluster (process {self.pid}) ended in the middle of its work: "
                f"{reason(error)}; `fedtower resume` goes on from the last checkpoint"
            ) from error

    def close(self) -> None:
        """End it."""
        with suppress(Exception):  # whatever became of the cluster, there is nothing left to end
            if self._cluster.ray.is_initialized():  # or kill() would begin a new one
                self._cluster.ray.kill(self._actor)

    def _begin(self) -> None:
        """Wait until it is there."""
        if self._beginning is None:
            return
        ray = self._cluster.ray
        try:
            self.pid = ray.get(self._beginning, timeout=PATIENCE_SECONDS)
        except ray.exceptions.GetTimeoutError as error:
            has, free = (each.get("CPU", 0) for each in (ray.cluster_resources(), ray.available_resources()))
            raise ClusterError(
                f"worker {self._number} found no core in the cluster within {PATIENCE_SECONDS:g} s: it has {has:g} "
                f"cores, of which {free:g} are free; lower runtime.workers or wait for others to finish"
            ) from error
        except ray.exceptions.RayError as error:
            raise ClusterError(
                f"worker {self._number} could not begin on the cluster: {reason(error)}; every node needs this "
                f"version of fedtower, and the plugins of this run"
            ) from error
        self._beginning = None


def connect(address: str, workers: int) -> Any:
    """Ray, connected to the cluster at ``address``, or to one of its own on this machine's loopback.

    ``ray``: the cluster that RAY_ADDRESS names, else ``local``; ``local``: one that is started here and ends with this
    process; ``auto``: one that runs on this machine; ``host:port`` or ``ray://host:port``: that one. A Ray that this
    process is connected to already is used as it is.

    Raises:
        MissingDependency: Ray is not installed.
        ClusterError: there is no such cluster.
    """
    local = address == "local" or (address == "ray" and not os.environ.get("RAY_ADDRESS"))
    # Ray reads these when it is imported, and whoever has set them has decided; else: it would send usage data to its
    # makers, and a cluster of one machine would listen on all its networks.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if local:
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    try:
        import ray
    except ModuleNotFoundError as error:
        raise MissingDependency(
            f"runtime.cluster = {address!r} needs ray, which is not installed; {how_to_install('ray', HOST)}"
        ) from error
    if ray.is_initialized():
        return ray
    where = {"address": "local", "num_cpus": workers} if local else {"address": None if address == "ray" else address}
    try:
        ray.init(**where, include_dashboard=False if local else None, logging_level=logging.ERROR)
    except Exception as error:  # whatever lies between here and a cluster
        raise ClusterError(
            f"no Ray cluster answers at runtime.cluster = {address!r}: {reason(error)}. `ray start --head` begins one; "
            f"one that asks for a token is reached with RAY_AUTH_MODE=token in the environment; "
            f'runtime.cluster = "local" needs none'
        ) from error
    return ray
