"""The hall: walk the blocks, calibrate, solve, pack, save, resume.

request.py   what is asked for, what comes back, who is told meanwhile
plan.py      everything that can be known before a tensor is read
journal.py   the work folder of a run: finished blocks, and whether a new run may go on from them
prepare.py   a request made concrete: model, device, calibration set, deciding settings
solve.py     one linear: statistics in, codes out
walk.py      the loop over blocks
output.py    the final folder
"""

from quantkit.pipeline.plan import Plan, make_plan
from quantkit.pipeline.request import Listener, QuantizeRequest, QuantizeResult
from quantkit.pipeline.walk import default_output, dry_run, quantize, run

__all__ = [
    "Listener",
    "Plan",
    "QuantizeRequest",
    "QuantizeResult",
    "default_output",
    "dry_run",
    "make_plan",
    "quantize",
    "run",
]
