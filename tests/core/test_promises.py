"""Promises are awake: parts that are broken on purpose, each in one way, and the promise that has to notice."""

from __future__ import annotations

import re

import pytest

pytest_plugins = ["pytester"]

HEAD = """
from collections.abc import Mapping
from dataclasses import dataclass, replace
import numpy as np
import torch
from click import Group, Option, command
from fedtower.core.cohort import Cohort
from fedtower.core.errors import UpdateError
from fedtower.core.hooks import hookimpl
from fedtower.core.jagged import Encoded
from fedtower.core.recipe import parse_recipe
from fedtower.core.testing import examples
from fedtower.core.testing.aggregator import AggregatorPromises
from fedtower.core.testing.command import CommandPromises
from fedtower.core.testing.deadline import DeadlinePromises
from fedtower.core.testing.download import DownloadPromises
from fedtower.core.testing.observer import ObserverPromises
from fedtower.core.testing.recipe import RecipePromises
from fedtower.core.testing.sampler import SamplerPromises
from fedtower.core.testing.server_optimizer import ServerOptimizerPromises
from fedtower.core.testing.transform import TransformPromises
from fedtower.core.testing.transport import TransportPromises
from fedtower.core.updates import Updates, stack
from fedtower.plugins.aggregators.fedavg import FedAvg
from fedtower.plugins.deadlines.adaptive import Adaptive
from fedtower.plugins.downloads.quantize import Quantize
from fedtower.plugins.datasets.synthetic import Synthetic, SyntheticPopulation
from fedtower.plugins.models.dssm.model import DSSM, UserTower
from fedtower.plugins.runtimes.torch_loop.runtime import Loop, TorchLoop
from fedtower.plugins.samplers.uniform import Uniform
from fedtower.plugins.server_optimizers.adam import Adam
from fedtower.plugins.transforms.clip import Clip
from fedtower.plugins.transports.in_process import InProcess
from fedtower.plugins.transports.virtual_clock.transport import VirtualClock, VirtualLine
from fedtower.recsys.attacks import Attack
from fedtower.recsys.testing.attack import AttackPromises
from fedtower.recsys.testing.dataset import DatasetPromises
from fedtower.recsys.testing.model import ModelPromises
from fedtower.recsys.testing.runtime import RuntimePromises

class Packing:
    # Sends each delta as its bytes; nothing is wrong with it.
    strict = True
    def state(self, plan): return {}
    def finish(self, total, cohort): return total
    def on_client(self, updates, state, draws):
        encoded = {n: Encoded.of("bytes", d.shape[1:], [one.tobytes() for one in d]) for n, d in updates.dense.items()}
        return replace(updates, dense={}, encoded=encoded), state
    def decode(self, block):
        return replace(block, dense={n: self.unpacked(part) for n, part in block.encoded.items()}, encoded={})
    def unpacked(self, part):
        size = 4 * int(np.prod(part.shape))
        if self.strict and np.any(np.diff(part.offsets) != size):
            raise UpdateError("cut")
        whole = [part.part(c).tobytes().ljust(size, b"0") for c in range(len(part.offsets) - 1)]
        return np.stack([np.frombuffer(one, np.float32).reshape(part.shape) for one in whole])
"""

MUTANTS = {
    # sampler
    "Favourites(SamplerPromises)": (
        "def make(): return type('S', (Uniform,), {'sample': lambda s, r, p, d:"
        " Cohort(r, np.arange(min(p, 3)), p)})(3)",
        {"everyone_takes_part_sooner_or_later", "cohorts_change_from_round_to_round"},
    ),
    "Counting(SamplerPromises)": (
        """
        def make():
            class S:
                calls = 0
                def sample(self, round, population, draws):
                    self.calls += 1
                    return Uniform(3).sample(self.calls, population, draws)
            return S()
        """,
        {"earlier_rounds_do_not_matter"},
    ),
    # aggregator
    "Rowless(AggregatorPromises)": (
        """
        class make(FedAvg):
            def fold(self, blocks, state):
                total, state = super().fold(blocks, state)
                return replace(total, rows={}), state
        """,
        {"nothing_that_is_given_is_lost", "a_row_is_folded_as_a_parameter_is"},
    ),
    "Floats(AggregatorPromises)": (
        """
        class make(FedAvg):
            def fold(self, blocks, state):
                blocks = list(blocks)
                total, state = super().fold(blocks, state)
                cohort = stack(blocks)
                sums = {n: np.add.reduce((d.T * cohort.weights.astype(np.float32)).T, axis=0, keepdims=True)
                        for n, d in cohort.dense.items()}
                means = {n: (s / np.float32(cohort.weights.sum())).astype(np.float32) for n, s in sums.items()}
                return replace(total, dense=means), state
        """,
        {"the_order_of_arrival_changes_no_bit"},
    ),
    "Last(AggregatorPromises)": (
        """
        class make:
            def fold(self, blocks, state):
                return list(blocks)[-1].slice(0, 1), state
        """,
        {"the_width_of_blocks_changes_no_bit", "nothing_to_fold_is_refused"},
    ),
    "Trusting(AggregatorPromises)": (
        """
        class make(FedAvg):
            def fold(self, blocks, state):
                cohort = stack(blocks)
                total, state = super().fold([replace(cohort, dense={n: np.nan_to_num(d, posinf=0, neginf=0)
                    for n, d in cohort.dense.items()}, rows={})], state)
                bad = {n: np.where(np.isfinite(cohort.dense[n]).all(), t, np.nan).astype(np.float32)
                    for n, t in total.dense.items()}
                return replace(total, dense=bad), state
        """,
        {"what_is_not_finite_never_reaches_the_total"},
    ),
    "Summing(AggregatorPromises)": (
        """
        class make(FedAvg):
            def fold(self, blocks, state):
                total, state = super().fold(blocks, state)
                return replace(total, dense={n: d * total.weights[0].astype(np.float32)
                    for n, d in total.dense.items()}), state
        """,
        {
            "a_single_client_is_returned_as_it_is",
            "the_unit_of_weights_does_not_matter",
            "whoever_is_alone_is_returned_as_it_is",
        },
    ),
    "Unsorted(AggregatorPromises)": (
        # Right for deltas of the size that the other tests have.
        """
        class make(FedAvg):
            def fold(self, blocks, state):
                blocks = [block for block in blocks if len(block)]
                total, state = super().fold(blocks, state)
                last = float(blocks[-1].dense["scale"][-1])
                drift = np.float32(1e-7 * last if abs(last) > 300 else 0)
                return replace(total, dense={n: d * (1 + drift) for n, d in total.dense.items()}), state
        """,
        {"order_and_width_change_no_bit_of_any_cohort"},
    ),
    "Saturating(AggregatorPromises)": (
        """
        class make(FedAvg):
            def fold(self, blocks, state):
                total, state = super().fold(blocks, state)
                return replace(total, dense={n: np.clip(d, -5, 5) for n, d in total.dense.items()}), state
        """,
        {"a_scale_is_followed", "whoever_is_alone_is_returned_as_it_is"},
    ),
    "Prejudiced(AggregatorPromises)": (
        """
        class make(FedAvg):
            def fold(self, blocks, state):
                total, state = super().fold(blocks, state)
                rows = {t: replace(p, row_deltas=np.sign(p.row_deltas) * np.abs(p.row_deltas).astype(np.float32) ** 2)
                    for t, p in total.rows.items()}
                return replace(total, rows=rows), state
        """,
        {"a_row_is_folded_as_a_parameter_is"},
    ),
    # server optimiser
    "Rateless(ServerOptimizerPromises)": (
        """
        class make(Adam):
            def update(self, parameters, delta, state, lr):
                return super().update(parameters, delta, state, np.sqrt(lr))
        """,
        {"twice_the_rate_is_twice_the_step"},
    ),
    "Alphabetical(ServerOptimizerPromises)": (
        """
        class make(Adam):
            def update(self, parameters, delta, state, lr):
                first = next(iter(parameters))
                return super().update(parameters, {**delta, first: 2 * delta[first]}, state, lr)
        """,
        {"the_order_of_names_changes_no_bit"},
    ),
    "Dividing(ServerOptimizerPromises)": (
        """
        class make(Adam):
            def update(self, parameters, delta, state, lr):
                moved = {n: np.asarray(p + lr * d / np.sqrt(np.abs(d)), np.float32) for (n, p), d in
                    zip(parameters.items(), delta.values())}
                return moved, state
        """,
        {"every_step_is_finite"},
    ),
    "Uphill(ServerOptimizerPromises)": (
        """
        class make(Adam):
            def update(self, parameters, delta, state, lr):
                return super().update(parameters, {n: -d for n, d in delta.items()}, state, lr)
        """,
        {"the_first_step_follows_the_delta", "a_bowl_is_descended"},
    ),
    "Forgetful(ServerOptimizerPromises)": (
        """
        def make():
            class S(Adam):
                def update(self, parameters, delta, state, lr):
                    object.__setattr__(self, 'calls', getattr(self, 'calls', 0) + 1)
                    return super().update(parameters, delta, state, lr / self.calls)
            return S()
        """,
        {"a_state_can_be_kept_and_goes_on_alike"},
    ),
    # transform
    "Mixing(TransformPromises)": (
        """
        def make():
            class T(Clip):
                def on_client(self, updates, state, draws):
                    mean = {n: d - d.mean(axis=0, keepdims=True) for n, d in updates.dense.items()}
                    return replace(updates, dense=mean), state
            return T(norm=1.0)
        """,
        {"who_else_is_in_the_block_does_not_matter"},
    ),
    "Scribbling(TransformPromises)": (
        """
        def make():
            class T(Clip):
                def on_client(self, updates, state, draws):
                    for delta in updates.dense.values():
                        delta *= 0.5
                    return updates, state
            return T(norm=1.0)
        """,
        {"the_same_draws_give_the_same_and_inputs_are_left_alone"},
    ),
    "Credulous(TransformPromises)": (
        "def make(): return type('T', (Packing,), {'strict': False})()",
        {"encoded_bytes_that_were_cut_are_refused"},
    ),
    "Gullible(TransformPromises)": (
        """
        class make(Packing):
            def unpacked(self, part):
                whole = super().unpacked(part)
                if not np.isfinite(whole).all() or np.abs(whole).max(initial=0.0) > 4:
                    raise KeyError("such large numbers were not expected")
                return whole
        """,
        {
            "bytes_that_nobody_sent_are_refused_or_have_the_right_shape",
            "neither_order_nor_the_width_of_blocks_changes_a_bit",
            "an_update_that_is_not_finite_is_still_not_when_it_is_decoded",
        },
    ),
    "Jittery(TransformPromises)": (
        """
        class make(Packing):
            def on_client(self, updates, state, draws):
                place = np.arange(len(updates), dtype=np.float32)
                dense = {n: (d.T * (1 + 1e-7 * place)).T.astype(np.float32) for n, d in updates.dense.items()}
                return super().on_client(replace(updates, dense=dense), state, draws)
        """,
        {
            "who_else_is_in_the_block_does_not_matter",
            "neither_order_nor_the_width_of_blocks_changes_a_bit",
        },
    ),
    "Soothing(TransformPromises)": (
        """
        class make(Packing):
            def unpacked(self, part):
                return np.nan_to_num(super().unpacked(part), posinf=0.0, neginf=0.0)
        """,
        {"an_update_that_is_not_finite_is_still_not_when_it_is_decoded"},
    ),
    "Metricless(TransformPromises)": (
        """
        class make(Packing):
            def decode(self, block):
                return replace(super().decode(block), metrics={})
        """,
        {"names_shapes_clients_and_weights_stay"},
    ),
    "Halfway(TransformPromises)": (
        """
        class make(Packing):
            def decode(self, block):
                return replace(super().decode(block), dense={}, encoded=block.encoded)
        """,
        {"names_shapes_clients_and_weights_stay"},
    ),
    # transport
    "Twice(TransportPromises)": (
        """
        class make(InProcess):
            def exchange(self, plan, cohort, visit, draws, deadline):
                for block in super().exchange(plan, cohort, visit, draws, deadline):
                    yield block
                    yield block
        """,
        {"what_comes_back_is_what_the_clients_sent"},
    ),
    "Silent(TransportPromises)": (
        """
        class make(InProcess):
            def exchange(self, plan, cohort, visit, draws, deadline):
                return iter(())
        """,
        {"somebody_answers"},
    ),
    "Timeless(TransportPromises)": (
        """
        class Stuck(VirtualLine):
            def begin(self, state):
                super().begin({})
            def spent(self, counted):
                spent = super().spent(counted)
                return replace(spent, wasted=spent.seconds)
        class make(VirtualClock):
            def over(self, costs, sampler): return Stuck(self, costs, sampler)
        """,
        {
            "a_transport_with_a_time_of_its_own_goes_on_from_a_saved_one",
            "what_counts_is_no_waste_of_a_transport_that_knows_what_devices_spend",
        },
    ),
    "Overdue(TransportPromises)": (
        """
        class Tardy(VirtualLine):
            def exchange(self, plan, cohort, visit, draws, deadline):
                return super().exchange(plan, cohort, visit, draws, None)
        class make(VirtualClock):
            def over(self, costs, sampler): return Tardy(self, costs, sampler)
        """,
        {"time_of_its_own_never_goes_back_nor_beyond_the_deadline"},
    ),
    # deadline
    "Secretive(DeadlinePromises)": (
        """
        class make(Adaptive):
            def learn(self, state, arrivals):
                return super().learn(state, arrivals)[0], ""
        """,
        {"a_change_is_said_and_nothing_else_is"},
    ),
    "Remembering(DeadlinePromises)": (
        """
        def make():
            class D(Adaptive):
                def learn(self, state, arrivals):
                    object.__setattr__(self, 'calls', getattr(self, 'calls', 0) + 1)
                    return {**state, "seconds": np.array(1.0 + self.calls)}, "another round"
            return D()
        """,
        {"it_goes_on_from_a_saved_state"},
    ),
    "Scrawling(DeadlinePromises)": (
        """
        class make(Adaptive):
            def learn(self, state, arrivals):
                state["seconds"] *= 1.5
                return state, "longer"
        """,
        {"what_goes_in_is_left_alone"},
    ),
    "Hoarding(DeadlinePromises)": (
        """
        class make(Adaptive):
            def learn(self, state, arrivals):
                state, why = super().learn(state, arrivals)
                return {**state, "all": np.append(state.get("all", np.zeros(0)), arrivals.ended)}, why
        """,
        {"the_state_can_be_saved_and_does_not_grow_forever"},
    ),
    "Impatient(DeadlinePromises)": (
        """
        class make(Adaptive):
            def limit(self, state): return super().limit(state) - 20.0
        """,
        {"a_round_always_has_some_time", "rounds_in_which_nobody_was_asked_or_heard_are_no_error"},
    ),
    # observer
    "Clumsy(ObserverPromises)": (
        """
        class make:
            @hookimpl
            def round_finished(self, report):
                report.no_such_thing
        """,
        {"it_survives_a_whole_run"},
    ),
    "Deaf(ObserverPromises)": ("class make: pass", {"it_has_hooks"}),
    "Unreasonable(ObserverPromises)": (
        """
        class make:
            @hookimpl
            def stop_run(self, report):
                return True
        """,
        {"it_decides_with_what_the_round_can_use"},
    ),
    # command and recipe
    "Wordless(CommandPromises)": (
        "def make(): return command('x')(lambda: None)",
        {"help_says_what_it_does_and_shows_an_example"},
    ),
    "Garrulous(CommandPromises)": (
        """
        def make():
            inner = command("inner", help="Say in very many words indeed what this one does: fedtower outer inner.")
            says = "Say what is there.\\n\\n\\b\\nExample:\\n  fedtower outer " + 80 * "x"
            return Group("outer", commands=[inner(lambda: None)], help=says)
        """,
        {"help_fits_a_terminal_and_is_not_cut"},
    ),
    "Foreign(RecipePromises)": (
        "def make(): return parse_recipe({**examples.recipe().to_dict(), 'aggregator': {'name': 'unheard_of'}})",
        {"every_part_is_installed_and_accepts_its_settings"},
    ),
    # dataset
    "Crowded(DatasetPromises)": (
        """
        class Small(Synthetic):
            def load(self, *, draws, progress):
                class P(SyntheticPopulation):
                    def events(self, clients):
                        events = super().events(clients)
                        return replace(events, items=np.minimum(events.items, 3), times=events.times[::-1].copy())
                return P(self, draws)
        def make(): return Small(users=30, items=300, mean_events=40.0)
        """,
        {"a_client_has_no_item_twice", "events_are_in_time_order_and_of_known_items"},
    ),
    # model
    "Seer(ModelPromises)": (
        """
        class Tower(UserTower):
            def represent(self, history, target, user):
                return super().represent(history, target + 1, user)
        class make(DSSM):
            def declare(self, schema, generator):
                declared = super().declare(schema, generator)
                declared.shared.__class__ = Tower
                return declared
        """,
        {"only_what_came_before_the_target_is_looked_at"},
    ),
    "Lucky(ModelPromises)": (
        """
        class make(DSSM):
            def declare(self, schema, generator):
                return super().declare(schema, torch.Generator().manual_seed(int(torch.randint(1 << 30, ()))))
        """,
        {"it_starts_from_the_generator_alone"},
    ),
    # runtime
    "Hasty(RuntimePromises)": (
        """
        class Short(Loop):
            def train(self, plan, work):
                return super().train(plan, replace(work, steps=np.minimum(work.steps, 1)))
        class make(TorchLoop):
            def open(self, model, local):
                return Short(super().open(model, local).step)
        """,
        {"it_agrees_with_the_obvious_loop"},
    ),
    "Drifting(RuntimePromises)": (
        """
        class make(TorchLoop):
            def open(self, model, local):
                loop = super().open(model, local)
                return Loop(replace(loop.step, control=False, proximal=0.0))
        """,
        {"control_variates_correct_every_step", "every_optimizer_is_the_one_of_that_name"},
    ),
    # attack
    "Idle(AttackPromises)": ("make = Attack", {"it_does_something"}),
    "Shouting(AttackPromises)": (
        """
        class make(Attack):
            def forged(self, events, market):
                return np.full(len(events.items), market.promoted)
            def sent(self, updates, attackers):
                return updates.scaled(np.full(len(updates), 1e39))
        """,
        {
            "the_last_two_events_are_not_among_the_others",
            "it_sends_updates_of_the_same_form_and_leaves_the_others_alone",
        },
    ),
    "Sociable(AttackPromises)": (
        """
        class make(Attack):
            def forged(self, events, market):
                return np.roll(events.items, 1) + 1
            def relabelled(self, work, attackers):
                return replace(work, slots={name: slots[:, :, ::-1] for name, slots in work.slots.items()})
        """,
        {
            "what_it_makes_up_are_as_many_items_of_the_catalogue",
            "what_it_makes_up_does_not_depend_on_who_else_is_asked_for",
            "it_labels_batches_of_the_same_form_and_rows_and_leaves_the_others_alone",
        },
    ),
    "Defacing(AttackPromises)": (
        """
        class make(Attack):
            def sent(self, updates, attackers):
                for delta in updates.dense.values():
                    delta[attackers] = np.random.default_rng().normal()
                return updates
        """,
        {"nothing_is_written_into_what_it_is_given", "the_same_seed_gives_the_same_bits"},
    ),
    # download
    "Flat(DownloadPromises)": (
        """
        class make(Quantize):
            def decode(self, message, shape, held): return super().decode(message, shape, held).reshape(-1)
        """,
        {"every_parameter_has_a_message_and_keeps_its_shape"},
    ),
    "Opposite(DownloadPromises)": (
        """
        class make(Quantize):
            def decode(self, message, shape, held): return -super().decode(message, shape, held)
        """,
        {"devices_come_no_further_away"},
    ),
    "Positional(DownloadPromises)": (
        """
        class make(Quantize):
            def encode(self, wanted, held, round, draws):
                return {name: Quantize().encode({name: value}, held, place, draws)[name]
                        for place, (name, value) in enumerate(wanted.items())}
        """,
        {"the_same_draws_give_the_same_bytes_in_any_order_of_names_and_inputs_are_left_alone"},
    ),
    "Relative(DownloadPromises)": (
        """
        class make(Quantize):
            def decode(self, message, shape, held):
                value = super().decode(message, shape, held)
                with np.errstate(all="ignore"):
                    return value * (np.abs(value).max() / np.abs(value).max())
        """,
        {"parameters_that_stand_still_stay_finite"},
    ),
    "Unchecked(DownloadPromises)": (
        """
        class make(Quantize):
            def decode(self, message, shape, held):
                return np.frombuffer(message[4:].tobytes(), np.int8).astype(np.float32).reshape(shape)
        """,
        {
            "bytes_that_were_cut_or_added_are_refused",
            "a_shape_that_the_bytes_do_not_fill_is_refused_before_room_is_made",
        },
    ),
    "Lenient(DownloadPromises)": (
        """
        def make():
            class D(Quantize):
                def decode(self, message, shape, held):
                    try: return super().decode(message, shape, held)
                    except UpdateError: return np.zeros(1, np.float32)
            return D(4)
        """,
        {"bytes_that_nobody_sent_are_refused_or_have_the_right_shape"},
    ),
}


def test_every_mutant_is_caught_by_the_promise_it_breaks(pytester: pytest.Pytester) -> None:
    source = HEAD
    for title, (body, _) in MUTANTS.items():
        lines = body.strip("\n").splitlines()
        margin = min(len(line) - len(line.lstrip()) for line in lines if line.strip())
        made = "\n".join(line[margin:] for line in lines)
        source += f"\n{made}\nclass Test{title}:\n    make = staticmethod(make)\n"
    source += "\nclass TestSound(TransformPromises):\n    make = Packing\n"
    pytester.makepyfile(source)
    result = pytester.runpytest("-q", "-p", "no:cacheprovider", "-rfE", "--tb=no", "-W", "ignore")
    broken: dict[str, set[str]] = {}
    for name, promise in re.findall(r"(?:FAILED|ERROR) \S+::Test(\w+)::test_(\w+)", str(result.stdout)):
        broken.setdefault(name, set()).add(promise)
    for title, (_, promises) in MUTANTS.items():
        name = title.partition("(")[0]
        assert promises <= broken.get(name, set()), f"{name} broke only {broken.get(name)}"
    assert "Sound" not in broken, "and what is sound breaks none"
