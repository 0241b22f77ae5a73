"""The hall: walk the blocks, calibrate, solve, pack, save, resume.

request.py   what is asked for, what comes back, who is told meanwhile
plan.py      everything that can be known before a tensor is read
journal.py   the work folder of a run: finished blocks, and whether a new run may go on from them
prepare.py   a request made concrete: model, device, calibration set, deciding settings
allocate.py  which linear gets how many bits, under the bytes of budget.py
measure.py   what storing a block at few bits does to the model's output, for allocators
attend.py    what attention makes of its linears' outputs, for solvers that ask
solve.py     one linear: statistics in, codes out; binarize.py where it becomes signs and salient channels
tune.py      scales of a block trained on what it puts out, where a recipe asks for it
restore.py   transform=restore: a first pass and a low-rank tuning before the walk that counts
walk.py      the loop over blocks
output.py    the final folder
entry.py     all of it in order: what is called from outside
"""

from quantkit.pipeline.entry import default_output, dry_run, quantize, run, take_part
from quantkit.pipeline.plan import Plan, make_plan
from quantkit.pipeline.request import Listener, QuantizeRequest, QuantizeResult

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
    "take_part",
]
