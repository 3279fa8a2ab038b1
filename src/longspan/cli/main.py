"""The command line ``longspan VERB --flags``: parses settings, runs the verb, prints one sentence for an error.

    longspan VERB --flags   ->   config   ->   launch.run(commands.VERB.work, config)   ->   exit code

    0  success      1  the check failed, or a rank died      2  refused with one sentence, nothing written
    130  Ctrl-C (143: SIGTERM); every rank was ended         141  the reader of the output closed the pipe

Flags override ``--config FILE``, which overrides the settings of a run that is resumed.
"""

import contextlib
import io
import os
import platform
import signal
import sys
import textwrap
import traceback
from collections.abc import Sequence
from dataclasses import fields, replace
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from itertools import dropwhile, takewhile
from typing import Any, NamedTuple

import tyro

import longspan
from longspan.cli import launch
from longspan.cli.auto_plan import planned, refuse_beside
from longspan.cli.config import Check, Evaluate, Layout, Ranks, Train
from longspan.cli.plan import PlanSettings
from longspan.cli.probe import ProbeSettings
from longspan.cli.rehearse import RehearseSettings
from longspan.cli.report import ReportSettings
from longspan.cli.settings_file import LATEST, close, known, read_file, refuse_units, settings_of_run, suggest_config
from longspan.distributed.launchers import join_launcher
from longspan.errors import LongspanError, RunError

MOST_DEFAULT_RANKS = 4
"""The most ranks that are started where no flag asks for a number: the query heads of the smallest preset."""


class Verb(NamedTuple):
    """A verb of the command line, a value of ``VERBS``.

    Attributes:
        settings: the class of its settings, whose fields are the flags.
        does: a one-line description.
        example: a call with its output, which ``--help`` shows.
    """

    settings: type[Any]
    does: str
    example: str


TRAINED = """$ longspan train
2 ranks = data 1 x ring 1 x ulysses 2; 8,192 tokens a sequence, 4,096 of them a rank
text   734 files (734 .py), 731 documents, 11,734,872 tokens to train on, 384,500 held out
run    450,560 tokens, 0.0384 epochs: 55 steps of 1 sequence

train-001  step 55/55  loss 2.4264  670 MiB a rank  6 MiB exchanged

  loss, held-out text      2.4619 nats a token   3.5520 bits a byte

A Hugging Face model, exported to runs/NAME/export:  longspan train --model hf:FOLDER --data FILES --zero 3"""

EVALUATED = """$ longspan evaluate train-001 --ranks 2
document  begins                             tokens  nats a token  perplexity

10        #! /usr/bin/env python3 import s   16,384        2.5556      12.879

all: 3.7403 bits a byte; byte frequencies alone: 4.6691 bits a byte"""

CHECKED = """$ longspan check --ranks 4 --ulysses 4 --heads 7 --kv-heads 7
worst gradient of 21: blocks.0.attention.out.weight  error 1.4e-15  bound 1e-10  holds

Guarantee 1 holds.

A Hugging Face model of your own:  longspan check --model hf:FOLDER --layers 2"""

PLANNED = """$ longspan plan --model llama-70b --hardware h100 --gpus 64 --tokens 1048576
llama-70b, 70.6B parameters, on 64 H100: 8 x 1,048,576 tokens a step
30,180 legal layouts, 1,533 fit; longest sequence 12,205,399 tokens

                                 best        runner-up
step                  2,036.30 s +-5%  2,039.59 s +-5%
memory of a GPU         54.0 GiB +-5%    54.0 GiB +-5%
memory of a host       160.0 GiB +-5%   160.0 GiB +-5%

best       ring 8 x ulysses 8, zero=3, recompute=selective, offload_activations
What binds, and what doubling the tokens does:  longspan plan --model hf:FOLDER --explain"""

REHEARSED = """$ longspan rehearse --world 64 --ulysses 4 --zero 3 --tokens 32768
One rank at a time of 64 = data 16 x ulysses 4, zero=3, recompute=none; 16 x 32,768 tokens a step

                                   rank 0  plan, fullest rank
tokens of a row                     8,192
parameters held                    22,548
compute of a step            3.564 s +-0%
memory, peak                    0.363 GiB           0.459 GiB

Does 70B fit:  longspan rehearse --model llama-70b --ulysses 8 --ring 8 --zero 3 --recompute selective --tokens 1048576"""

REPORTED = """$ longspan report train-001 train-002
train-001  step 55, loss 2.4264
train-002  step 12, loss 3.0127
Written to report.html

While runs go on:  longspan report latest --watch 30"""

PROBED = """$ longspan probe --ranks 2
x86_64 cpu, 2 ranks at the same time; spread: quartiles over the median

  matmul fp32 1024                      48.6 GFLOP/s   +-9%
  attention forward and backward        17.0 GFLOP/s   +-15%
  point-to-point, large                    0.57 GB/s   +-22%

Written to hardware.json; plan with it:  longspan plan --hardware hardware.json"""

VERBS = {
    "train": Verb(Train, "Train a decoder, or a Hugging Face model, on long sequences of text.", TRAINED),
    "evaluate": Verb(
        Evaluate, "Loss and perplexity of whole documents under a checkpoint or a Hugging Face folder.", EVALUATED
    ),
    "check": Verb(Check, "Compare loss, gradients, norm and traffic of a layout with one device.", CHECKED),
    "plan": Verb(PlanSettings, "Predict time and memory on a cluster that is not there yet, and choose the layout.", PLANNED),
    "probe": Verb(ProbeSettings, "Measure this machine or cluster into a file that longspan plan reads.", PROBED),
    "rehearse": Verb(
        RehearseSettings, "Run one rank of a large world on this device, and compare it with the plan.", REHEARSED
    ),
    "report": Verb(ReportSettings, "Draw finished or running runs as one HTML page.", REPORTED),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Errors are printed on stderr as one sentence, not raised.

    Args:
        arguments: the words after ``longspan``; None: those of this process.

    Returns:
        The exit code: 0 for success, 1 if a check failed or a rank died, 2 for a refusal; others as in the table of this file.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = _answer(given)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more when it ends
        return launch.CLOSED_PIPE
    except (LongspanError, OSError) as error:
        _say(error, debug="--debug" in given)
        return 2
    except KeyboardInterrupt:
        _print_error("stopped by SIGINT", apart=True)
        return 128 + signal.SIGINT


def _answer(given: Sequence[str]) -> int:
    """Print the help or version that the words ask for, or run the verb; return the exit code."""
    if not given or given[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if given[0] in ("-V", "--version"):
        print(_version())
        return 0
    if given[0] in VERBS and {"-h", "--help"} & set(given[1:]):
        _help(given[0])
        return 0
    return _run(given[0], given[1:])


def parse(verb: str, arguments: Sequence[str]) -> Any:
    """Parse the flags of a verb into its validated settings.

    Flags override ``--config FILE``, which overrides the settings of the run that ``resume``, of either, names.

    Args:
        verb: a key of ``VERBS``.
        arguments: the words after it.

    Returns:
        An instance of ``VERBS[verb].settings``.

    Raises:
        RunError: an unknown verb or flag, a value of another type or range, or a config file that cannot be read.
    """
    if verb not in VERBS:
        near = "".join(f" (did you mean {name}?)" for name in close(verb, list(VERBS)))
        raise RunError(f"{verb!r} is not a verb of longspan{near}; legal are {', '.join(VERBS)} (see longspan --help)")
    kind = VERBS[verb].settings
    flags, file = _take_config_out(_name_the_latest(arguments))
    _refuse_unknown(verb, flags)
    refuse_units(kind, flags)
    values = {} if file is None else known(kind, read_file(file), f"the config {file}")
    of_file = _name_the_latest(_as_flags(values))
    base: Any = None
    given = _read(verb, flags, _read(verb, of_file, None))
    if isinstance(given, Train) and given.resume is not None:
        name, settings = settings_of_run(given.runs_folder, given.resume)
        settings["decay_steps"] = settings.get("decay_steps") or settings.get("steps")  # --steps must not bend the schedule
        base = _read(verb, _as_flags(known(kind, settings, f"the run {name}")), base)
        flags += ["--run", name]
    _refuse_contradictions(flags, values)
    return kind(**vars(_read(verb, flags, _read(verb, of_file, base))))


def _run(verb: str, flags: Sequence[str]) -> int:
    """Run a verb with its flags; return the exit code. A rank that died is printed, other errors are raised."""
    work = f"longspan.cli.{verb}:work"
    config = parse(verb, flags)
    if not isinstance(config, Ranks):  # it starts no ranks
        return int(import_module(f"longspan.cli.{verb}").work(config))
    config = _on_the_devices(config, flags, work)
    try:
        return launch.run(work, config, config.local_ranks)
    except launch.RankDied as died:
        if not str(died):  # another rank prints what happened
            return died.code
        _print_error(f"{died}{config.after_a_death}", apart=died.code != 1)
        if config.debug:
            print(died.trace, file=sys.stderr)
        return died.code


def _on_the_devices(config: Any, flags: Sequence[str], work: str) -> Any:
    """``config`` with a default layout for this machine: as many ranks as accelerators, or as the launcher has started.

    Args:
        config: the settings; unchanged if there is no accelerator, or if a flag names a layout.
        flags: the words of the command line.
        work: ``module:function`` of the verb.

    Returns:
        Settings with at most ``MOST_DEFAULT_RANKS`` ranks.
    """
    if isinstance(config, Train) and config.plan is not None and config.resume is None:
        return planned(config, work)
    given = {flag[2:].partition("=")[0] for flag in flags if flag.startswith("--")}
    if given & {"ranks", "ulysses", "ring", "resume", "config"}:
        return config
    join_launcher(os.environ)
    ranks = int(os.environ["WORLD_SIZE"]) if launch.joins() else launch.visible_devices(work, config.local_ranks)
    if (launch.joins() and ranks > 1) or not ranks:
        return config
    others = config.tensor * config.pipeline
    ulysses = max(1, min(ranks, MOST_DEFAULT_RANKS) // others)
    return replace(config, **({"ulysses": ulysses} if isinstance(config, Layout) else {"ranks": ulysses * others}))


def _say(error: LongspanError | OSError, debug: bool) -> None:
    """Print ``error`` on stderr as one line, after its traceback if ``debug``; under a launcher one rank prints it for all."""
    if not launch.is_first_to_report(error):
        return
    if debug:
        traceback.print_exception(error)
    _print_error(" ".join(str(error).split()))


def _print_error(sentence: str, apart: bool = False) -> None:
    """Print ``longspan: {sentence}`` on stderr.

    With ``apart`` it begins a new line on a terminal, which may have printed ^C or a progress line on the current one.
    """
    begins = "\n" if apart and sys.stderr.isatty() else ""
    print(f"{begins}longspan: {sentence}", file=sys.stderr)


def _refuse_contradictions(flags: Sequence[str], values: dict[str, Any]) -> None:
    """Raise RunError if ``flags`` and ``values``, those of the config file, together give two settings that contradict."""
    given = {flag[2:].partition("=")[0].replace("-", "_") for flag in flags if flag.startswith("--")}
    given |= {name for name, value in values.items() if value is not None}
    if "plan" in given:
        refuse_beside(given)
    if {"steps", "epochs"} <= given:
        raise RunError("--steps and --epochs both say how long the run is; give one of them, and leave the other out")


def _refuse_unknown(verb: str, flags: Sequence[str]) -> None:
    """Raise RunError for the first of ``flags`` that ``verb`` does not have; the message suggests the nearest one."""
    names = [field.name for field in fields(VERBS[verb].settings)]
    switches = [f"no_{field.name}" for field in fields(VERBS[verb].settings) if field.type is bool]
    for flag in (flag for flag in flags if flag.startswith("--")):
        name = flag[2:].partition("=")[0].replace("-", "_")
        if name not in (*names, *switches):
            near = "".join(f" (did you mean --{other.replace('_', '-')}?)" for other in close(name, [*names, *switches]))
            raise RunError(f"{flag.partition('=')[0]} is not a flag of longspan {verb}{near}; see longspan {verb} --help")


def _read(verb: str, flags: Sequence[str], base: Any) -> Any:
    """Parse ``flags`` with tyro into an unvalidated instance of the verb's settings.

    It is not validated because ``base`` need not be legal before the flags override it.

    Args:
        verb: a key of ``VERBS``.
        flags: the words after it.
        base: settings that give the defaults; None: those of the class.

    Raises:
        RunError: tyro's own error, in one sentence.
        SystemExit: after ``--help`` is printed.
    """
    kind = VERBS[verb].settings
    unchecked = type(kind.__name__, (kind,), {"__post_init__": lambda self: None, "__doc__": kind.__doc__})
    message = io.StringIO()
    try:
        with contextlib.redirect_stderr(message):
            return tyro.cli(
                unchecked,
                prog=f"longspan {verb}",
                description=VERBS[verb].does,
                args=list(flags),
                default=unchecked(**vars(base)) if base is not None else tyro.MISSING_NONPROP,
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise RunError(f"{suggest_config(_first_sentence(message.getvalue()))}; see longspan {verb} --help") from None


def _first_sentence(box: str) -> str:
    """The sentence of an error that tyro prints as a box: the text between its title and the next horizontal rule."""

    def is_rule(line: str) -> bool:
        return set(line) <= set("─-╭╮╰╯")

    lines = [line.strip("│| ") for line in box.splitlines()[1:]]
    return " ".join(takewhile(lambda line: not is_rule(line), dropwhile(is_rule, lines))).rstrip(".")


def _name_the_latest(arguments: Sequence[str]) -> list[str]:
    """The arguments, with the word ``latest`` inserted after a ``--resume`` that no name follows."""
    named = []
    for argument, following in zip(arguments, [*arguments[1:], "--"]):
        named += [argument, LATEST] if argument == "--resume" and following.startswith("-") else [argument]
    return named


def _take_config_out(flags: list[str]) -> tuple[list[str], str | None]:
    """(the flags without ``--config FILE``, that file or None). Raises RunError if no file follows."""
    flags = [part for flag in flags for part in (flag.split("=", 1) if flag.startswith("--config=") else [flag])]
    if "--config" not in flags:
        return flags, None
    at = flags.index("--config")
    if at + 1 == len(flags):
        raise RunError("--config needs the name of a JSON or TOML file")
    return flags[:at] + flags[at + 2 :], flags[at + 1]


def _as_flags(settings: dict[str, Any]) -> list[str]:
    """Convert settings of a file to flags: {"ulysses": 2, "debug": True} -> ["--ulysses", "2", "--debug"].

    One parser then reads both, with the same errors.
    """
    flags: list[str] = []
    for name, value in settings.items():
        flag = f"--{name.replace('_', '-')}"
        if name in ("checkpoint", "runs"):  # given by position
            flags[:0] = map(str, value if isinstance(value, list) else [value])
        elif isinstance(value, bool):
            flags += [flag if value else f"--no-{name.replace('_', '-')}"]
        else:
            flags += [flag, *map(str, value if isinstance(value, list) else [value])]
    return flags


def _help(verb: str) -> None:
    """Print the flags of ``verb``, then its example, which is last so that it stays on the screen and can be copied."""
    with contextlib.suppress(SystemExit):
        _read(verb, ["--help"], None)
    print(f"Example\n\n{textwrap.indent(VERBS[verb].example, '  ')}")


def _version() -> str:
    """One line with the versions of longspan, Python, torch and transformers, for bug reports; imports none of them."""
    others = [f"{name} {version(name)}" for name in ("torch", "transformers") if find_spec(name)]
    return f"longspan {longspan.__version__} (Python {platform.python_version()}, {', '.join(others)})"


def _overview() -> str:
    """The text of ``longspan --help``: every verb with its description."""
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  longspan {name:<{width}}  {verb.does}" for name, verb in VERBS.items())
    return f"""Train a transformer on sequences that one device cannot hold, and get the results of one device.

{verbs}

Every verb shows its flags and a real call with --help, and takes --config FILE (JSON or TOML) in place of flags.
A first run on this machine, with Python's own standard library as text:  longspan train
"""


if __name__ == "__main__":
    sys.exit(main())
