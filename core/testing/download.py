"""What every download promises."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fedtower.core.download import Download
from fedtower.core.draws import Draws
from fedtower.core.errors import UpdateError
from fedtower.core.testing import examples
from fedtower.core.testing.promises import Promises, Untouched, assert_same_bits

Parameters = Mapping[str, NDArray[np.float32]]


class DownloadPromises(Promises):
    """``make`` gives a download."""

    def coded(self, wanted: Parameters, held: Parameters, round: int = 2, seed: int = 7) -> Mapping[str, Any]:
        """The messages of one round."""
        download: Download = self.made()
        return download.encode(wanted, held if download.differences else {}, round, Draws(seed))

    def after(self, coded: Mapping[str, Any], wanted: Parameters, held: Parameters) -> Parameters:
        """What devices make of messages."""
        download: Download = self.made()
        before = held if download.differences else {}
        return {name: download.decode(coded[name], value.shape, before.get(name)) for name, value in wanted.items()}

    def test_every_parameter_has_a_message_and_keeps_its_shape(self) -> None:
        wanted, held = _parameters(2), _parameters(1)
        coded = self.coded(wanted, held)
        assert set(coded) == set(wanted)
        assert all(each.dtype == np.uint8 and each.ndim == 1 for each in coded.values())
        after = self.after(coded, wanted, held)
        assert {name: value.shape for name, value in after.items()} == {n: v.shape for n, v in wanted.items()}
        assert all(value.dtype == np.float32 for value in after.values())

    def test_devices_come_no_further_away(self) -> None:
        wanted, held = _parameters(2), {name: np.zeros_like(value) for name, value in _parameters(2).items()}
        after = self.after(self.coded(wanted, held), wanted, held)
        off, before = (sum(float(np.square(wanted[n] - each[n]).sum()) for n in wanted) for each in (after, held))
        assert off < before

    def test_the_same_draws_give_the_same_bytes_in_any_order_of_names_and_inputs_are_left_alone(self) -> None:
        wanted, held = _parameters(2), _parameters(1)
        with Untouched(wanted, held):
            once = self.coded(wanted, held)
            after = self.after(once, wanted, held)
        reverse = [dict(reversed(list(each.items()))) for each in (wanted, held)]
        again = self.coded(reverse[0], reverse[1])
        assert_same_bits(dict(again), dict(once))
        assert_same_bits(dict(self.after(again, wanted, held)), dict(after))

    def test_parameters_that_stand_still_stay_finite(self) -> None:
        held = {name: np.zeros_like(value) for name, value in _parameters(1).items()}
        after = self.after(self.coded(held, held), held, held)
        assert_same_bits(dict(after), held)

    def test_bytes_that_were_cut_or_added_are_refused(self) -> None:
        wanted, held = _parameters(2), _parameters(1)
        for name, message in self.coded(wanted, held).items():
            for other in (message[:-1], np.append(message, np.uint8(0))):
                if len(message):
                    with pytest.raises(UpdateError):
                        self.made().decode(other, wanted[name].shape, held.get(name))

    def test_a_shape_that_the_bytes_do_not_fill_is_refused_before_room_is_made(self) -> None:
        download: Download = self.made()
        wanted, held, huge = _parameters(2), _parameters(1)["tower.weight"], (1 << 20, 1 << 20)  # 4 TB
        coded = self.coded(wanted, _parameters(1))["tower.weight"]
        for data in (coded, np.full(9, 255, dtype=np.uint8), np.zeros(9, dtype=np.uint8)):
            with pytest.raises(UpdateError):
                download.decode(data, huge, held if download.differences else None)

    @pytest.mark.parametrize("seed", range(5))
    def test_bytes_that_nobody_sent_are_refused_or_have_the_right_shape(self, seed: int) -> None:
        wanted, held = _parameters(2), _parameters(1)
        draws, entries = Draws(seed), np.arange(1 + seed, dtype=np.int64)
        for name, message in self.coded(wanted, held).items():
            if not len(message):
                continue
            spoilt = message.copy()
            spoilt[draws.integers(len(spoilt), f"place/{name}", entries)] = draws.integers(256, f"byte/{name}", entries)
            try:
                value = self.made().decode(spoilt, wanted[name].shape, held.get(name))
            except UpdateError:
                continue
            assert value.shape == wanted[name].shape


def _parameters(seed: int) -> dict[str, NDArray[np.float32]]:
    return dict(examples.plan(seed=seed).parameters)
