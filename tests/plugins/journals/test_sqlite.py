from fedtower.core.testing.journal import JournalPromises
from fedtower.plugins.journals.sqlite.journal import SQLite


class TestSQLite(JournalPromises):
    make = SQLite
