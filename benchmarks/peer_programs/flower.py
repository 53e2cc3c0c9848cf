"""Flower (https://flower.ai): its simulation on Ray, one virtual node a client of a cohort, its FedAvg strategy."""

from __future__ import annotations

import os
import traceback

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

from benchmarks.peer_programs.answering import Average, Tower, prepared, rounds_of, serve

client_app = ClientApp()


@client_app.train()  # type: ignore[untyped-decorator]
def visit(message: Message, context: Context) -> Message:
    """One client's epoch: which client a node is depends on the round."""
    torch.set_num_threads(1)
    config = message.content["config"]
    rounds = rounds_of(str(config["data"]))
    place = int(config["server-round"]) * rounds.clients.shape[1] + int(context.node_config["partition-id"])
    tower = Tower(message.content["arrays"].to_torch_state_dict())
    optimizer = torch.optim.SGD(tower.parameters(), lr=rounds.lr)
    vectors, items = rounds.examples(place)
    for first in range(0, len(vectors), rounds.batch_size):
        here = slice(first, first + rounds.batch_size)
        optimizer.zero_grad()
        tower.loss(vectors[here], items[here]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    answer = {
        "arrays": ArrayRecord(tower.state_dict()),
        "metrics": MetricRecord({"num-examples": len(vectors)}),
    }
    return Message(content=RecordDict(answer), reply_to=message)


def main() -> None:
    """Wait for rounds."""
    path = prepared()
    rounds = rounds_of(path)
    nodes = rounds.clients.shape[1]
    server_app = ServerApp()

    @server_app.main()  # type: ignore[untyped-decorator]
    def lead(grid: Grid, context: Context) -> None:
        strategy = FedAvg(fraction_train=1.0, fraction_evaluate=0.0, min_train_nodes=nodes, min_available_nodes=nodes)
        initial = ArrayRecord(dict(rounds.initial))

        def train(number: int) -> Average:
            # What FedAvg.start() does in a round, which cannot be stopped and timed in between.
            messages = strategy.configure_train(number, initial, ConfigRecord({"data": path}), grid)
            arrays, _ = strategy.aggregate_train(number, grid.send_and_receive(messages))
            assert arrays is not None
            after = arrays.to_torch_state_dict()
            return {name: (after[name] - value).numpy() for name, value in rounds.initial.items()}

        serve(train)
        os._exit(0)  # the simulation's own way out waits for seconds

    # A Ray of its own, whatever else runs on this machine.
    resources = {
        "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        "init_args": {"address": "local", "num_cpus": os.cpu_count()},
    }
    # By its module's name: Ray's workers would get __main__ as a copy with every message, its cache empty.
    from benchmarks.peer_programs import flower

    try:
        run_simulation(server_app, flower.client_app, nodes, backend_config=resources)
    except RuntimeError:
        traceback.print_exc()
        os._exit(1)  # the server's thread would wait for nodes for ever


if __name__ == "__main__":
    main()
