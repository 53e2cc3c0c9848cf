"""What every server optimiser promises."""

from __future__ import annotations

import numpy as np

from fedtower.core.server import Parameters, ServerOptimizer
from fedtower.core.testing import examples
from fedtower.core.testing.promises import Promises, Untouched, assert_same_bits


class ServerOptimizerPromises(Promises):
    """``make`` gives a server optimiser."""

    parameters: Parameters = examples.plan(seed=1).parameters
    delta: Parameters = examples.plan(seed=2).parameters

    def test_names_shapes_and_types_stay(self) -> None:
        optimizer: ServerOptimizer = self.made()
        after, _ = optimizer.update(self.parameters, self.delta, optimizer.init(self.parameters), 0.1)
        assert set(after) == set(self.parameters)
        for name, value in after.items():
            assert isinstance(value, np.ndarray), f"{name} became a {type(value).__name__}; np.asarray keeps an array"
            assert value.shape == self.parameters[name].shape, name
            assert value.dtype == np.float32, name
            assert np.all(np.isfinite(value)), name

    def test_the_first_step_follows_the_delta(self) -> None:
        optimizer: ServerOptimizer = self.made()
        after, _ = optimizer.update(self.parameters, self.delta, optimizer.init(self.parameters), 0.1)
        for name, delta in self.delta.items():
            np.testing.assert_array_equal(np.sign(after[name] - self.parameters[name]), np.sign(delta), err_msg=name)

    def test_a_learning_rate_of_zero_moves_nothing(self) -> None:
        optimizer: ServerOptimizer = self.made()
        after, _ = optimizer.update(self.parameters, self.delta, optimizer.init(self.parameters), 0.0)
        assert_same_bits(dict(after), dict(self.parameters))

    def test_a_delta_of_zero_is_survived(self) -> None:
        optimizer: ServerOptimizer = self.made()
        zero = {name: np.zeros_like(value) for name, value in self.parameters.items()}
        after, _ = optimizer.update(self.parameters, zero, optimizer.init(self.parameters), 0.1)
        assert all(np.all(np.isfinite(value)) for value in after.values())

    def test_inputs_are_left_alone(self) -> None:
        optimizer: ServerOptimizer = self.made()
        state = optimizer.init(self.parameters)
        with Untouched(self.parameters, self.delta, state):
            optimizer.update(self.parameters, self.delta, state, 0.1)

    def test_a_state_can_be_kept_and_goes_on_alike(self) -> None:
        optimizer: ServerOptimizer = self.made()
        parameters, state = optimizer.update(self.parameters, self.delta, optimizer.init(self.parameters), 0.1)
        assert all(isinstance(value, np.ndarray) for value in state.values()), "a state holds numpy arrays"
        kept = {name: np.array(value) for name, value in state.items()}
        following = optimizer.update(parameters, self.delta, state, 0.1)
        assert_same_bits(self.made().update(parameters, self.delta, kept, 0.1), following)

    def test_twice_the_rate_is_twice_the_step(self) -> None:
        from fedtower.core.testing.laws import twice_the_rate_is_twice_the_step

        twice_the_rate_is_twice_the_step(self.made)

    def test_the_order_of_names_changes_no_bit(self) -> None:
        from fedtower.core.testing.laws import names_say_nothing

        names_say_nothing(self.made)

    def test_every_step_is_finite(self) -> None:
        from fedtower.core.testing.laws import every_step_is_finite

        every_step_is_finite(self.made)

    def test_a_bowl_is_descended(self) -> None:
        start = _distance(self.parameters, self.delta)
        # One that divides by all it has seen, as Adagrad does, needs the larger rate.
        assert min(self.descend(rate) for rate in (0.05, 0.5)) < start / 5

    def descend(self, rate: float) -> float:
        """How far from the bottom of a bowl the parameters are after 300 steps."""
        optimizer: ServerOptimizer = self.made()
        parameters, state, goal = self.parameters, optimizer.init(self.parameters), self.delta
        for _ in range(300):
            towards = {name: goal[name] - value for name, value in parameters.items()}
            parameters, state = optimizer.update(parameters, towards, state, rate)
        return _distance(parameters, goal)


def _distance(one: Parameters, other: Parameters) -> float:
    return float(np.sqrt(sum(np.square(value - other[name]).sum() for name, value in one.items())))
