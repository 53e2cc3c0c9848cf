"""MLflow: a run's recipe and figures as an MLflow run, in files of the run's folder or on a tracking server.

Without ``tracking_uri`` nothing leaves the machine, and the files are those of MLflow's file store; to look at them:
``MLFLOW_ALLOW_FILE_STORE=true mlflow ui --backend-store-uri RUN/mlruns``.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedtower.core.hooks import hookimpl
from fedtower.core.recipe import Recipe
from fedtower.core.round import RoundReport
from fedtower.core.tracking import evaluation_figures, round_figures
from fedtower.recsys.evaluation import Evaluation

# MLflow reads these when it is imported, or when it opens a store. Whoever has set them has decided; else: importing
# it sends usage data to its makers; its file store, though kept up, has to be asked for; and a run does not wait
# minutes for a server.
for _name, _value in {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ALLOW_FILE_STORE": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}.items():
    os.environ.setdefault(_name, _value)

from mlflow import MlflowClient  # noqa: E402
from mlflow.entities import Metric, Param  # noqa: E402

# A store takes at most so many parameters in one call.
_PARAMS_A_CALL = 100


@dataclass(eq=False)
class MLflow:
    """The recipe as parameters, and each figure of a round or an evaluation as a metric at its round.

    Names are changed where MLflow forbids a character: ``HR@10`` becomes ``HR_at_10``. A resumed run goes on in the
    same MLflow run, whose id is in ``mlflow-run.txt`` of the run's folder. After a first failure (the server is gone)
    the tracker says so once and is silent.
    """

    tracking_uri: str = field(default="", metadata={"help": "the tracking server; empty: files in the run's folder"})
    experiment: str = field(default="fedtower", metadata={"help": "the MLflow experiment that the run belongs to"})
    _client: MlflowClient | None = field(default=None, init=False, repr=False)
    _run_id: str = field(default="", init=False, repr=False)

    @hookimpl
    def run_started(self, recipe: Recipe, folder: Path) -> None:
        client = MlflowClient(tracking_uri=self.tracking_uri or (folder / "mlruns").resolve().as_uri())
        named = folder / "mlflow-run.txt"
        if named.is_file():
            self._run_id = named.read_text("utf-8").strip()
            client.update_run(self._run_id, status="RUNNING")
        else:
            known = client.get_experiment_by_name(self.experiment)
            experiment = known.experiment_id if known else client.create_experiment(self.experiment)
            self._run_id = client.create_run(experiment, run_name=folder.name).info.run_id
            named.write_text(self._run_id + "\n", "utf-8")
            params = [Param(key, value) for key, value in _flat(recipe.to_dict())]
            for start in range(0, len(params), _PARAMS_A_CALL):
                client.log_batch(self._run_id, params=params[start : start + _PARAMS_A_CALL])
        self._client = client

    @hookimpl
    def round_finished(self, report: RoundReport) -> None:
        self._log(report.round, round_figures(report))

    @hookimpl
    def evaluated(self, round: int, subject: str, evaluation: Evaluation) -> None:
        self._log(round, evaluation_figures(subject, evaluation))

    @hookimpl
    def run_finished(self) -> None:
        if self._client is not None:
            self._client.set_terminated(self._run_id)

    def _log(self, step: int, figures: Mapping[str, float]) -> None:
        if self._client is None:
            return
        now = int(time.time() * 1000)
        try:
            self._client.log_batch(
                self._run_id, metrics=[Metric(_allowed(name), value, now, step) for name, value in figures.items()]
            )
        except Exception:
            self._client = None
            raise


def _allowed(name: str) -> str:
    """``name`` with only the characters that MLflow takes.

    >>> _allowed("test (sampled, 99 negatives)/HR@10")
    'test sampled 99 negatives/HR_at_10'
    """
    return re.sub(r"[^\w\-./ ]", "", name.replace("@", "_at_"))


def _flat(values: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Dotted keys and their values, as overrides of a recipe are written.

    >>> list(_flat({"seed": 1, "transforms": [{"name": "clip"}]}))
    [('seed', '1'), ('transforms.0.name', 'clip')]
    """
    inner = values.items() if isinstance(values, Mapping) else enumerate(values) if isinstance(values, list) else None
    if inner is None:
        yield path, str(values)
        return
    for key, value in inner:
        yield from _flat(value, f"{path}.{key}" if path else str(key))
