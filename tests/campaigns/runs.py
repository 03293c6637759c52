"""Kill runs, and start two at once, at random: `python tests/campaigns/runs.py`.

A seed gives the same cases, though not the same moments; `--only 17` repeats one. After each case
the workdir must come to the bytes of an undisturbed run. What needs a look is printed; the exit
code is 1 with a defect.

Kills: a signal hits the command, a rank or all processes; then the same command, with other ranks,
windows and saves, goes on. Outcomes: the stage that was hit (over: the command had ended).
Pairs: two commands in one workdir. Outcomes: refused (one was, by the other's lock), served (none
was: one of them only reads, they take other formats, or did not meet), rejected (one had no input
yet, or another recipe's).
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import signal
import socket
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
os.environ |= {"TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}
os.environ["PYTHONPATH"] = str(Path(__file__).resolve().parents[2])

import nemo_vlm_ptq  # noqa: F401  before torch, which it has settings for

# isort: split

from campaigns.processes import END_SECONDS, Command, DefectError, check_end, start
from campaigns.reference import (
    FORMATS,
    Campaign,
    copy_observed,
    finish,
    make_reference,
    run,
    stage_of,
)

STAGES = ("observe", "solve", "export", "verify", "evaluate", "report")
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
STOPPED = {128 + number for number in SIGNALS} | {-number for number in SIGNALS}
OTHERS = ("calibration.samples=2", "calibration.seed=3", "quantize.format=[fp8]")
MENDS = 12  # one for statistics, and for every scales, export and evaluate folder
RANKS_2 = "parallel.tensor=2"
PAIRS = ("same", "other", "stage", "formats", "status", "plan", "verify")


def try_kill(campaign: Campaign, rng: random.Random, folder: Path) -> str:
    """Kill a run once or more, let the next one finish, and return the stage that was hit."""
    kept = rng.random() < 0.6
    recipe, stage = campaign.write_recipe(folder, keep_statistics=kept), "over"
    for _ in range(rng.choice((1, 1, 1, 2))):
        words = ["run", recipe, *_resources(rng, 0.4)]
        moment, number, whom = rng.random(), rng.choice(SIGNALS), rng.random()
        command = start(folder, *words)
        code = command.work(moment * campaign.seconds * (2 if RANKS_2 in words else 1))
        if code is not None:
            check_end(command, code, 0)
            continue
        stage = stage_of(folder / "work")
        pids = command.pids
        ranks = sorted((rank, pid) for pid, rank in pids.items() if rank is not None)
        hit = [command.process.pid]
        if whom < 0.4 and ranks:
            hit = [rng.choice(ranks)[1]]
        elif whom < 0.6:
            hit = [*pids]
        command.signal(number, hit)
        code = command.end(END_SECONDS)
        of_rank = (1,) if hit != [command.process.pid] else ()
        try:
            check_end(command, code, 0, *STOPPED, *of_rank)
        except DefectError as defect:
            what = f"{number.name} to {hit} of {pids} at {moment:.2f}, {stage}: {words[2:]}"
            raise DefectError(f"{what}: {defect}") from None
    finish(folder, "run", recipe, *_resources(rng, 0.15))
    campaign.compare(folder, kept)
    return stage


def _resources(rng: random.Random, share: float = 0.0) -> list[str]:
    """Return settings that change no byte of the results; a share of runs takes two ranks."""
    window, every = rng.choice((1, 1, 3)), rng.choice((1, 64))
    ranks = [RANKS_2] if rng.random() < share else []
    return [*ranks, f"calibration.window={window}", f"calibration.save_every={every}"]


def try_pair(campaign: Campaign, rng: random.Random, folder: Path, kind: str) -> str:
    """Start two commands in one workdir, check how they end and what is left; return how."""
    recipe = campaign.write_recipe(folder)
    first, second = _words(campaign, kind, rng, recipe)
    if rng.random() < 0.4:
        first, second = second, first
    pause = campaign.seconds * rng.random() ** 3
    commands = [start(folder, *first)]
    commands[0].work(pause)
    commands.append(start(folder, *second))
    codes = [command.end() for command in commands]
    what = f"{first[:1] + first[2:]}, and after {pause:.1f} s {second[:1] + second[2:]},"
    try:
        for command, code in zip(commands, codes, strict=True):
            check_end(command, code, 0, 2)
        outcome = _judge(kind, commands, codes)
        _settle(folder, recipe)
        campaign.compare(folder)
    except DefectError as defect:
        raise DefectError(f"{what} end with {codes}: {defect}") from None
    return outcome


def _words(campaign: Campaign, kind: str, rng: random.Random, recipe: Path) -> list[list[Any]]:
    """Return the words of the two commands of a pair; prepare the workdir."""
    work, whole = recipe.parent / "work", ["run", recipe, *_resources(rng, 0.3)]
    reading = {
        "status": ["status", work],
        "plan": ["plan", recipe],
        "verify": rng.choice((["verify", work / "fp8" / "trtllm"], ["verify", recipe])),
    }
    if kind in (*reading, "stage") and rng.random() < 0.5:
        copy_observed(campaign, work)
    if kind == "same":
        return [whole, ["run", recipe, *_resources(rng)]]
    if kind == "other":
        return [whole, ["run", recipe, rng.choice(OTHERS)]]
    if kind == "stage":
        return [whole, [rng.choice(campaign.stages), recipe]]
    if kind == "formats":
        copy_observed(campaign, work)
        stage = rng.choice(("solve", "export"))
        return [[stage, recipe, f"quantize.format=[{name}]"] for name in FORMATS]
    return [whole, reading[kind]]


def _judge(kind: str, commands: Sequence[Command], codes: Sequence[int | None]) -> str:
    """Check the refusals of a pair, and return the outcome."""
    said = [command.lines[-1] if command.lines else "" for command in commands]
    refused = [n for n in (0, 1) if codes[n] == 2 and "is in use by process" in said[n]]
    if len(refused) == 2 or (refused and kind in ("formats", "status", "plan")):
        raise DefectError(f"refused: {said}")
    for number in refused:
        owner = commands[1 - number].process.pid
        form = rf"workdir .* is in use by process {owner} on {socket.gethostname()}: .*; wait for "
        if not re.search(form, said[number]) or len(commands[number].lines) != 1:
            raise DefectError(f"refused in other words: {commands[number].lines}")
    if codes == [2, 2] and kind in ("same", "formats"):
        raise DefectError(f"none worked: {said}")
    return "refused" if refused else "rejected" if 2 in codes else "served"


def _settle(folder: Path, recipe: Path) -> None:
    """Run the recipe again, and do what its messages say, until it has finished."""
    for _ in range(MENDS):
        code, said, _ = run(folder, "run", recipe)
        if code == 0:
            return
        advice = re.search(r"(?:: |\()rm -r (\S+?)\)?$", said)
        if advice is None or not Path(advice[1]).is_relative_to(folder / "work"):
            raise DefectError(f"no command that mends it: {said}")
        shutil.rmtree(advice[1])
    raise DefectError(f"{MENDS} commands do not mend it, the last for: {said}")


def run_campaign(
    campaign: Campaign, kills: int, pairs: int, seed: int, only: int | None = None
) -> Counter[tuple[str, str]]:
    """Try kills, then pairs; return counts of ("kill" or kind of pair, outcome)."""
    counts = Counter[tuple[str, str]]()
    for number in range(kills + pairs) if only is None else (only,):
        rng, folder = random.Random(f"{seed} {number}"), campaign.work / f"case{number}"
        kind = "kill" if number < kills else PAIRS[(number - kills) % len(PAIRS)]
        attempt: Callable[[], str] = (
            (lambda rng=rng, folder=folder: try_kill(campaign, rng, folder))
            if kind == "kill"
            else (lambda rng=rng, folder=folder, kind=kind: try_pair(campaign, rng, folder, kind))
        )
        try:
            outcome = attempt()
            shutil.rmtree(folder)
        except DefectError as defect:
            outcome = "defect"
            print(f"DEFECT {number} {kind}: {defect} (see {folder})", flush=True)
        counts[kind, outcome] += 1
        print(f"{number} {kind}: {outcome}", file=sys.stderr, flush=True)
    return counts


def main() -> int:
    """Run a campaign and print the counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="number of a case to repeat")
    parser.add_argument("--stages", default=",".join(STAGES))
    parser.add_argument("--work", type=Path, help="a new folder for the cases, kept")
    arguments = parser.parse_args()
    for number in SIGNALS[1:]:  # as for a command in a terminal, whatever started this one
        signal.signal(number, signal.SIG_DFL)
    with tempfile.TemporaryDirectory() as folder:
        campaign = make_reference(arguments.work or Path(folder), arguments.stages.split(","))
        rest = (arguments.kills, arguments.pairs, arguments.seed, arguments.only)
        counts = run_campaign(campaign, *rest)
    for (kind, outcome), number in sorted(counts.items()):
        print(f"{kind:8} {outcome:9} {number:4}")
    return int(any(outcome == "defect" for _, outcome in counts))


if __name__ == "__main__":
    sys.exit(main())
