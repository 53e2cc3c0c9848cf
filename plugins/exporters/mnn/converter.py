"""Converts one ONNX file to MNN: ``python -m fedtower.plugins.exporters.mnn.converter FROM TO``.

It is run in a process of its own, because the converter may crash. The extension module is called directly: the
package's own command and its ``MNN.tools`` install software and call a remote service when they are imported.
"""

from __future__ import annotations

import sys


def main(source: str, target: str) -> int:
    """The exit code: 0 when the file was written."""
    import _tools

    done = _tools.mnnconvert(["c", "-f", "ONNX", "--modelFile", source, "--MNNModel", target, "--bizCode", "fedtower"])
    return 0 if done else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1], sys.argv[2]))
