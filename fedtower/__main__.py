"""``python -m fedtower`` is the ``fedtower`` command."""

from fedtower.core.cli import main

if __name__ == "__main__":
    main()
