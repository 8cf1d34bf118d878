"""What the commands do, callable from Python: wiring only.

One file per function; the names below are the public ones.
"""

from upshift.api.checkpoints import Inventory, checkpoints, export
from upshift.api.comparing import CompareOptions, compare
from upshift.api.diagnosis import Diagnosed, DiagnoseOptions, diagnose
from upshift.api.estimating import EstimateOptions, estimate
from upshift.api.jobs import JobOptions, parse_settings, run_job
from upshift.api.machines import doctor, selftest
from upshift.api.objective import Objective
from upshift.api.resuming import Resumed, ResumeOptions, verify_resume
from upshift.api.running import RunOptions, choose_plan, run
from upshift.api.stored import latest_run, load, report_behind
from upshift.api.target import Say, Target
from upshift.api.tuning import Tuned, TuneOptions, tune
from upshift.api.verifying import VerifyOptions, verify
from upshift.engine.settings import Settings

__all__ = [
    "CompareOptions",
    "DiagnoseOptions",
    "Diagnosed",
    "EstimateOptions",
    "Inventory",
    "JobOptions",
    "Objective",
    "ResumeOptions",
    "Resumed",
    "RunOptions",
    "Say",
    "Settings",
    "Target",
    "TuneOptions",
    "Tuned",
    "VerifyOptions",
    "checkpoints",
    "choose_plan",
    "compare",
    "diagnose",
    "doctor",
    "estimate",
    "export",
    "latest_run",
    "load",
    "parse_settings",
    "report_behind",
    "run",
    "run_job",
    "selftest",
    "tune",
    "verify",
    "verify_resume",
]
