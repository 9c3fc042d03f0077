"""Flags and presets: from a script's `Config` dataclass to one resolved `cfg`.

A script declares its flags once, as a flat dataclass whose comments are the help text:

    @dataclass
    class Config:
        # -- run
        preset: str = "auto"    # auto | tiny | llama-1b | paper
        # -- optimisation (Table 7)
        lr: float = 1.5e-6      # peak learning rate [paper: 3e-6]
                                # (a second comment line continues the first)

    PRESETS = {"llama-1b": {}, "tiny": dict(lr=2e-4)}

    if __name__ == "__main__":
        cli(main, Config, PRESETS, __doc__)

The defaults in the class are the llama-1b preset; PRESETS holds what the other presets change. An explicit flag beats
the preset. `# -- name` opens a group in --help.
"""

import ast
import difflib
import inspect
import io
import json
import math
import re
import sys
import textwrap
import tokenize
import typing
from collections.abc import Callable
from dataclasses import asdict, fields, make_dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from nanorlhf import parallel
from nanorlhf.errors import UserError, check, one_sentence
from nanorlhf.run.streams import lasting_streams

EXPLAINED = "What a run logs is explained in docs/metrics.md"
LARGE_GPU_GB = 70  # what the llama-1b preset needs

# How other projects (TRL, cleanrl, OpenRLHF) spell our flags.
SPELLINGS = {
    "lr": "learning_rate init_lr",
    "critic_lr": "critic_learning_rate",
    "critic_warmup": "critic_warmup_steps freezing_actor_steps",
    "lr_schedule": "lr_scheduler_type scheduler",
    "batch_size": "per_device_train_batch_size train_batch_size rollout_batch_size",
    "microbatch_tokens": "gradient_accumulation_steps micro_batch_size local_micro_batch_size",
    "num_minibatches": "num_mini_batches nminibatches",
    "num_epochs": "num_train_epochs",
    "num_ppo_epochs": "ppo_epochs noptepochs",
    "max_updates": "num_updates max_steps",
    "run_name": "output_dir exp_name experiment_name",
    "overwrite": "overwrite_output_dir",
    "resume": "resume_from_checkpoint",
    "track": "report_to use_wandb wandb",
    "deterministic": "full_determinism torch_deterministic use_deterministic_algorithms",
    "model": "model_name_or_path base_model",
    "sft_model": "sft_model_path ref_model",
    "reward_model": "reward_model_path",
    "policy": "policies checkpoint checkpoints",
    "data": "dataset_name dataset query_dataset",
    "kl_coef": "kl_coeff init_kl_coef beta",
    "lam": "gae_lambda lambd",
    "cliprange": "clip_range clip_coef clip_epsilon cliprange_policy",
    "cliprange_value": "clip_range_vf value_clip",
    "vf_coef": "vf_coeff value_loss_coef",
    "missing_eos_score": "missing_eos_penalty penalty_reward_value",
    "response_length": "max_new_tokens",
    "max_grad_norm": "max_norm clip_grad_norm",
    "dtype": "torch_dtype bf16 fp16",
}
OTHER_SPELLINGS = {theirs: ours for ours, many in SPELLINGS.items() for theirs in many.split()}


# What a flag may be, by name, in whichever script it occurs.
RULES: tuple[tuple[str, Callable[[float], bool], str], ...] = (
    (
        "at least 1",
        lambda x: x >= 1,
        "batch_size num_epochs max_updates num_ppo_epochs num_minibatches microbatch_tokens max_query_length "
        "total_episodes eval_posts eval_pairs shift_posts num_posts num_comparisons steps batch_tokens keep",
    ),
    ("at least 2", lambda x: x >= 2, "response_length"),
    (
        "0 or more",
        lambda x: x >= 0,
        "seed save_every sample_every diversity_samples diversity_posts critic_warmup lr_warmup",
    ),
    (
        "0 or more, and finite",
        lambda x: 0 <= x < math.inf,
        "kl_coef vf_coef temperature eval_temperature diversity_temperature warmup_steps",
    ),
    (
        "greater than 0, and finite",
        lambda x: 0 < x < math.inf,
        "lr critic_lr max_grad_norm stop_kl cliprange cliprange_value",
    ),
    ("from 0 to 1", lambda x: 0 <= x <= 1, "gamma lam"),
    ("a finite number", math.isfinite, "missing_eos_score"),
)
# What may differ from the first start when a run is resumed: nothing that changes its numbers. First: without the flag
# it stays as it was.
KEPT_UNLESS_GIVEN = ("track", "save_every", "sample_every", "preflight", "keep", "on_nan", "stop_kl")
FREE_ON_RESUME = ("resume", "overwrite", "device", *KEPT_UNLESS_GIVEN)


def cli(main: Callable, Config: type, presets: dict[str, dict], doc: str, argv: list[str] | None = None) -> None:
    """Parses the flags and calls main(cfg). What a user can cause ends in one sentence on stderr and exit status 2;
    output that goes away ends nothing (streams.py)."""
    again = "continue with --resume" if "resume" in _names(Config) else ""
    with lasting_streams(), parallel.one_voice(), one_sentence(again):
        cfg = parse(Config, presets, doc, argv)
        with parallel.group(getattr(cfg, "device", "cpu"), asdict(cfg)):  # one process, unless torchrun started several
            main(cfg)


def parse(Config: type, presets: dict[str, dict], doc: str, argv: list[str] | None = None) -> Any:
    """The resolved Config: explicit flags on top of the preset's values; cfg.preset is the name of the preset that was
    chosen. Two attributes that are no fields: cfg.preset_reason, why that preset, and cfg.argv, the flags as typed."""
    argv = sys.argv[1:] if argv is None else list(argv)
    comments, groups = describe(Config)
    flags, wants_help = _read_flags(Config, comments, argv)
    preset, reason = _resolve_preset(presets, flags)
    unknown = set(presets[preset]) - _names(Config)
    assert not unknown, f"preset {preset} sets {sorted(unknown)}, which {Config.__name__} does not have"

    defaults = asdict(Config(**(presets[preset] | {"preset": preset})))
    words = [word for flag in flags if flag[0] != "--preset" for word in flag if word is not None]

    # tyro draws a box for each nested dataclass, so each group of the flat Config becomes one, without a prefix.
    types = typing.get_type_hints(Config)
    boxes = []
    for i, (title, names) in enumerate(groups.items()):
        box = make_dataclass(
            f"Group{i}",
            [(name, Annotated[types[name], _help(types[name], comments[name])], defaults[name]) for name in names],
            frozen=True,
        )
        flat = tyro.conf.OmitArgPrefixes[box]
        boxes.append((f"group{i}", Annotated[flat, tyro.conf.arg(name=title, help="")], box()))
    nested = tyro.cli(
        make_dataclass("Flags", boxes),
        args=words + ["--help"] * wants_help,
        description=f"{_summary(doc)}\n\nDefaults below: preset {preset} ({reason}). {EXPLAINED}.",
        use_underscores=True,
    )
    values = {name: value for group in asdict(nested).values() for name, value in group.items()}
    cfg = Config(**(values | {"preset": preset}))
    cfg.preset_reason, cfg.argv = reason, argv
    if getattr(cfg, "resume", False):
        _restore(cfg, explicit={flag.removeprefix("--").removeprefix("no_") for flag, *_ in flags})
    for expected, holds, names in RULES:
        for name in names.split():
            value = getattr(cfg, name, None)
            check(value is None or holds(value), name, value, expected)
    return cfg


def _restore(cfg: Any, explicit: set[str]) -> None:
    """Take the settings of the resumed run, models and data included; an explicit flag may not contradict them."""
    path = Path("runs") / cfg.run_name / "config.json"
    try:
        began_with = dict(json.loads(path.read_text(encoding="utf-8"))["config"])
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return  # there is no such run: Run says so
    from nanorlhf.data.hub import hub_id_of  # here: --help should not wait for the tokenizers

    def equal(now: Any, then: Any) -> bool:
        if isinstance(now, str) and isinstance(then, str):
            return Path(now) == Path(then) or now == hub_id_of(then)  # a hub id, and where it was fetched to
        return now == then

    for name in _names(type(cfg)) & set(began_with):
        if name in FREE_ON_RESUME and (name in explicit or name not in KEPT_UNLESS_GIVEN):
            continue
        now, then = getattr(cfg, name), began_with[name]
        if isinstance(now, tuple):  # in JSON a list; a name, where the flag took one only
            then = (then,) if isinstance(then, str) else tuple(then or ())
            same = len(now) == len(then) and all(map(equal, now, then))
        else:
            same = equal(now, then)
        check(
            name not in explicit or same, f"--{name}", now, f"{then!r}, as when {path.parent} began",
            "leave the flag out to resume, or start a new run with --run_name",
        )  # fmt: skip
        setattr(cfg, name, then)
    cfg.preset_reason = "that of the run"


def describe(Config: type) -> tuple[dict[str, str], dict[str, list[str]]]:
    """From the source of a Config: {field: its comment} and {group title: its fields}, in order."""
    source = textwrap.dedent(inspect.getsource(Config))
    remarks = {}  # line number -> comment text
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            remarks[token.start[0]] = (token.start[1], token.string.lstrip("# "))
    members = [node for node in ast.parse(source).body[0].body if isinstance(node, ast.AnnAssign)]
    field_at = {node.end_lineno: node.target.id for node in members}

    comments, groups, title, field = {}, {}, "general", None
    for line in range(1, source.count("\n") + 1):
        column, text = remarks.get(line, (0, ""))
        if line in field_at:
            field = field_at[line]
            comments[field] = text
            groups.setdefault(title, []).append(field)
        elif text.startswith("-- "):
            title, field = text.removeprefix("-- ").strip(" -"), None
        elif text and field and column > members[0].col_offset:  # further right than the fields: continues a comment
            comments[field] += " " + text
        else:
            field = None
    return comments, groups


def unread_fields(Config: type, *sources: str | Path) -> list[str]:
    """Dead flags: the fields that none of these files reads as cfg.<field> or getattr(cfg, "<field>", ...)."""
    read = set()
    for source in sources:
        for node in ast.walk(ast.parse(Path(source).read_text(encoding="utf-8"))):
            match node:
                case ast.Attribute(value=ast.Name(id="cfg"), attr=name, ctx=ast.Load()):
                    read.add(name)
                case ast.Call(func=ast.Name(id="getattr"), args=[ast.Name(id="cfg"), ast.Constant(value=name), *_]):
                    read.add(name)
    return [field.name for field in fields(Config) if field.name not in read]


def _read_flags(Config: type, comments: dict[str, str], argv: list[str]) -> tuple[list[tuple[str, ...]], bool]:
    """argv as [("--name", value or None for a switch)] with our spelling, and whether help was asked for. A flag whose
    type is a tuple takes all words up to the next flag. tyro converts the values later; here every flag is known, has a
    value if it needs one, and nothing is left over."""
    lists = {name for name, kind in typing.get_type_hints(Config).items() if typing.get_origin(kind) is tuple}
    switches = {name for name, kind in typing.get_type_hints(Config).items() if kind is bool}
    # a switch, or one of some words: --resume, --resume auto
    options = {name: typing.get_args(kind) for name, kind in typing.get_type_hints(Config).items()}
    choices = {
        name: [word for option in kinds for word in typing.get_args(option)]
        for name, kinds in options.items()
        if bool in kinds
    }
    flags, words = [], list(argv)
    wants_help = bool({"-h", "--help"} & set(words))
    while words:
        word = words.pop(0)
        if word in ("-h", "--help"):
            continue
        typed, equals, value = word.partition("=")
        if not typed.startswith("--"):
            switch = flags[-1][0] if flags and flags[-1][1] in (None, "True") else None
            after = f" after {switch}, which takes no value" if switch else ""
            raise UserError(f"unexpected argument {word!r}{after}: write --name value, or --switch alone")
        name = typed[2:].replace("-", "_")
        if name.removeprefix("no_") in switches:
            if equals:
                raise UserError(f"{typed} takes no value: write --{name} or --no_{name}")
            flags.append((f"--{name}", None))
        elif name in choices:
            if not equals:
                value = words.pop(0) if words and words[0] in choices[name] else "True"
            check(value in ("True", *choices[name]), typed, value, f"followed by {', '.join(choices[name])} or nothing")
            flags.append((f"--{name}", value))
        elif name in comments:
            if not equals:
                if not words or words[0].startswith("--"):
                    raise UserError(f"{typed} needs a value: {comments[name]}")
                value = words.pop(0)
            more = []
            while name in lists and words and not words[0].startswith("-"):
                more.append(words.pop(0))
            if name in lists:  # given twice, the words add up
                more = [word for flag in flags if flag[0] == f"--{name}" for word in flag[1:]] + [value, *more]
                flags, value, more = [flag for flag in flags if flag[0] != f"--{name}"], more[0], more[1:]
            flags.append((f"--{name}", value, *more))
        else:
            raise UserError(f"unknown flag {typed}: {_nearest(name, comments)}")
    return flags, wants_help


def _nearest(name: str, comments: dict[str, str]) -> str:
    """What to type instead of an unknown flag: our name for another project's spelling, else the most similar name."""
    name = name.split(".")[-1]  # --ppo.kl_coef, as in cleanrl
    ours = name if name in comments else OTHER_SPELLINGS.get(name)
    if ours in comments:
        return f"use --{ours} ({comments[ours]})"
    similar = difflib.get_close_matches(name, comments, n=1) or [field for field in comments if name in field]
    return f"did you mean --{similar[0]} ({comments[similar[0]]})?" if similar else "--help lists all flags"


def _resolve_preset(presets: dict[str, dict], flags: list[tuple[str, ...]]) -> tuple[str, str]:
    """(name, reason): the preset asked for, or llama-1b where its GPU is present, smollm2 on a smaller one, else tiny."""
    typed = {flag: values[0] for flag, *values in flags}  # the last one counts, as everywhere on a command line
    preset = typed.get("--preset", "auto")
    if preset != "auto":
        check(preset in presets, "preset", preset, f"one of auto, {', '.join(presets)}", "see --help")
        return preset, "chosen with --preset"
    device = typed.get("--device", "auto")
    if device.startswith("cpu"):
        return "tiny", "chosen by --device cpu"
    import torch  # here: --help with an explicit preset should not wait for it

    if not torch.cuda.is_available():
        return "tiny", "no CUDA device"
    card = torch.cuda.get_device_properties(device if re.fullmatch(r"cuda:\d+", device) else "cuda")
    size = card.total_memory / 1e9
    if size < LARGE_GPU_GB:
        return "smollm2", f"{card.name} has {size:.0f} GB, llama-1b needs {LARGE_GPU_GB}"
    return "llama-1b", f"{card.name} has {size:.0f} GB"


def _help(kind: Any, comment: str) -> Any:
    """tyro's description of one flag: our comment, and FLOAT where tyro would write {None}|FLOAT."""
    options = [option for option in typing.get_args(kind) if option is not type(None)]
    optional = type(None) in typing.get_args(kind) and len(options) == 1 and isinstance(options[0], type)
    words = [word for option in options for word in typing.get_args(option)] if bool in options else []  # --resume
    return tyro.conf.arg(help=comment, metavar=options[0].__name__.upper() if optional else "|".join(words) or None)


def _summary(doc: str) -> str:
    """The top of --help: the docstring's first paragraph and its example command."""
    first, *others = inspect.cleandoc(doc or "").split("\n\n")
    example = [] if "python " in first else [paragraph for paragraph in others if "python " in paragraph][:1]
    return "\n\n".join([first, *example])


def _names(Config: type) -> set[str]:
    return {field.name for field in fields(Config)}
