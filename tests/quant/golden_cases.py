"""Inputs and outputs of reference implementations, as recorded in `golden/`."""

import json
from pathlib import Path

from safetensors.torch import load_file

FOLDER = Path(__file__).parent / "golden"


class Golden:
    """The cases of one family."""

    def __init__(self, family):
        self.cases = json.loads((FOLDER / f"{family}.json").read_text())["cases"]
        self._tensors = load_file(FOLDER / f"{family}.safetensors")

    def of(self, *functions):
        """The cases of these reference functions."""
        return [case for case in self.cases if case["function"].split(" ")[0] in functions]

    def tensor(self, case, name):
        """One tensor of a case."""
        return self._tensors[f"c{case['case']:02d}.{name}"].clone()


def case_name(case):
    return f"case{case['case']}"
