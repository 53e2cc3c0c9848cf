"""What every transform promises."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fedtower.core.draws import Draws
from fedtower.core.errors import UpdateError
from fedtower.core.jagged import Encoded
from fedtower.core.testing import examples
from fedtower.core.testing.promises import Promises, Untouched, assert_close, assert_same_bits
from fedtower.core.transform import States, Transform
from fedtower.core.updates import Updates, stack


class TransformPromises(Promises):
    """``make`` gives a transform."""

    def visit(self, updates: Updates, state: States | None = None, seed: int = 7) -> tuple[Updates, States]:
        """The client side, from a first visit's state of zeros unless another is given."""
        transform: Transform = self.made()
        return transform.on_client(updates, self.first_state(len(updates)) if state is None else state, Draws(seed))

    def first_state(self, clients: int) -> States:
        """What ``clients`` clients keep before their first visit."""
        transform: Transform = self.made()
        return {
            name: np.zeros((clients, *shape), dtype=np.float32)
            for name, shape in transform.state(examples.plan()).items()
        }

    @pytest.mark.parametrize("rows", [True, False], ids=["with rows", "without rows"])
    def test_names_shapes_clients_and_weights_stay(self, rows: bool) -> None:
        updates = examples.updates(7, rows=rows)
        sent, _ = self.visit(updates)
        _assert_alike(self.made().decode(sent), updates)

    def test_a_state_keeps_its_names_and_shapes(self) -> None:
        before = self.first_state(7)
        _, after = self.visit(examples.updates(7))
        assert {name: value.shape for name, value in after.items()} == {n: v.shape for n, v in before.items()}
        assert all(value.dtype == np.float32 for value in after.values())

    def test_who_else_is_in_the_block_does_not_matter(self) -> None:
        updates = examples.updates(7)
        together, state = self.visit(updates)
        alone = [self.visit(updates.slice(i, i + 1)) for i in range(7)]
        assert_close(stack([sent for sent, _ in alone]), together)
        for name, value in state.items():
            assert_close(np.concatenate([kept[name] for _, kept in alone]), value, f"state {name!r}")

    def test_the_same_draws_give_the_same_and_inputs_are_left_alone(self) -> None:
        updates, state = examples.updates(7), self.first_state(7)
        with Untouched(updates, state):
            once = self.visit(updates, state)
        assert_same_bits(self.visit(updates, state), once)

    def test_a_second_visit_goes_on_from_the_kept_state(self) -> None:
        _, state = self.visit(examples.updates(7))
        second = examples.updates(7, round=2, seed=2)
        following = self.visit(second, state)
        assert_same_bits(self.visit(second, {name: value.copy() for name, value in state.items()}), following)

    def test_an_update_of_zeros_stays_finite(self) -> None:
        updates = examples.updates(7)
        zeros = replace(
            updates,
            dense={name: np.zeros_like(delta) for name, delta in updates.dense.items()},
            rows={t: replace(part, row_deltas=np.zeros_like(part.row_deltas)) for t, part in updates.rows.items()},
        )
        decoded = self.made().decode(self.visit(zeros)[0])
        assert all(np.all(np.isfinite(delta)) for delta in decoded.dense.values())
        assert all(np.all(np.isfinite(part.row_deltas)) for part in decoded.rows.values())

    def test_encoded_bytes_that_were_cut_are_refused(self) -> None:
        sent, _ = self.visit(examples.updates(7))
        for name, part in sent.encoded.items():
            whole = [part.part(client).tobytes() for client in range(7)]
            cut = Encoded.of(part.codec, part.shape, [*whole[:-1], whole[-1][:-1]])
            with pytest.raises(UpdateError):
                self.made().decode(replace(sent, encoded={**sent.encoded, name: cut}))

    @pytest.mark.parametrize("seed", range(5))
    def test_bytes_that_nobody_sent_are_refused_or_have_the_right_shape(self, seed: int) -> None:
        updates = examples.updates(2, seed=seed)
        sent, _ = self.visit(updates)
        draws, entries = Draws(seed), np.arange(1 + seed, dtype=np.int64)
        for name, part in sent.encoded.items():
            spoilt = part.payload.copy()
            spoilt[draws.integers(len(spoilt), f"place/{name}", entries)] = draws.integers(256, f"byte/{name}", entries)
            try:
                decoded = self.made().decode(
                    replace(sent, encoded={**sent.encoded, name: replace(part, payload=spoilt)})
                )
            except UpdateError:
                continue
            assert {n: d.shape for n, d in decoded.dense.items()} == {n: d.shape for n, d in updates.dense.items()}
            assert {t: r.row_deltas.shape[1:] for t, r in decoded.rows.items()} == {
                t: r.row_deltas.shape[1:] for t, r in updates.rows.items()
            }

    @pytest.mark.parametrize("seed", range(5))
    def test_neither_order_nor_the_width_of_blocks_changes_a_bit(self, seed: int) -> None:
        draws = Draws(seed)
        scale = np.float32(10.0 ** (draws.integers(40, "scale") - 20))
        updates = examples.updates(2 + int(draws.integers(6, "clients")), seed=seed)
        updates = replace(
            updates,
            dense={name: delta * scale for name, delta in updates.dense.items()},
            rows={t: replace(part, row_deltas=part.row_deltas * scale) for t, part in updates.rows.items()},
        )
        whole, _ = self.visit(updates)
        order = draws.permutation(len(updates), "order")
        cut = 1 + int(draws.integers(len(updates) - 1, "cut"))
        pieces = [self.visit(updates.pick(places))[0] for places in (order[:cut], order[cut:])]
        made = self.made()
        assert_same_bits(stack(made.decode(piece) for piece in pieces), made.decode(whole).pick(order))
        assert_same_bits(np.concatenate([piece.sizes for piece in pieces]), whole.pick(order).sizes)

    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    @pytest.mark.parametrize("rows", [True, False], ids=["with rows", "without rows"])
    def test_an_update_that_is_not_finite_is_still_not_when_it_is_decoded(self, rows: bool, bad: float) -> None:
        updates = examples.updates(3, rows=rows)
        for delta in updates.dense.values():
            delta[1] = bad
        for part in updates.rows.values():
            part.row_deltas[part.owners == 1] = bad
        decoded = self.made().decode(self.visit(updates)[0])
        for client in range(3):
            alone = decoded.slice(client, client + 1)
            arrays = [*alone.dense.values(), *(part.row_deltas for part in alone.rows.values())]
            assert all(np.isfinite(array).all() for array in arrays) == (client != 1)

    def test_decoding_leaves_its_block_alone(self) -> None:
        sent, _ = self.visit(examples.updates(7))
        with Untouched(sent):
            self.made().decode(sent)

    def test_a_finished_total_has_the_shape_of_the_total(self) -> None:
        block = examples.updates(1)
        total = replace(
            block,
            clients=None,
            rounds=None,
            rows={t: replace(part, row_weights=np.ones(len(part.row_ids))) for t, part in block.rows.items()},
        )
        with Untouched(total):
            finished = self.made().finish(total, examples.cohort())
        _assert_alike(finished, total)


def _assert_alike(got: Updates, wanted: Updates) -> None:
    """The same clients, weights, parameters, tables and metrics; values may be others, rows missing, metrics new."""
    assert not got.encoded, "what was encoded must be decoded"
    assert set(wanted.metrics) <= set(got.metrics)
    assert_same_bits((got.clients, got.weights), (wanted.clients, wanted.weights), "clients and weights")
    assert {name: delta.shape for name, delta in got.dense.items()} == {n: d.shape for n, d in wanted.dense.items()}
    assert all(delta.dtype == np.float32 for delta in got.dense.values())
    assert set(got.rows) == set(wanted.rows)
    for table, part in got.rows.items():
        assert set(part.row_ids.tolist()) <= set(wanted.rows[table].row_ids.tolist())
        assert part.row_deltas.shape[1:] == wanted.rows[table].row_deltas.shape[1:]
