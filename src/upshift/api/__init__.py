"""What the commands do, callable from Python: wiring only.

One file per function; the names below are the public ones.
"""

from upshift.api.diagnosis import Diagnosed, DiagnoseOptions, diagnose
from upshift.api.machines import doctor, selftest
from upshift.api.objective import Objective
from upshift.api.running import RunOptions, choose_plan, run
from upshift.api.stored import latest_run, load, report_behind
from upshift.api.target import Say, Target
from upshift.api.tuning import Tuned, TuneOptions, tune
from upshift.api.verifying import VerifyOptions, verify

__all__ = [
    "DiagnoseOptions",
    "Diagnosed",
    "Objective",
    "RunOptions",
    "Say",
    "Target",
    "TuneOptions",
    "Tuned",
    "VerifyOptions",
    "choose_plan",
    "diagnose",
    "doctor",
    "latest_run",
    "load",
    "report_behind",
    "run",
    "selftest",
    "tune",
    "verify",
]
