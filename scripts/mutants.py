"""Removes guards one by one and checks that a test notices.

    python scripts/mutants.py [--only WORD]

Each mutant is a small edit of a copy of `src`; the checkout is never touched. First all named tests must pass on the
unchanged copy. Exits with 1 if a mutant survives, a snippet no longer matches exactly once, or a test does not pass
without any mutant.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]

#: Seconds after which a test counts as hung.
TIMEOUT = 300


class Mutant(NamedTuple):
    """In `file` (below src/upshift), `old` becomes `new`; `test` must then fail."""

    file: str
    old: str
    new: str
    test: str


UPDATES = "tests/hostile/test_false_wins_updates.py"
CURVES = "tests/hostile/test_false_wins_curves.py"
TIMING = "tests/hostile/test_false_wins_timing.py"
SEARCH = "tests/hostile/test_false_wins_search.py"
PLANS = "tests/hostile/test_false_wins_plans.py"
ACCEPT = "tests/search/test_accept.py"
AUTOPILOT = "tests/search/test_autopilot.py"

LATE = "tests/search/test_late.py"
STATS = "tests/measure/test_stats.py"

LOOP = "tests/engine/test_loop.py"
RESUME = "tests/engine/test_job_resume.py"
STORE = "tests/checkpoint/test_store.py"
CRASHES = "tests/checkpoint/test_crashes.py"
LONG = "tests/engine/test_long_updates.py"
MATRIX = "tests/engine/test_resume_matrix.py"
SPIKES = "tests/engine/test_spikes_saved.py"

MUTANTS = (
    # The late step and the timing of few quads
    Mutant("search/late.py", "problem = apart(r, c, limits)", 'problem = ""', LATE),
    Mutant("search/late.py", "if drawn != planned:", "if False:", LATE),
    Mutant("measure/paired.py", "if 0 < len(self.middle_of) <= ranks.ENOUGH:", "if False:",
           f"{STATS}::test_noise_that_happens_to_agree_is_no_gain"),
    Mutant("measure/paired.py", "return math.ceil(LEAST_QUADS * scatter / QUIET) if scatter > QUIET else 0", "return 0",
           f"{STATS}::test_a_busy_machine_needs_more_quads"),
    # The acceptance rule
    Mutant("search/accept.py", "if not losses_seen:", "if False:", f"{ACCEPT}::test_never_passes_without_evidence"),
    Mutant("search/accept.py", "if not check.passed]", "if False]", f"{ACCEPT}::test_what_is_rejected"),
    Mutant("search/accept.py", "if numerics is Numerics.CHANGES_TRAINING:", "if False:",
           f"{SEARCH}::test_another_training_is_never_kept_on_speed"),
    Mutant("search/accept.py", "if lag.identical and lag.flat:", "if False:",
           f"{CURVES}::test_a_loss_that_never_changes_is_no_trajectory"),
    Mutant("search/accept.py", "if better and not (reseeds or wild):", "if False:",
           f"{CURVES}::test_a_loss_that_falls_too_fast_is_another_loss"),
    Mutant("search/accept.py", "if lag.high < 0.0 and lag.lag < -MARGIN and not (reseeds or wild):", "if False:",
           f"{UPDATES}::test_dropout_switched_off_after_the_updates_were_compared_is_no_win"),
    Mutant("search/accept.py", "    if harm:\n", "    if False:\n", f"{CURVES}::test_skipped_steps_are_a_lag"),
    Mutant("search/accept.py", "far = lag.noise is not None and lag.excess > FAR * lag.noise", "far = False",
           f"{ACCEPT}::test_an_explosion_is_not_called_too_short_a_horizon"),
    Mutant("search/accept.py", "if not any(check.worst != NOTHING_MOVED for check in updates):", "if False:",
           f"{CURVES}::test_updates_that_nobody_compared_are_no_proof"),
    Mutant("search/accept.py", "    if several_optimizers:\n", "    if False:\n",
           f"{CURVES}::test_two_losses_that_work_against_one_another_are_no_trajectory"),
    # Updates and curves
    Mutant("measure/updates.py", "            and not self.dead\n", "",
           f"{ACCEPT}::test_a_dead_small_parameter_is_found"),
    Mutant("measure/updates.py", "passed = all(np.array_equal(r[name], c[name]) for name in r)", "passed = True",
           f"{ACCEPT}::test_bitwise_needs_every_bit"),
    Mutant("measure/updates.py", "            and 1.0 / (1.0 + limits.norm) <= self.norm <= 1.0 + limits.norm\n", "",
           f"{ACCEPT}::test_faults_are_rejected"),
    Mutant("measure/updates.py", "            and self.worst_cosine >= limits.worst\n", "",
           f"{UPDATES}::test_one_parameter_that_goes_elsewhere_is_no_win"),
    Mutant("measure/lag.py", "median(stock[-2 * tenth :]) < FLOOR * median(stock[:tenth])", "False",
           "tests/measure/test_lag.py::test_a_memorised_curve_shows_nothing"),
    Mutant("measure/lag.py", "MARGIN = 0.01", "MARGIN = 0.03",
           "tests/measure/test_lag.py::test_acceptance_and_false_acceptance"),
    # The same work
    Mutant("search/alike.py", "if starts[0] != starts[1]:", "if False:",
           f"{CURVES}::test_an_epoch_cut_short_is_no_win"),
    Mutant("search/alike.py", "if a.backwards[step] != b.backwards[step]:", "if False:",
           f"{CURVES}::test_micro_batches_that_are_left_out_are_no_win"),
    Mutant("search/alike.py", "FIRST_LOSS = 0.005", "FIRST_LOSS = 0.5",
           f"{CURVES}::test_a_scaled_loss_cannot_hide_that_steps_are_left_out"),
    Mutant("search/confirm.py", "apart = parted(a, b, numerics)", 'apart = ""',
           f"{SEARCH}::test_a_fast_technique_that_cheats_is_not_kept_and_the_reason_is_named"),
    Mutant("search/confirm.py", "    if not paired:\n", "    if False:\n",
           f"{CURVES}::test_arms_that_begin_from_other_parameters_prove_nothing"),
    Mutant("search/confirm.py", "elif bitwise and min(stock) == max(stock):", "elif False:",
           f"{CURVES}::test_constant_losses_are_not_the_same_bits"),
    Mutant("search/confirm.py", "if len(stock) != len(planned):", "if False:",
           f"{CURVES}::test_losses_hidden_from_the_backward_call_are_no_proof"),
    # Timing
    Mutant("measure/paired.py", "if n >= FADE_QUADS:", "if False:",
           f"{TIMING}::test_a_gain_that_fades_counts_as_what_is_left_of_it"),
    Mutant("measure/paired.py", "if n >= 8 and binomial_tail(", "if n >= 10**9 and binomial_tail(",
           f"{TIMING}::test_a_stall_that_a_robust_mean_would_trim_away_is_charged"),
    Mutant("measure/paired.py", "AT_LEAST = 1.01", "AT_LEAST = 0.9",
           f"{TIMING}::test_what_depends_on_the_order_of_the_arms_cancels"),
    Mutant("search/duel.py", "found = seen_outside(found, turns)", "pass",
           f"{TIMING}::test_a_gain_that_is_none_is_not_confirmed"),
    Mutant("search/duel.py", "for name, text in arm.problems.items():", "for name, text in ():",
           f"{SEARCH}::test_a_fast_technique_that_cheats_is_not_kept_and_the_reason_is_named"),
    Mutant("search/duel.py", "if held * 1.1 > available:", "if False:",
           f"{AUTOPILOT}::test_two_copies_that_do_not_fit_are_not_started"),
    Mutant("search/screening.py", "low=pairing.low * min(factor, 1.0)", "low=pairing.low",
           f"{TIMING}::test_what_starting_an_epoch_costs_is_charged_to_its_steps"),
    Mutant("search/screening.py", "if pairing.high <= reach:", "if True:",
           f"{AUTOPILOT}::test_a_data_technique_is_not_credited_with_more_than_the_waiting"),
    Mutant("measure/steps.py", " - record.checkpoint", "",
           f"{TIMING}::test_leaving_out_evaluation_and_checkpoints_is_no_faster_step"),
    Mutant("search/autopilot.py", "if expected >= cost:", "if True:",
           f"{AUTOPILOT}::test_trials_that_cannot_pay_are_not_made"),
    # Plans
    Mutant("records/fingerprint.py", "if was.versions != now.versions:", "if False:",
           f"{PLANS}::test_a_plan_of_something_else_is_not_used[other versions]"),
    Mutant("records/fingerprint.py", "if was.settings != settings_digest(plan.techniques):", "if False:",
           "tests/records/test_fingerprint.py::test_every_change_is_named"),
    # Techniques
    Mutant("sites/autocast.py", "cache_enabled=False", "cache_enabled=True",
           "tests/techniques/test_bf16.py::test_a_no_grad_forward_does_not_take_gradients_from_the_next_one"),
    Mutant("techniques/loader.py", "        if not main_guard:\n", "        if False:\n",
           "tests/techniques/test_loader.py::test_spawn_needs_the_main_guard"),
    Mutant("techniques/fused.py", "return all(x == y for size, x, y in", "return all(True for size, x, y in",
           "tests/techniques/test_fused.py::test_layouts_that_corrupt_an_unguarded_fused_step"),
    # The update of a declared job
    Mutant("engine/loop.py", "elif part.weight != 1.0:", "elif False:",
           f"{LOOP}::test_micro_batches_do_not_change_the_update"),
    Mutant("engine/loop.py", "                    counts.append(count)\n", "",
           f"{LOOP}::test_a_weighted_loss_is_normalised_over_the_whole_batch"),
    Mutant("engine/loop.py", "    with t.evaluating(), torch.no_grad():", "    with torch.no_grad():",
           f"{LOOP}::test_evaluation_is_exact_and_uses_the_average"),
    Mutant("engine/order.py", "mix(ORDER, seed, epoch)", "mix(ORDER, seed)", "tests/engine/test_order.py"),
    # Trouble in a step
    Mutant("engine/training.py", "if -math.inf < total < math.inf:", "if True:",
           f"{LOOP}::test_a_loss_that_is_not_finite_goes_back_and_leaves_the_batch_out"),
    Mutant("engine/trouble.py", "            recovery.went_back(t.progress.step, places)\n", "",
           f"{LOOP}::test_after_going_back_it_is_the_training_without_that_batch"),
    Mutant("engine/trouble.py", "t.parts.data.micro_batch = size", "t.job.global_batch",
           f"{LOOP}::test_out_of_memory_goes_on_with_smaller_micro_batches_and_the_same_update"),
    Mutant("engine/saving.py", '"suspicious": t.spikes.suspicious', '"suspicious": False',
           f"{SPIKES}::test_a_run_stopped_before_or_in_a_spike_goes_on_as_the_uninterrupted_one"),
    # Coming back
    Mutant("engine/saving.py", '            set_random_state(tree["random"])\n', "            pass\n",
           f"{RESUME}::test_it_goes_on_bitwise"),
    Mutant("engine/saving.py", '        parts.data.load_state_dict(tree["data"])\n', "",
           f"{MATRIX}::test_a_stream_that_knows_its_place_is_not_read_twice"),
    Mutant("engine/saving.py", "for name, items in parts.stage.states().items() if any(items)",
           "for name, items in ()", f"{MATRIX}::test_stopped_twice_and_bitwise_the_same[fp16]"),
    Mutant("engine/streams.py", "return found if _knows_its_place(found) else None", "return found",
           "tests/engine/test_data_streams.py::test_stopped_again_and_again_each_sample_comes_once"),
    Mutant("engine/streams.py", "for _ in range(self._pieces * self._stride):", "while len(found) < self._pieces:",
           "tests/engine/test_data_streams.py::test_ranks_stopped_after_any_batch_go_on_with_each_sample_once"),
    Mutant("engine/saving.py", '        t.results.load_state_dict(tree["results"])\n', "", RESUME),
    Mutant("engine/saving.py", "        if differ:\n", "        if False:\n",
           f"{RESUME}::test_another_training_is_told_by_what_differs"),
    Mutant("engine/note.py", "return self._versions != [item._version for item in self._referred]", "return False",
           f"{LONG}::test_a_forward_pass_that_changes_parameters_is_not_taken_for_a_boundary"),
    # Checkpoints
    Mutant("checkpoint/store.py", "        self._disk.sync_folder(temporary)\n        self._lock.check()\n",
           "        self._lock.check()\n", f"{CRASHES}::test_after_a_power_loss_nothing_acknowledged_is_lost"),
    Mutant("checkpoint/store.py", "        self._disk.rename(temporary, self.folder / name)\n"
           "        self._disk.sync_folder(self.folder)\n        return name\n",
           "        self._disk.rename(temporary, self.folder / name)\n        return name\n",
           f"{CRASHES}::test_after_a_power_loss_nothing_acknowledged_is_lost"),
    Mutant("checkpoint/store.py", 'if problem := next(filter(None, problems), ""):', 'if problem := "":',
           "tests/checkpoint/test_disk_faults.py::test_a_disk_that_stores_other_bytes_than_it_was_given"),
    Mutant("checkpoint/store.py", "if needed > free:", "if False:",
           "tests/checkpoint/test_disk_faults.py::test_a_full_disk_is_found_before_anything_is_written"),
    Mutant("checkpoint/retention.py", "if len(keep) < NEWEST and whole(item):", "if len(keep) < NEWEST:",
           f"{STORE}::test_a_damaged_one_does_not_count_among_the_newest_two"),
    Mutant("checkpoint/saver.py", "copies[name] = onto.copy_(tensor, non_blocking=pinned)", "copies[name] = tensor",
           "tests/checkpoint/test_saver.py::test_the_state_saved_is_that_of_the_call"),
)  # fmt: skip


def tested(source: Path, tests: list[str]) -> tuple[bool, str]:
    """Whether these tests pass with the package below `source`, and the end of what pytest said."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(source), "PYTHONDONTWRITEBYTECODE": "1"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TIMEOUT * (1 if len(tests) == 1 else 4),
        )
    except subprocess.TimeoutExpired:
        return False, "hung"
    # 1: tests failed. Anything else is no verdict about a guard.
    if done.returncode not in (0, 1):
        raise SystemExit(f"pytest could not run {' '.join(tests)}:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return done.returncode == 0, done.stdout[-3000:]


def place_of(source: Path) -> str:
    """Where Python finds the package when `source` comes first."""
    code = "import upshift; print(upshift.__file__)"
    env = {**os.environ, "PYTHONPATH": str(source)}
    return subprocess.run([sys.executable, "-c", code], cwd=source, env=env, capture_output=True, text=True).stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="only mutants whose file, snippet or test contains this")
    only = parser.parse_args().only
    chosen = [mutant for mutant in MUTANTS if only in " ".join(mutant)]
    if not chosen:
        raise SystemExit(f"no mutant contains {only!r}")
    bad = 0
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        source = Path(folder)
        shutil.copytree(ROOT / "src" / "upshift", source / "upshift", ignore=shutil.ignore_patterns("__pycache__"))
        if not place_of(source).startswith(folder):
            raise SystemExit("the copy of src is not what Python imports")
        passed, told = tested(source, sorted({mutant.test for mutant in chosen}))
        if not passed:
            print(f"not all tests pass without any mutant:\n{told}")
            return 1
        for mutant in chosen:
            file = source / "upshift" / mutant.file
            text = file.read_text(encoding="utf-8") if file.is_file() else ""
            what = f"{mutant.file}: {mutant.old.strip()}"
            if text.count(mutant.old) != 1:
                bad += 1
                print(f"STALE     {what}  ({text.count(mutant.old)} matches)", flush=True)
                continue
            file.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
            survived, _ = tested(source, [mutant.test])
            file.write_text(text, encoding="utf-8")
            bad += survived
            print(f"{'SURVIVED' if survived else 'killed  '}  {what}  [{mutant.test}]", flush=True)
    print(f"{len(chosen)} mutants, {len(chosen) - bad} killed")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
