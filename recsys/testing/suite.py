"""What every offered suite promises."""

from __future__ import annotations

from fedtower.core.registry import discover
from fedtower.core.testing.promises import Promises
from fedtower.recsys.suite import Suite, tasks_of
from fedtower.recsys.suite_figures import Finished, Results
from fedtower.recsys.suite_page import in_markdown, render_suite


class SuitePromises(Promises):
    """``make`` gives the suite: ``make = lambda: load_suite("my-suite", discover())``."""

    def test_every_entry_is_a_recipe_that_can_be_run(self) -> None:
        suite: Suite = self.made()
        names = [task.name for task in tasks_of(suite, discover())]
        assert len(set(names)) == len(suite.entries) * len(suite.seeds)

    def test_its_quick_form_is_smaller(self) -> None:
        suite: Suite = self.made()
        whole, quick = (tasks_of(suite, discover(), quick=quick) for quick in (False, True))
        assert sum(task.recipe.planned for task in quick) < sum(task.recipe.planned for task in whole)

    def test_every_entry_is_in_a_table(self) -> None:
        suite: Suite = self.made()
        shown = {entry.name for layout in suite.tables for entry in suite.rows(layout.entries)}
        assert shown == {entry.name for entry in suite.entries}

    def test_what_was_published_is_a_column_and_has_a_source(self) -> None:
        suite: Suite = self.made()
        columns = {column.key for layout in suite.tables for column in layout.all_columns}
        for entry in suite.entries:
            assert set(entry.published) <= columns
            assert bool(entry.published) == bool(entry.source)

    def test_it_can_be_read_before_anything_has_run_and_after(self) -> None:
        suite: Suite = self.made()
        columns = [column for layout in suite.tables for column in layout.all_columns]
        runs = [
            Finished(entry.name, seed, "runs/x", figures={column.key: 0.5 + seed / 100 for column in columns})
            for seed in suite.seeds
            for entry in suite.entries
        ]
        for held in ((), tuple(runs)):
            results = Results("suite", suite, quick=False, runs=held, planned=len(runs))
            page, text = render_suite(results), in_markdown(results)
            for layout in suite.tables:
                assert layout.title in text
            assert page.startswith("<!doctype html>")
            assert "http" not in page.partition("<body>")[0]
